import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vtriune_jax.data import digits, tokenizer
from vtriune_jax.errors import UserError

CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": "A 3."},
    {"role": "user", "content": "Sure?"},
]
EXPECTED = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>\n"
    "<|im_start|>assistant\nA 3.<|im_end|>\n"
    "<|im_start|>user\nSure?<|im_end|>\n"
    "<|im_start|>assistant\n"
)


def render(processor, chat, **options):
    return processor.apply_chat_template(chat, tokenize=False, **options)


def test_special_tokens_lie_above_the_base_in_qwens_order(processor):
    words = processor.tokenizer
    specials = [*tokenizer.CONTROL_TOKENS, *tokenizer.TEXT_TOKENS]
    base = len(words) - len(specials)
    assert words.convert_tokens_to_ids(specials) == list(range(base, len(words)))
    # the same distances as between the ids of the real checkpoints
    real = {"<|endoftext|>": 151643, "<|im_end|>": 151645, "<|image_pad|>": 151655}
    for token, number in real.items():
        assert words.convert_tokens_to_ids(token) - base == number - 151643
    assert (words.eos_token, words.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_vocabulary_size_is_a_limit(processor, tmp_path):
    assert 400 < len(processor.tokenizer) <= 1000
    tokenizer.write_processor(tmp_path, ["some text"], 300)
    assert len(tokenizer.load_processor(tmp_path).tokenizer) == 300
    with pytest.raises(UserError, match=r"vocab_size=100 is too small.* at least 278"):
        tokenizer.write_processor(tmp_path, ["some text"], 100)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to write to")
def test_a_full_disk_is_an_error_of_the_system(tmp_path):
    """Of a kind that `main` can tell of in one line."""
    (tmp_path / "tokenizer.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        tokenizer.write_processor(tmp_path, ["some text"], 300)


@pytest.mark.parametrize(
    "text", ['{"bbox_2d":[28,0,56,28]}', "äß🙂 zwölf\r\n\t x²", " a  b\n\n", ""]
)
def test_round_trip_of_any_text(processor, text):
    words = processor.tokenizer
    assert words.decode(words(text)["input_ids"], clean_up_tokenization_spaces=False) == text


def test_digits_are_single_tokens_and_boxes_are_cheap(processor):
    words = processor.tokenizer
    assert len(words("417")["input_ids"]) == 3
    assert words.tokenize('[{"bbox_2d":[28') == ['[{"', "bbox", "_", "2", "d", '":[', "2", "8"]
    assert len(words('],"label":"5"}]\n')["input_ids"]) == 5


def test_chat_template(processor):
    assert render(processor, CHAT, add_generation_prompt=True) == EXPECTED
    own = [{"role": "system", "content": "Be brief."}, *CHAT]
    assert render(processor, own) == EXPECTED.replace(
        "You are a helpful assistant.", "Be brief."
    ).removesuffix("<|im_start|>assistant\n")


@pytest.mark.parametrize("place", ["chat_template.json", "tokenizer_config.json"])
def test_hub_layouts_load_alike(processor, processor_folder, tmp_path, place):
    for file in processor_folder.iterdir():
        shutil.copy(file, tmp_path)
    template = (tmp_path / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    config["added_tokens_decoder"] = {
        str(token.pop("id")): token for token in whole["added_tokens"]
    }
    config["processor_class"] = "Qwen2_5_VLProcessor"
    config["chat_template"] = template
    if place == "chat_template.json":
        (tmp_path / place).write_text(json.dumps({"chat_template": template}))
        config["chat_template"] = "the processor's goes first"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    merges = [" ".join(pair) for pair in whole["model"]["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (tmp_path / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))

    loaded = tokenizer.load_processor(tmp_path)
    assert render(loaded, CHAT, add_generation_prompt=True) == EXPECTED
    assert loaded.tokenizer(EXPECTED)["input_ids"] == processor.tokenizer(EXPECTED)["input_ids"]
    assert loaded.image_processor.size == processor.image_processor.size


def test_a_folder_of_save_pretrained_loads_alike(processor, tmp_path):
    """transformers 5 writes no preprocessor_config.json."""
    processor.save_pretrained(tmp_path)
    loaded = tokenizer.load_processor(tmp_path)
    assert render(loaded, CHAT, add_generation_prompt=True) == EXPECTED
    assert loaded.image_processor.to_dict() == processor.image_processor.to_dict()
    (tmp_path / "processor_config.json").unlink()
    with pytest.raises(UserError, match=r" processor_config.json or preprocessor_config.json is"):
        tokenizer.load_processor(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "preprocessor_config.json"])
def test_missing_and_broken_files(processor_folder, tmp_path, name):
    folder = shutil.copytree(processor_folder, tmp_path / "copy")
    (folder / name).write_text("{")
    with pytest.raises(UserError, match="processor files cannot be read"):
        tokenizer.load_processor(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        tokenizer.load_processor(folder)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "[]"),
        ("preprocessor_config.json", "[]"),
        ("chat_template.json", "{}"),
        ("chat_template.json", "[]"),
        ("chat_template.json", '{"chat_template": [{"name": "default"}]}'),
    ],
)
def test_files_of_another_form(processor_folder, tmp_path, name, text):
    folder = shutil.copytree(processor_folder, tmp_path / "copy")
    (folder / "chat_template.jinja").unlink()
    (folder / name).write_text(text)
    with pytest.raises(UserError, match="processor files cannot be read"):
        tokenizer.load_processor(folder)


def test_templates_with_names(processor, processor_folder, tmp_path):
    folder = shutil.copytree(processor_folder, tmp_path / "copy")
    text = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "?"}, {"name": "default", "template": text}]
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": named}))
    chat = [{"role": "user", "content": "Where?"}]
    other = tokenizer.load_processor(folder)
    assert other.apply_chat_template(chat) == processor.apply_chat_template(chat)


def test_missing_template(processor_folder, tmp_path):
    folder = shutil.copytree(processor_folder, tmp_path / "copy")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        tokenizer.load_processor(folder)


HIDE_TORCH = """
import sys
from importlib.machinery import PathFinder
real = PathFinder.find_spec
PathFinder.find_spec = classmethod(
    lambda cls, name, *rest: None if name in ("torch", "torchvision") else real(name, *rest))
"""


def test_works_without_torch(processor_folder, model_config):
    code = f"""{HIDE_TORCH}
from vtriune_jax.data import digits, prompts, tokenizer
from vtriune_jax.models.config import ModelConfig, TextConfig, VisionConfig
processor = tokenizer.load_processor({str(processor_folder)!r})
prompter = prompts.Prompter(processor, {model_config!r})
prompt = prompter(next(digits.samples("math", "train", 1)))
assert (prompt.image_index >= 0).sum() == prompt.grid_thw.prod() // 4 > 0
assert prompter.decode(prompter.encode_completion("a 7")) == "a 7"
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr  # nor does any library complain


def test_texts_cover_every_task():
    texts = list(digits.texts())
    assert not any("<image>" in text for text in texts)
    assert any("bbox_2d" in text for text in texts)
    assert any("<think>" in text for text in texts)
