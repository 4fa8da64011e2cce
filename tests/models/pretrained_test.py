"""Loading: dtypes, what it takes of memory, and where the parameters lie."""

import collections
import json
import math
import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vtriune_jax import models
from vtriune_jax.errors import UserError
from vtriune_jax.models import files, pretrained, weights, writing

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    models.save_pretrained(model, folder)
    return folder


def flat(model):
    return weights.flatten(models.split(model)[1])


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_dtypes_of_files_and_parameters(saved, model, tmp_path, stored, wanted):
    tensors = load_file(saved / "model.safetensors")
    stored = jnp.dtype(stored)
    save_file({k: v.astype(stored) for k, v in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    loaded = flat(models.load_pretrained(tmp_path, param_dtype=wanted))
    for path, value in flat(model).items():
        assert loaded[path].dtype == wanted
        np.testing.assert_array_equal(
            np.asarray(loaded[path]), np.asarray(value).astype(stored).astype(jnp.dtype(wanted))
        )


def test_written_in_bfloat16(model, tmp_path):
    models.save_pretrained(model, tmp_path, param_dtype="bfloat16", max_shard_bytes=20_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    hf = json.loads((tmp_path / "config.json").read_text())
    assert (hf["dtype"], hf["text_config"]["dtype"]) == ("bfloat16", "bfloat16")
    again = flat(models.load_pretrained(tmp_path, param_dtype="bfloat16"))
    for path, value in flat(model).items():
        np.testing.assert_array_equal(again[path], value.astype(jnp.bfloat16))


def test_an_unknown_dtype(saved, model, tmp_path):
    with pytest.raises(UserError, match="dtype='int8' is unknown; choose 'float32' or 'bfloat16'"):
        models.load_pretrained(saved, param_dtype="int8")
    with pytest.raises(UserError, match="dtype='int8' is unknown"):
        models.save_pretrained(model, tmp_path, param_dtype="int8")


def test_what_we_write_is_what_the_library_reads(saved, model):
    tensors = load_file(saved / "model.safetensors")
    for tensor in files.contents(saved / "model.safetensors"):
        whole = (slice(None),) * len(tensor.shape)
        np.testing.assert_array_equal(files.read(tensor, whole), tensors[tensor.key])
    assert set(tensors) == {entry.key for entry in weights.entries(shapes_of(model.config))}


@pytest.mark.parametrize("band", [1, 100, files.BAND])
def test_parts_of_a_tensor(tmp_path, monkeypatch, band):
    monkeypatch.setattr(files, "BAND", band)
    whole = np.arange(7 * 6 * 5, dtype=np.float32).reshape(7, 6, 5)
    save_file({"before": np.ones(3, np.float32), "x": whole}, tmp_path / "x.safetensors")
    tensor = next(t for t in files.contents(tmp_path / "x.safetensors") if t.key == "x")
    for index in [np.s_[:, :, :], np.s_[2:6, :, :], np.s_[:, 3:, 1:4], np.s_[6:, :1, :]]:
        part = files.read(tensor, index)
        np.testing.assert_array_equal(part, whole[index])
        assert part.ctypes.data % files.ALIGNMENT == 0


def shapes_of(config):
    return {path: leaf.shape for path, leaf in weights.flatten(models.abstract(config)[1]).items()}


@pytest.fixture(scope="module")
def larger(config, tmp_path_factory):
    """A checkpoint of ten large tensors and many small ones, and the bytes of the largest."""
    folder = tmp_path_factory.mktemp("larger")
    config = replace(config, text=replace(config.text, mlp=32_768, layers=3))
    shapes = shapes_of(config)
    pretrained.save_params(
        config,
        lambda path: jax.random.normal(jax.random.key(1), shapes[path]),
        folder,
        max_shard_bytes=10 * 2**20,
    )
    return folder, config, 32 * 32_768 * 4


def peak_on_host(do):
    """Bytes that Python and NumPy had at most, beyond those at the start: on CPUs, too, the buffers
    that JAX makes by itself are not among them."""
    do()  # so that all is compiled
    tracemalloc.start()
    try:
        start = tracemalloc.get_traced_memory()[0]
        do()
        return tracemalloc.get_traced_memory()[1] - start
    finally:
        tracemalloc.stop()


def test_less_than_two_tensors_on_the_host(larger, monkeypatch):
    folder, _, largest = larger
    monkeypatch.setattr(files, "BAND", 2**18)
    peak = peak_on_host(lambda: models.load_pretrained(folder))
    assert largest < peak < 2 * largest
    monkeypatch.setattr(files, "BAND", 2**30)
    assert peak_on_host(lambda: models.load_pretrained(folder)) > 2 * largest  # so it is measured


def test_writing_takes_one_parameter_after_the_other(larger, tmp_path):
    _, config, largest = larger
    shapes, fetched = shapes_of(config), []

    def fetch(path):
        fetched.append(path)
        return jnp.ones(shapes[path])

    peak = peak_on_host(lambda: pretrained.save_params(config, fetch, tmp_path))
    assert peak < 2 * largest
    assert fetched == [*shapes, *shapes]


def test_each_device_reads_its_part_once(larger):
    folder, *_ = larger
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.models.load_sharded", str(folder)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["cut"]["language/layers/mlp/gate/kernel"] == 4
    assert said["cut"]["language/norm/scale"] == 1
    read = collections.defaultdict(list)
    for key, part in said["parts"]:
        read[key].append(part)
    # Half of the devices have the same as the others: they make no second reading.
    assert read["model.layers.1.mlp.gate_proj.weight"] == [0.25] * 4
    assert read["model.embed_tokens.weight"] == [0.25] * 4
    assert read["model.norm.weight"] == [1]
    assert all(math.isclose(sum(parts), 1) or "patch_embed" in key for key, parts in read.items())


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_bands_of_any_size_make_the_same_files(model, tmp_path, monkeypatch, stored):
    params = flat(model)
    halves = {path: jnp.asarray(leaf, jnp.bfloat16) for path, leaf in params.items()}

    def write(name, params):
        folder = tmp_path / name
        pretrained.save_params(model.config, params.__getitem__, folder, param_dtype=stored)
        return (folder / weights.SINGLE).read_bytes()

    whole = [write("a", params), write("b", halves)]
    monkeypatch.setattr(writing, "BAND", 64)
    monkeypatch.setattr(writing, "ROWS", 3)
    assert [write("c", params), write("d", halves)] == whole
