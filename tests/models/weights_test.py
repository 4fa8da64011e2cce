"""Broken checkpoints end in one line that names the file and the key."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vtriune_jax import models
from vtriune_jax.errors import UserError
from vtriune_jax.models import files

INDEX = "model.safetensors.index.json"


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
    folder = broken(model__norm__weight=None)
    message = rf"{folder}/model.safetensors has no tensor 'model.norm.weight' \(1 missing [^;]*;"
    with pytest.raises(UserError, match=message + " config.json and weights must [^;]*$"):
        models.load_pretrained(folder)


def test_left_over(broken):
    with pytest.raises(UserError, match=r"model.safetensors has a tensor 'model.x' that"):
        models.load_pretrained(broken(model__x=np.zeros(1)))


def test_mis_shaped(broken):
    with pytest.raises(UserError, match=r"'model.norm.weight' is of shape \(3,\) but .* \(32,\)"):
        models.load_pretrained(broken(model__norm__weight=np.zeros(3, np.float32)))


@pytest.fixture
def embedding(broken):
    """Of the checkpoint, whose config.json ties the head to it but whose files have one."""
    folder = broken()
    hf = json.loads((folder / "config.json").read_text())
    hf["tie_word_embeddings"] = hf["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(hf))
    return load_file(folder / "model.safetensors")["model.embed_tokens.weight"]


@pytest.mark.parametrize("band", [files.BAND, 300])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_tied_head_is_the_embedding_or_an_error(broken, embedding, monkeypatch, band, dtype):
    monkeypatch.setattr(files, "BAND", band)
    head = embedding.astype(np.float16).astype(dtype)  # the same numbers in either type
    rounded = {"model.embed_tokens.weight": head.astype(np.float32)}
    models.load_pretrained(broken(lm_head__weight=head, **rounded))
    other = head.copy()
    other[-1, -1] += 1
    for wrong in (other, head[:-1], head.astype(np.int8)):
        with pytest.raises(UserError, match=r"'lm_head.weight' differs from 'model.embed_tok"):
            models.load_pretrained(broken(lm_head__weight=wrong, **rounded))


@pytest.mark.parametrize("key", ["visual.patch_embed.proj.weight", "model.embed_tokens.weight"])
def test_mis_shaped_though_of_the_same_size(broken, saved, key):
    right = load_file(saved / "model.safetensors")[key]
    wrong = right.reshape(len(right) // 2, 2, *right.shape[1:])
    with pytest.raises(UserError, match=re.escape(f"model.safetensors: '{key}' is of shape")):
        models.load_pretrained(broken(**{key: wrong}))


@pytest.mark.parametrize(("dtype", "name"), [(np.int8, "I8"), (np.float64, "F64")])
def test_wrong_dtype(broken, dtype, name):
    with pytest.raises(
        UserError, match=rf"model.safetensors: 'model.norm.weight' is of .* {name};"
    ):
        models.load_pretrained(broken(model__norm__weight=np.zeros(32, dtype)))


@pytest.mark.parametrize("length", [0, 5, 1000, -1])
def test_part_of_a_file(saved, broken, length):
    folder = broken()
    part = (saved / "model.safetensors").read_bytes()[:length]
    (folder / "model.safetensors").write_bytes(part)
    with pytest.raises(UserError, match=r"model.safetensors cannot be read"):
        models.load_pretrained(folder)


def test_nothing_is_read_before_all_is_checked(broken, monkeypatch):
    folder = broken(model__norm__weight=np.zeros(3, np.float32))
    monkeypatch.setattr(files, "read", lambda *_: pytest.fail("read"))
    with pytest.raises(UserError, match=r"is of shape"):
        models.load_pretrained(folder)


def test_no_weights_no_config(broken, tmp_path):
    folder = broken()
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has neither model.safetensors nor \S+.json; expected"):
        models.load_pretrained(folder)
    (folder / "pytorch_model.bin").write_text("")
    with pytest.raises(UserError, match=r"has neither .* nor .*, only pytorch_model.bin; expected"):
        models.load_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is not JSON"):
        models.load_pretrained(folder)
    with pytest.raises(UserError, match=r"cannot read .*nowhere.config.json"):
        models.load_pretrained(tmp_path / "nowhere")


@pytest.fixture
def sharded(model, tmp_path):
    """A checkpoint in several files, and its index."""
    models.save_pretrained(model, tmp_path, max_shard_bytes=20_000)
    return tmp_path, json.loads((tmp_path / INDEX).read_text())


def test_a_missing_shard_is_named(sharded):
    folder, index = sharded
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    sizes = sum(np.prod(value.shape) * 4 for s in shards for value in load_file(s).values())
    assert index["metadata"]["total_size"] == sizes
    shards[1].unlink()
    with pytest.raises(UserError, match=f"{shards[1].name} is missing"):
        models.load_pretrained(folder)


def test_an_index_without_a_key_of_its_files(sharded):
    folder, index = sharded
    name = index["weight_map"].pop("model.norm.weight")
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=rf"{INDEX} does not say that {name} has .*norm.weight"):
        models.load_pretrained(folder)


def test_an_index_with_a_key_that_its_file_has_not(sharded):
    folder, index = sharded
    name = index["weight_map"]["model.norm.weight"]
    file = folder / name
    save_file({k: v for k, v in load_file(file).items() if k != "model.norm.weight"}, file)
    with pytest.raises(
        UserError, match=rf"{name} has no tensor 'model.norm.weight', where {INDEX}"
    ):
        models.load_pretrained(folder)


@pytest.mark.parametrize("theirs", ["model.norm.weight", "model.language_model.norm.weight"])
def test_a_key_in_two_files(sharded, theirs):
    folder, index = sharded
    home = index["weight_map"]["model.norm.weight"]
    other = next(name for name in index["weight_map"].values() if name != home)
    save_file(load_file(folder / other) | {theirs: np.zeros(32, np.float32)}, folder / other)
    index["weight_map"].setdefault(theirs, other)
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=rf"(has the tensor|that {other} has).*norm.weight"):
        models.load_pretrained(folder)


def test_a_key_that_neither_index_nor_files_have(sharded):
    folder, index = sharded
    file = folder / index["weight_map"].pop("model.norm.weight")
    (folder / INDEX).write_text(json.dumps(index))
    save_file({k: v for k, v in load_file(file).items() if k != "model.norm.weight"}, file)
    with pytest.raises(UserError, match=rf"{folder}/{INDEX} has no tensor 'model.norm.weight'"):
        models.load_pretrained(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"model__norm__weight": None},
        {"model__x": np.zeros(1)},
        {"model__norm__weight": np.zeros(3, np.float32)},
    ],
)
def test_an_index_beside_a_single_file_of_another_model(sharded, broken, changes):
    """Transformers, too, reads the single file."""
    folder = broken(**changes)  # the same as the one with the shards
    message = rf"^{folder}/model.safetensors.*; {INDEX} is not read beside model.safetensors: remo"
    with pytest.raises(UserError, match=message):
        models.load_pretrained(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": 3}'])
def test_a_broken_index(sharded, content):
    folder, _ = sharded
    (folder / INDEX).write_text(content)
    with pytest.raises(UserError, match=rf"{INDEX} is broken"):
        models.load_pretrained(folder)


def test_saving_over_a_checkpoint_leaves_no_stale_file(model, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    models.save_pretrained(model, tmp_path, max_shard_bytes=20_000)
    models.save_pretrained(model, tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"tokenizer.json", "config.json", "model.safetensors"}
    models.load_pretrained(tmp_path)


def test_a_kill_while_shards_take_the_place_of_one_file(saved, model, tmp_path, monkeypatch):
    """What is read then is the old model: not its weights with the new config."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    text = replace(model.config.text, norm_eps=0.5)
    other = models.init(replace(model.config, text=text), seed=1)

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        models.save_pretrained(other, tmp_path, max_shard_bytes=20_000)
    monkeypatch.undo()
    found = models.load_pretrained(tmp_path)
    assert found.config == models.load_pretrained(saved).config
    np.testing.assert_array_equal(found.head(), model.head())


def test_a_folder_that_cannot_be_written(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the checkpoint"):
        models.save_pretrained(model, tmp_path / "file" / "folder")
