"""`python -m vtriune_jax.compile`, from the command line to the file."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from vtriune_jax import commands
from vtriune_jax import config as configs
from vtriune_jax.compile import main

QUICKSTART = str(configs.REPOSITORY / "configs" / "quickstart.py")
SMALL = (
    "--config.model.tiny.layers=2",
    "--config.model.tiny.vision_depth=1",
    "--config.model.tiny.full_attention_layers=()",
)
KEYS = {
    "fits",
    "bytes_per_device",
    "bytes_limit",
    "argument_bytes",
    "temp_bytes",
    "held_bytes",
    "devices",
    "tokens_per_step",
    "model_flops_per_step",
    "collective_bytes_per_step",
    "estimated_step_seconds",
    "estimated_mfu",
    "compile_seconds",
}


def run(*words: str) -> subprocess.CompletedProcess:
    """In a process of its own: the number of devices is fixed when JAX starts."""
    folders = [str(configs.REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, folders)),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
    }
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "vtriune_jax.compile", *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def compiled(folder, topology, *more, status=0):
    """(numbers of the file, text) of a small program."""
    file = folder / "numbers.json"
    words = [f"--config={QUICKSTART}", f"--topology={topology}", f"--json={file}", *SMALL]
    done = run(*words, *more)
    assert done.returncode == status, done.stderr
    return json.loads(file.read_text()), done.stdout


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("eight"), "cpu:8")


def test_the_file_has_the_numbers(eight):
    found, text = eight
    assert found.keys() >= KEYS
    assert found["fits"]
    assert found["devices"] == 8
    assert found["tokens_per_step"] == 32 * (80 + 8 * 56)  # the prompt once
    used = found["argument_bytes"] + found["temp_bytes"] + found["held_bytes"]
    assert found["bytes_limit"] > found["bytes_per_device"] >= used > 0
    assert 0 < found["estimated_mfu"] < 1
    assert found["estimated_step_seconds"] == max(found["seconds"].values())
    assert "fits" in text
    assert "8 devices" in text
    assert "stage        grpo; sft by itself: --config.stages=sft\n" in text


def test_tower_and_sampler_are_compiled_on_demand(eight, tmp_path):
    assert eight[0]["sampling_bytes_per_device"] == {}
    found, text = compiled(tmp_path, "cpu:8", "--sampling")
    assert found["fits"]
    tower, sampler = (found["sampling_bytes_per_device"][n] for n in ("vision tower", "sampler"))
    assert "vision tower " in text
    pieces, _ = compiled(tmp_path, "cpu:8", "--sampling", "--config.rollout.pieces=4")
    assert pieces["sampling_bytes_per_device"]["vision tower"] == tower
    assert pieces["sampling_bytes_per_device"]["sampler"] < 0.7 * sampler


def test_a_sampler_that_does_not_fit_comes_with_advice(tmp_path):
    large = ("--config.grpo.prompts=131072", "--config.batch.micro_batches=16384")
    small = ("--config.sft.steps=0", "--config.stages=grpo", "--config.rollout.pieces=1")
    found, text = compiled(tmp_path, "cpu:8", "--sampling", *large, *small, status=1)
    assert found["bytes_per_device"] < found["bytes_limit"]
    assert found["sampling_bytes_per_device"]["sampler"] > found["bytes_limit"]
    assert "does NOT fit" in text
    assert "rollout.pieces (now 1)" in text


def test_devices_send_parameters_and_gradients_and_no_activations(eight, tmp_path):
    """Rows stay where they are: twice the rows, and not a byte more is sent."""
    more, _ = compiled(tmp_path, "cpu:8", "--config.grpo.prompts=64")
    assert more["tokens_per_step"] == 2 * eight[0]["tokens_per_step"]
    assert more["collective_bytes_per_step"] == eight[0]["collective_bytes_per_step"]


def test_what_does_not_fit_comes_with_its_largest_buffers_and_advice(tmp_path):
    found, text = compiled(tmp_path, "cpu:8", "--config.grpo.prompts=262144", status=1)
    assert not found["fits"]
    assert found["bytes_per_device"] > found["bytes_limit"]
    assert "does NOT fit" in text
    largest = found["largest_buffers"]
    assert largest[0]["bytes"] == max(buffer["bytes"] for buffer in largest) > 2**30
    assert "batch.micro_batches=2 … 4 (now 1)" in text
    assert 'model.dtype="bfloat16"' in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--config=configs/orsta_7b.py is missing"),
        ([f"--config={QUICKSTART}"], "--topology=v5p:2x2x4 is missing"),
        ([f"--config={QUICKSTART}", "--topology=v9:2x2"], "--topology=v9:2x2 is not known"),
        ([f"--config={QUICKSTART}", "--topology=cpu:0"], "is not known"),
        ([f"--config={QUICKSTART}", "--topology=h100:0"], "2x8: two machines"),
        ([f"--config={QUICKSTART}", "--topology=v5e:2x2", "--num_slices=0"], "num_slices"),
        ([f"--config={QUICKSTART}", "--topology=cpu:8", "more"], "'more' is not a flag"),
        ([f"--config={QUICKSTART}", "--topology=cpu:8", "--json=no/1.json"], "in a folder that is"),
        ([f"--config={QUICKSTART}", "--config.grpo.lr=x", "--topology=cpu:8"], "grpo.lr"),
    ],
)
def test_mistakes_are_told_in_one_line(words, message, capsys, monkeypatch):
    monkeypatch.setattr("vtriune_jax.aot.topology.prepare", lambda name: None)
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_the_compilers_get_our_flags_unless_there_are_others(monkeypatch):
    monkeypatch.setattr(os, "environ", {"XLA_FLAGS": "--other"})
    monkeypatch.setattr(commands, "version", lambda name: "0.11.0")
    for _ in range(2):
        commands.tell_compilers()
        assert os.environ["LIBTPU_INIT_ARGS"] == commands.TPU_FLAGS
        assert os.environ["XLA_FLAGS"] == f"--other {commands.CPU_FLAG} {commands.GPU_FLAG}"
        assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.92"
    mine = {
        "LIBTPU_INIT_ARGS": "--mine",
        "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=true --xla_gpu_memory_limit_slop_factor=95",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5",
    }
    monkeypatch.setattr(os, "environ", dict(mine))
    commands.tell_compilers()
    assert os.environ == mine


@pytest.mark.parametrize("jaxlib", ["0.11.1", "0.11.2", "0.12.0.1"])
def test_a_jaxlib_that_does_not_know_the_flag_is_not_told(monkeypatch, jaxlib):
    """It would end the process."""
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(commands, "version", lambda name: jaxlib)
    commands.tell_compilers()
    assert os.environ["XLA_FLAGS"] == commands.GPU_FLAG


CUDA_COMPILER = any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))
needs_cuda_compiler = pytest.mark.skipif(
    not CUDA_COMPILER, reason="needs the CUDA compiler: pip install 'jax[cuda13]'"
)


@needs_cuda_compiler
def test_the_cuda_compiler_compiles_the_update(tmp_path):
    small = ("--config.grpo.prompts=4", "--config.grpo.samples=2", "--config.model.tiny.layers=1")
    found, _ = compiled(tmp_path, "h100:1x2", *small, "--config.model.dtype=bfloat16")
    assert found["fits"]
    assert found["devices"] == 2
    assert 73 * 2**30 < found["bytes_limit"] < 74 * 2**30
    assert found["collectives"].keys() >= {"all-gather", "reduce-scatter"}


@pytest.mark.skipif(CUDA_COMPILER, reason="the CUDA compiler is here")
def test_without_the_cuda_compiler_it_is_told_where_it_comes_from():
    done = run(f"--config={QUICKSTART}", "--topology=h100:8")
    assert done.returncode == 2
    assert "pip install 'jax[cuda13]'" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.tpu
def test_the_tpu_compiler_compiles_the_update(tmp_path):
    small = ("--config.grpo.prompts=4", "--config.grpo.samples=2", "--config.model.tiny.layers=1")
    found, _ = compiled(tmp_path, "v5e:2x2", *small)
    assert found["fits"]
    assert found["devices"] == 4
    assert 15 * 2**30 < found["bytes_limit"] < 16 * 2**30
    assert found["collective_bytes_per_step"] > 0


@pytest.mark.tpu
def test_the_tpu_compiler_tells_what_does_not_fit(tmp_path):
    found, text = compiled(tmp_path, "v5e:2x2", "--config.grpo.prompts=65536", status=1)
    assert found["bytes_per_device"] > found["bytes_limit"]
    assert "batch.micro_batches=2" in text
    assert found["largest_buffers"]


@pytest.mark.tpu
def test_slices_send_gradients_only_over_the_slow_network(tmp_path):
    slices = ("--num_slices=2", "--config.mesh.data=2", "--config.model.tiny.layers=1")
    found, _ = compiled(tmp_path, "v5e:2x2", *slices)
    assert found["devices"] == 8
    assert 0 < found["collectives"]["between slices"] < found["collective_bytes_per_step"]


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("config", "topology"),
    [
        ("orsta_3b", "v6e:2x4"),
        ("orsta_7b", "v5p:2x2x4"),
        ("orsta_32b", "v5p:4x4x4"),
        ("orsta_72b", "v5p:4x4x8"),
    ],
)
def test_the_configs_fit_their_topologies_with_room(config, topology, tmp_path):
    file = tmp_path / "numbers.json"
    path = configs.REPOSITORY / "configs" / f"{config}.py"
    done = run(f"--config={path}", f"--topology={topology}", f"--json={file}")
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["bytes_per_device"] <= 0.9 * found["bytes_limit"]
