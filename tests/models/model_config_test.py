"""Reading, writing and checking the model's config."""

import re
from dataclasses import replace

import pytest

from vtriune_jax.errors import UserError
from vtriune_jax.models import ModelConfig, pretrained


def test_round_trip(config):
    changed = replace(config, text=replace(config.text, eos_token_id=(3, 4), pad_token_id=3))
    assert ModelConfig.from_hf(changed.to_hf_dict()) == changed
    other = ModelConfig.from_hf(changed.to_hf_dict(), dtype="bfloat16", remat="full")
    assert other == replace(changed, dtype="bfloat16", remat="full")


def test_a_missing_key_is_named(config):
    hf = config.to_hf_dict()
    del hf["text_config"]["num_hidden_layers"]
    with pytest.raises(UserError, match="no 'num_hidden_layers'"):
        ModelConfig.from_hf(hf)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2", None])
def test_another_kind_of_model_is_refused(config, kind):
    hf = config.to_hf_dict() | {"model_type": kind}
    with pytest.raises(UserError, match=f"model_type={kind!r} is not supported; expected 'qwen2_5"):
        ModelConfig.from_hf(hf)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("text_config", {"use_sliding_window": True}, "use_sliding_window"),
        ("text_config", {"hidden_act": "gelu"}, "text_config: hidden_act='gelu'"),
        ("text_config", {"num_key_value_heads": 3}, "kv heads 3 do not divide the heads 4"),
        ("text_config", {"hidden_size": 36}, "mrope_section (2, 1, 1)"),
        (
            "text_config",
            {"rope_scaling": {"rope_type": "yarn", "mrope_section": [2, 1, 1]}},
            "rope type 'yarn'",
        ),
        (
            "vision_config",
            {"out_hidden_size": 33},
            "output width 33 differs from the text width 32",
        ),
        ("vision_config", {"window_size": 9}, "window_size 9"),
        ("vision_config", {"num_heads": 3}, "vision heads 3"),
        ("text_config", {"hidden_size": "32"}, "text_config: hidden_size='32' is not supported"),
        ("text_config", {"num_attention_heads": 0}, "num_attention_heads=0"),
        ("text_config", {"num_key_value_heads": 0}, "num_key_value_heads=0"),
        ("text_config", {"num_hidden_layers": True}, "expected a whole number above 0"),
        ("text_config", {"rms_norm_eps": None}, "rms_norm_eps=None"),
        ("text_config", {"rope_scaling": [1]}, "rope_scaling is [1]; expected keys and values"),
        ("text_config", {"rope_scaling": {"mrope_section": 4}}, "rope_scaling: mrope_section=4"),
        ("vision_config", {"window_size": 0}, "vision_config: window_size=0"),
        ("vision_config", {"fullatt_block_indexes": None}, "fullatt_block_indexes=None"),
        ("vision_config", {"model_type": "qwen2_vl"}, "model_type='qwen2_vl'"),
    ],
)
def test_what_does_not_fit_is_an_error(config, section, changes, message):
    hf = config.to_hf_dict()
    hf[section] |= changes
    with pytest.raises(UserError, match=re.escape(message)):
        ModelConfig.from_hf(hf)


@pytest.mark.parametrize("section", ["text_config", "vision_config"])
@pytest.mark.parametrize("value", [[], [1], "32", 3])
def test_a_section_that_is_none(config, section, value):
    with pytest.raises(UserError, match=re.escape(f"{section} is {value!r}; expected keys and")):
        ModelConfig.from_hf(config.to_hf_dict() | {section: value})


@pytest.mark.parametrize("text", ["[]", "null", "3", '{"model_type": "qwen2_5_vl"}'])
def test_a_file_of_something_else_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=rf"^{tmp_path}/config.json: the model's config"):
        pretrained.read_config(tmp_path)


def test_as_many_kv_heads_as_heads(config):
    hf = config.to_hf_dict()
    hf["text_config"]["num_key_value_heads"] = None
    assert ModelConfig.from_hf(hf).text.kv_heads == config.text.heads


def test_unknown_words(config):
    with pytest.raises(UserError, match="remat='some'"):
        replace(config, remat="some")
    with pytest.raises(UserError, match="dtype='int8'"):
        replace(config, dtype="int8")
