"""Broken checkpoints end in one line that names the file and the key."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vtriune_jax import models
from vtriune_jax.errors import UserError


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    models.save_pretrained(model, folder)
    return folder


@pytest.fixture
def broken(saved, tmp_path):
    """A copy to damage, and what writes its tensors after a change."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"

    def damage(**changes):
        tensors = load_file(file) | {k.replace("__", "."): v for k, v in changes.items()}
        save_file({k: v for k, v in tensors.items() if v is not None}, file)
        return tmp_path

    return damage


def test_missing(broken):
    with pytest.raises(UserError, match=r"no tensor 'model.norm.weight' \(1 missing"):
        models.load_pretrained(broken(model__norm__weight=None))


def test_left_over(broken):
    with pytest.raises(UserError, match=r"model.safetensors has a tensor 'model.x' that"):
        models.load_pretrained(broken(model__x=np.zeros(1)))


def test_mis_shaped(broken):
    with pytest.raises(UserError, match=r"'model.norm.weight' becomes \(3,\) but .* \(32,\)"):
        models.load_pretrained(broken(model__norm__weight=np.zeros(3, np.float32)))


def test_half_a_file(saved, broken):
    folder = broken()
    half = (saved / "model.safetensors").read_bytes()[:1000]
    (folder / "model.safetensors").write_bytes(half)
    with pytest.raises(UserError, match=r"model.safetensors cannot be read"):
        models.load_pretrained(folder)


def test_no_weights_no_config(broken, tmp_path):
    folder = broken()
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has neither model.safetensors nor"):
        models.load_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is not JSON"):
        models.load_pretrained(folder)
    with pytest.raises(UserError, match=r"cannot read .*nowhere.config.json"):
        models.load_pretrained(tmp_path / "nowhere")


def test_a_missing_shard_is_named(model, tmp_path):
    models.save_pretrained(model, tmp_path, max_shard_bytes=20_000)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    shards[1].unlink()
    with pytest.raises(UserError, match=f"{shards[1].name} is missing"):
        models.load_pretrained(tmp_path)


def test_saving_over_a_checkpoint_leaves_no_stale_file(model, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    models.save_pretrained(model, tmp_path, max_shard_bytes=20_000)
    models.save_pretrained(model, tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"tokenizer.json", "config.json", "model.safetensors"}
    models.load_pretrained(tmp_path)


def test_a_folder_that_cannot_be_written(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the checkpoint"):
        models.save_pretrained(model, tmp_path / "file" / "folder")
