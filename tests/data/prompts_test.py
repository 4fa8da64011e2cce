import dataclasses
import io
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from tests.data.conftest import make_sample, png
from vtriune_jax.data import digits, prompts
from vtriune_jax.data.prompts import Prompter
from vtriune_jax.data.tokenizer import load_processor
from vtriune_jax.errors import UserError
from vtriune_jax.models.vision import normalise
from vtriune_jax.types import Message


@pytest.fixture(scope="module")
def prompter(processor, model_config):
    return Prompter(processor, model_config)


def processed(processor, prompter, sample, step=0):
    """What the HF processor itself makes of the same chat."""
    images = [Image.open(io.BytesIO(data)) for data in sample.images]
    text = prompter.text(sample, step)
    return processor(text=[text], images=images or None, return_tensors="np")


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("No picture at all.", []),
        ("<image>One.", [(112, 56)]),
        ("Between <image> and <image> lies text", [(112, 56), (84, 140)]),
        ("Last <image>", [(100, 61)]),
        ("<image><image>", [(56, 56), (57, 300)]),
    ],
)
def test_ids_equal_the_hf_processors(processor, prompter, text, sizes):
    images = tuple(png(*size, seed=k) for k, size in enumerate(sizes))
    sample = make_sample(text, images)
    prompt = prompter(sample)
    expected = processed(processor, prompter, sample)
    np.testing.assert_array_equal(prompt.ids, expected["input_ids"][0])
    assert prompt.ids.dtype == np.int32
    assert prompt.positions.shape == (3, len(prompt.ids))
    if sizes:
        np.testing.assert_array_equal(prompt.grid_thw, expected["image_grid_thw"])
    else:
        assert len(prompt.grid_thw) == len(prompt.vision.patches) == 0


@pytest.mark.parametrize("task", digits.TASKS)
def test_builtin_prompts(processor, prompter, task):
    lengths, completions = [], []
    for sample in digits.samples(task, "train", 60):
        prompt = prompter(sample)
        np.testing.assert_array_equal(
            prompt.ids, processed(processor, prompter, sample)["input_ids"][0]
        )
        lengths.append(len(prompt.ids))
        completions.append(len(prompter.encode_completion(sample.demonstration)))
    assert max(lengths) <= 110
    assert np.quantile(completions, 0.85) <= 64
    assert max(completions) <= 80


def test_each_image_token_finds_the_patches_of_its_unit(processor, prompter, model_config):
    sample = make_sample("<image> <image>", (png(112, 140), png(56, 84, seed=1)))
    prompt = prompter(sample)
    is_image = prompt.ids == model_config.image_token_id
    np.testing.assert_array_equal(prompt.image_index >= 0, is_image)
    units = np.asarray(prompt.vision.patches).reshape(-1, 4, 1176)
    expected = processed(processor, prompter, sample)["pixel_values"].reshape(-1, 4, 1176)
    found = units[prompt.image_index[is_image]]
    found = normalise(found.reshape(-1, 1176)).reshape(expected.shape)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


def test_threads_change_nothing(prompter):
    samples = [
        make_sample(f"<image> {k}?", (png(56 + k, 90, seed=k),), id=str(k)) for k in range(64)
    ]
    with ThreadPoolExecutor(8) as pool:
        for got, want in zip(pool.map(prompter, samples), map(prompter, samples), strict=True):
            np.testing.assert_array_equal(got.ids, want.ids)
            np.testing.assert_array_equal(got.vision.patches, want.vision.patches)


def test_limits_in_the_wrong_order_are_said_at_once(processor, model_config):
    with pytest.raises(UserError, match=r"data\.min_pixels=2000 exceeds data\.max_pixels=1000"):
        Prompter(processor, model_config, min_pixels=2000, max_pixels=1000)


def test_windows_pads(processor, model_config):
    prompt = Prompter(processor, model_config, windows=5)(make_sample())
    assert prompt.vision.patches.shape[0] == 5


def test_pixel_limits_reach_the_processor(processor, model_config):
    small = Prompter(processor, model_config, min_pixels=28 * 28, max_pixels=56 * 56)
    prompt = small(make_sample(images=(png(280, 280),)))
    assert prompt.grid_thw.tolist() == [[1, 4, 4]]


