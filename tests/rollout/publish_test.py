"""Versions of a model on disk: equal to the model, whole or not at all, and no more than needed."""

import errno
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.models.conftest import config, model  # noqa: F401 (fixtures)
from vtriune_jax import models
from vtriune_jax.errors import UserError
from vtriune_jax.models import LoRAConfig, files, lora, pretrained, weights
from vtriune_jax.rollout import publish
from vtriune_jax.rollout.publish import Publisher, verify

ROOT = Path(__file__).parents[2]
VISUAL = ("^visual/",)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("checkpoint")
    models.save_pretrained(model, folder)
    (folder / "tokenizer.json").write_text('{"a": 1}')
    return folder


@pytest.fixture
def make(checkpoint, model, tmp_path):  # noqa: F811
    def publisher(**changes):
        defaults = {
            "reference": checkpoint,
            "frozen": VISUAL,
            "dtype": "float32",
            "max_shard_bytes": 20_000,
            "extras": (checkpoint / "tokenizer.json",),
        }
        return Publisher(tmp_path / "out", model.config, **{**defaults, **changes})

    return publisher


def params_of(model):  # noqa: F811
    return models.split(model)[1]


def moved(params, by=1.0):
    """All but the vision tower changed."""
    flat = weights.flatten(params)
    return weights.unflatten(
        {path: leaf if path.startswith("visual/") else leaf + by for path, leaf in flat.items()}
    )


def assert_holds(folder, params, dtype="float32"):
    loaded = params_of(models.load_pretrained(folder, param_dtype=dtype))
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b.astype(dtype))),
        loaded,
        params,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_version_is_the_model(make, model, dtype):  # noqa: F811
    publisher = make(dtype=dtype)
    first = publisher.publish(params_of(model), 0)
    second = publisher.publish(moved(params_of(model)), 1)
    assert_holds(first.folder, params_of(model), dtype)
    assert_holds(second.folder, moved(params_of(model)), dtype)
    for published in (first, second):
        verify(published.folder)
        assert (published.folder / "tokenizer.json").read_text() == '{"a": 1}'
        assert pretrained.read_config(published.folder) == model.config
        hf = json.loads((published.folder / "config.json").read_text())
        assert hf["dtype"] == dtype
    assert 0 < max(first.gather_seconds, first.write_seconds) < first.seconds


def test_what_never_changes_is_written_once(make, model):  # noqa: F811
    publisher = make()
    first = publisher.publish(params_of(model), 0)
    second = publisher.publish(moved(params_of(model)), 1)
    shared = {
        file.name for file in second.folder.iterdir() if file.samefile(first.folder / file.name)
    }
    kinds = {"visual": set(), "language": set()}
    for file in second.folder.glob("*.safetensors"):
        for key in load_file(file):
            kinds["visual" if key.startswith("visual.") else "language"].add(file.name)
    assert shared & (kinds["visual"] | kinds["language"]) == kinds["visual"]
    assert not kinds["visual"] & kinds["language"]
    assert {"config.json", weights.INDEX, "tokenizer.json"} <= shared
    sizes = {p: leaf.nbytes for p, leaf in weights.flatten(params_of(model)).items()}
    changed = sum(size for path, size in sizes.items() if not path.startswith("visual/"))
    assert first.bytes == sum(sizes.values())
    assert second.bytes == changed


