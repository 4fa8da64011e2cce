import jax
import numpy as np
import pytest

from configs import base
from vtriune_jax import models, tiny
from vtriune_jax.data.tokenizer import load_processor

TEXTS = ["How many digits are there?", "\\boxed{12}"] * 5


@pytest.fixture(scope="module")
def sizes():
    sizes = base.get_config().model.tiny
    sizes.vocab_size, sizes.hidden, sizes.intermediate, sizes.layers = 400, 32, 48, 1
    sizes.heads, sizes.kv_heads, sizes.mrope_section = 2, 1, (2, 3, 3)
    sizes.vision_hidden, sizes.vision_intermediate, sizes.vision_depth = 16, 24, 2
    sizes.full_attention_layers = (1,)
    return sizes


@pytest.fixture(scope="module")
def folder(sizes, tmp_path_factory):
    return tiny.ensure_tiny(tmp_path_factory.mktemp("tiny") / "deep" / "model", sizes, TEXTS, 0)


def test_the_folder_is_an_ordinary_checkpoint(folder, sizes):
    config = models.load_pretrained(folder).config
    tokenizer = load_processor(folder).tokenizer
    assert (config.text.embed, config.text.layers, config.text.kv_heads) == (32, 1, 1)
    assert (config.vision.depth, config.vision.full_attention) == (2, (1,))
    assert config.text.vocab == len(tokenizer) <= 400
    assert config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert config.tied


def test_it_is_made_once(folder, sizes):
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert tiny.ensure_tiny(folder, sizes, ["other texts"], 1) == folder
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    assert [file.name for file in folder.parent.iterdir()] == ["model"]


def test_another_seed_is_another_model(folder, sizes, tmp_path):
    def embedding(path):
        return np.asarray(models.load_pretrained(path).head())

    same = tiny.ensure_tiny(tmp_path / "same", sizes, TEXTS, 0)
    other = tiny.ensure_tiny(tmp_path / "other", sizes, TEXTS, 1)
    np.testing.assert_array_equal(embedding(same), embedding(folder))
    assert not np.allclose(embedding(other), embedding(folder))


def test_an_untied_head(sizes, folder):
    untied = type(sizes)({**sizes, "tie": False})
    hf = tiny.tiny_config(untied, load_processor(folder).tokenizer)
    config = models.ModelConfig.from_hf(hf)
    assert not config.tied
    assert "head" in models.abstract(config)[1]["language"]


def test_a_start_that_failed_leaves_nothing_in_the_way(sizes, tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(models, "save_pretrained", fails)
        with pytest.raises(RuntimeError):
            tiny.ensure_tiny(tmp_path / "model", sizes, TEXTS, 0)
    assert not (tmp_path / "model").exists()
    tiny.ensure_tiny(tmp_path / "model", sizes, TEXTS, 0)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert jax.tree.leaves(models.split(models.load_pretrained(tmp_path / "model"))[1])