def test_cot_pools_are_ten_and_ten():
    for pool in (prompts.FREE_FORM, prompts.CLOSED_FORM):
        assert len(set(pool.first)) == len(set(pool.second)) == 10
        assert all("\\boxed{" in sentence for sentence in pool.second)
    assert all(
        "<think>\n" in s and "\n</think>\n<answer>\n" in s and "\n</answer>" in s
        for s in prompts.CLOSED_FORM.second
    )
    assert not any("<think>" in s for s in prompts.FREE_FORM.first + prompts.FREE_FORM.second)


def test_cot_is_chosen_by_seed_sample_and_step_alone(processor, model_config, prompter):
    sample = make_sample()
    assert prompter.text(sample) == Prompter(processor, model_config).text(sample)
    steps = {prompter.text(sample, step) for step in range(60)}
    others = {prompter.text(make_sample(id=str(k))) for k in range(60)}
    seeds = {Prompter(processor, model_config, seed=k).text(sample) for k in range(60)}
    assert min(map(len, (steps, others, seeds))) > 30


def test_cot_form_follows_the_format_ratio(prompter, processor, model_config):
    closed = make_sample()
    free = make_sample(reward=dataclasses.replace(closed.reward, format_ratio=0.0))
    assert "<think>\n...\n</think>\n<answer>\n\\boxed{}\n</answer>" in prompter.text(closed)
    assert "<think>" not in prompter.text(free)
    assert "How many?\n\n" in prompter.text(free)
    silent = Prompter(processor, model_config, cot=False)
    assert "How many?<|im_end|>" in silent.text(closed)
    boxes = make_sample(verifier="detection", reward=dataclasses.replace(free.reward, verifier="x"))
    assert "How many?<|im_end|>" in prompter.text(boxes)


def test_cot_goes_to_the_last_message(prompter):
    turns = (Message("user", "<image>Hi"), Message("assistant", "Yes?"), Message("user", "Count."))
    text = prompter.text(make_sample(messages=turns))
    assert "<|image_pad|><|vision_end|>Hi<|im_end|>" in text
    assert "assistant\nYes?<|im_end|>" in text
    assert "Count.\n\n" in text


def test_completions(prompter, processor):
    ids = prompter.encode_completion("It is \\boxed{4}")
    assert ids.dtype == np.int32
    assert ids[-1] == prompter.stop_ids[0] == processor.tokenizer.eos_token_id
    assert prompter.decode(ids) == "It is \\boxed{4}"
    assert prompter.decode([]) == ""
    assert prompter.pad_id in prompter.stop_ids
    tokens = processor.tokenizer.convert_ids_to_tokens(list(prompter.banned_ids))
    assert tokens == ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]


def test_placeholder_in_the_question(prompter):
    with pytest.raises(UserError, match=r"sample 7 of toy: .*2 image placeholders for 1 images"):
        prompter(make_sample("<image> What does <|image_pad|> mean?"))


def test_tokenizer_of_another_checkpoint(processor, model_config):
    other = dataclasses.replace(model_config, image_token_id=5)
    with pytest.raises(UserError, match=r"<\|image_pad\|> is \d+, the model's is 5"):
        Prompter(processor, other)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("image_mean", [0.5, 0.5, 0.5], "image_mean is .* this model's"),
        ("image_std", [0.5], "image_std is .* this model's"),
        ("image_std", None, "image_std is None, this model's"),
        ("rescale_factor", 1.0, "rescale_factor is 1.0, this model's"),
        ("rescale_factor", None, "rescale_factor is None, this model's"),
        ("patch_size", 16, "patch_size is 16, this model's 14"),
        ("temporal_patch_size", 1, "temporal_patch_size is 1, this model's 2"),
        ("merge_size", 1, "merge_size is 1, this model's 2"),
        ("do_resize", False, "do_resize is False, this model's True"),
        ("do_normalize", False, "do_normalize is False, this model's True"),
        ("resample", None, "resample is None; expected the number of a filter"),
        ("size", 448, "size is .*, without the areas shortest_edge and longest_edge"),
        ("size", {"height": 448, "width": 448}, "size is .*, without the areas shortest_edge"),
    ],
)
def test_a_processor_that_makes_other_patches(
    model_config, processor_folder, tmp_path, name, value, message
):
    folder = shutil.copytree(processor_folder, tmp_path / "copy")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings = {k: v for k, v in settings.items() if "pixels" not in k} | {name: value}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = load_processor(folder)
    with pytest.raises(UserError, match=f"^the image processor's {message}"):
        Prompter(processor, model_config)