def test_where_there_are_no_links_files_are_copied(make, model, monkeypatch):  # noqa: F811
    def refuse(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    publisher = make()
    first = publisher.publish(params_of(model), 0)
    second = publisher.publish(moved(params_of(model)), 1)
    publisher.collect(())
    verify(second.folder)
    assert_holds(second.folder, moved(params_of(model)))
    assert os.stat(second.folder / "config.json").st_nlink == 1
    assert first.folder.exists()


def test_links_outlive_the_first_version(make, model):  # noqa: F811
    publisher = make(keep=1)
    for version in range(3):
        folder = publisher.publish(moved(params_of(model), version), version).folder
        publisher.collect(())
    assert [path.name for path in folder.parent.iterdir()] == ["version-00000002"]
    verify(folder)
    assert_holds(folder, moved(params_of(model), 2))


def test_adapters_are_merged(checkpoint, tmp_path):
    adapted = models.load_pretrained(checkpoint, lora=LoRAConfig(rank=2, alpha=4.0))
    flat = weights.flatten(params_of(adapted))
    flat = {path: leaf + 0.1 if path.endswith("/b") else leaf for path, leaf in flat.items()}
    params = weights.unflatten(flat)
    publisher = Publisher(
        tmp_path, adapted.config, reference=checkpoint, frozen=(lora.BASE,), dtype="float32"
    )
    publisher.publish(weights.unflatten(weights.flatten(params)), 0)
    second = publisher.publish(params, 1)
    merged = models.merge_lora(params, adapted.config)
    assert_holds(second.folder, merged)
    kernels = sum(
        leaf.nbytes
        for path, leaf in weights.flatten(merged).items()
        if f"{path.removesuffix('/kernel')}/lora/a" in flat
    )
    assert 0 < kernels == second.bytes < sum(leaf.nbytes for leaf in jax.tree.leaves(merged))


def test_versions_go_but_the_newest_and_those_in_use(make, model):  # noqa: F811
    publisher = make(keep=2)
    for version in range(5):
        folder = publisher.publish(params_of(model), version).folder
        publisher.collect({1})
    names = sorted(path.name for path in folder.parent.iterdir())
    assert names == [f"version-{version:08d}" for version in (1, 3, 4)]
    publisher.collect(())
    assert len(list(folder.parent.iterdir())) == 2


def test_what_a_killed_run_left(make, model, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    make().publish(params_of(model), 7)
    (out / ".version-00000008.part").mkdir()
    (out / ".version-00000008.part" / "model-00001-of-00002.safetensors").write_text("half")
    (out / ".version-00000006.old").mkdir()
    publisher = make()
    assert [path.name for path in out.iterdir()] == [
        "version-00000007"
    ]  # servers may still load it
    published = publisher.publish(moved(params_of(model)), 7)
    assert_holds(published.folder, moved(params_of(model)))
    publisher.publish(params_of(model), 8)
    publisher.collect(())
    assert sorted(path.name for path in out.iterdir()) == ["version-00000007", "version-00000008"]


KILLED = """
import os, sys
from pathlib import Path
from vtriune_jax import models
from vtriune_jax.models import files
from vtriune_jax.rollout.publish import Publisher
checkpoint, out = map(Path, sys.argv[1:])
model = models.load_pretrained(checkpoint)
publisher = Publisher(out, model.config, reference=checkpoint, max_shard_bytes=20_000)
publisher.publish(models.split(model)[1], 1)
add = files.Writer.add
def dying(self, tensor):
    written = add(self, tensor)
    if written:
        os._exit(9)
files.Writer.add = dying
publisher.publish(models.split(model)[1], 2)
"""


def test_a_half_written_version_has_no_name(checkpoint, make, tmp_path):
    out = tmp_path / "out"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED, str(checkpoint), str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr
    assert {path.name for path in out.iterdir()} == {"version-00000001", ".version-00000002.part"}
    verify(out / "version-00000001")
    make()
    assert {path.name for path in out.iterdir()} == {"version-00000001"}


def test_damage_is_found(make, model):  # noqa: F811
    folder = make().publish(params_of(model), 0).folder
    for file in sorted(folder.iterdir()):
        if file.name == publish.MANIFEST:
            continue
        whole = file.read_bytes()
        for at in (0, len(whole) // 2, len(whole) - 1):
            flipped = bytes([*whole[:at], whole[at] ^ 1, *whole[at + 1 :]])
            file.write_bytes(flipped)
            with pytest.raises(UserError, match=f"{file.name} is damaged"):
                verify(folder)
        file.write_bytes(whole[:-1])
        with pytest.raises(UserError, match=f"{file.name} is damaged"):
            verify(folder)
        file.write_bytes(whole)
    verify(folder)
    next(folder.glob("model-*")).unlink()
    with pytest.raises(UserError, match="is not a whole version"):
        verify(folder)


def test_shapes_that_the_servers_do_not_have(make, checkpoint, model, tmp_path):  # noqa: F811
    other = tmp_path / "other"
    other.mkdir()
    tensors = load_file(checkpoint / "model.safetensors")
    key = "model.layers.1.mlp.gate_proj.weight"
    save_file(tensors | {key: np.zeros((3, 32), np.float32)}, other / "model.safetensors")
    with pytest.raises(UserError, match=rf"'{key}' would be .* \(48, 32\).* has \(3, 32\)"):
        make(reference=other)
    del tensors[key]
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(UserError, match=rf"'{key}' would be .* has None"):
        make(reference=other)
    wide = replace(model.config, text=replace(model.config.text, layers=3))
    with pytest.raises(UserError, match=r"'model.layers.2.\S+' would be .* has None"):
        Publisher(tmp_path / "out", wide, reference=checkpoint)


def test_parameters_that_are_not_the_models(make, model, tmp_path):  # noqa: F811
    publisher = make()
    flat = weights.flatten(params_of(model))
    path = "language/layers/attn/q/bias"
    for wrong in (flat | {path: jnp.zeros((2, 31))}, {p: x for p, x in flat.items() if p != path}):
        with pytest.raises(UserError, match=f"cannot publish the parameter '{path}'"):
            publisher.publish(weights.unflatten(wrong), 0)
    with pytest.raises(UserError, match="cannot publish the parameter 'language/more'"):
        publisher.publish(weights.unflatten(flat | {"language/more": jnp.zeros(1)}), 0)
    assert not list((tmp_path / "out").iterdir())


def test_a_full_disk(make, model, checkpoint, tmp_path, monkeypatch):  # noqa: F811
    publisher = make()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.Writer, "add", full)
        with pytest.raises(UserError, match=r"cannot write weights to .*No space left"):
            publisher.publish(params_of(model), 0)
    assert not list((tmp_path / "out").iterdir())
    assert_holds(publisher.publish(params_of(model), 0).folder, params_of(model))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot use the folder"):
        Publisher(tmp_path / "file" / "out", model.config, reference=checkpoint)


@pytest.mark.parametrize("processes", [1, 2])
def test_sharded_parameters_of_one_host_or_two(processes, checkpoint, model, tmp_path):  # noqa: F811
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(8 // processes),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "tests.rollout.publish_hosts", str(processes)]
    folders = [str(checkpoint), str(tmp_path)]
    hosts = [
        subprocess.Popen(
            [*command, str(host), str(port), *folders],
            env=env,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in range(processes)
    ]
    said = []
    try:
        for host in hosts:
            out, err = host.communicate(timeout=240)
            assert host.returncode == 0, err
            said.append(json.loads(out.splitlines()[-1]))
    finally:
        for host in hosts:
            host.kill()
    written = []
    for at, version in enumerate((1, 2)):
        folder = tmp_path / f"version-{version:08d}"
        verify(folder)
        assert_holds(folder, params_of(model))
        written.append([name for each in said for name in each[at]["written"]])
        assert len(written[at]) == len(set(written[at]))  # none by two hosts
        loads = [
            sum((folder / name).stat().st_size for name in each[at]["written"]) for each in said
        ]
        assert max(loads) < 1.5 * min(loads)
    assert {file.name for file in folder.glob("*.safetensors")} == set(written[0])
    assert set(written[0]) > set(written[1])
    for each in said:
        assert each[2] == {"versions": ["version-00000001", "version-00000002"]}
        assert "cannot write weights" in each[3]["error"]
    assert said[0][4] == {"left": []}
    assert "No space left on device" in said[-1][3]["error"]
    if processes > 1:
        assert said[0][3]["error"].startswith("process 1: cannot write weights to")
