import io
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from configs import base
from vtriune_jax import models, tiny
from vtriune_jax.data.tokenizer import load_processor
from vtriune_jax.evaluate import HeldOut
from vtriune_jax.finish import finish, sample_view, sample_views
from vtriune_jax.metrics import SourceMean
from vtriune_jax.types import Completion, Group, Message, Prompt, RewardConfig, Sample, Verdict

TEXT = "A dog. <answer>\n[{'bbox_2d': [0, 14, 28, 56], 'label': 'Dog'}]\n</answer>"
TRUTH = "<answer>\n[{'bbox_2d': [250, 500, 500, 1000], 'label': 'dog'}]\n</answer>"
GRID = np.array([[1, 4, 8]])  # 56 × 112 pixels, height by width


def png(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), "gray").save(out, "PNG")
    return out.getvalue()


def make_group(source="boxes", number=0, normalized=True, images=None, truth=TRUTH) -> Group:
    reward = RewardConfig(
        "detection", truth, params={"det_verifier_normalized": normalized} if normalized else {}
    )
    images = (png(224, 28),) if images is None else images
    messages = (Message("system", "Be brief."), Message("user", "<image>Where?"))
    sample = Sample(source, f"{source}-{number}", images, messages, reward)
    prompt = Prompt(sample, *(np.zeros(0, np.int32),) * 3, vision=None, grid_thw=GRID)
    nothing = np.zeros(0)
    return Group(prompt, (Completion(nothing, nothing, TEXT, "stop"),))


OK = Verdict("ok", 0.5, {"accuracy": 0.5})


def test_boxes_are_drawn_in_pixels_of_the_stored_picture():
    """It is twice as wide and half as high as what the model saw."""
    view = sample_view(make_group(), OK, patch=14)
    assert view.image == png(224, 28)
    assert [(box.coords, box.label) for box in view.predicted] == [((0, 7, 56, 28), "dog")]
    assert [box.coords for box in view.true] == [(56, 14, 112, 28)]
    assert (view.prompt, view.completion, view.truth) == ("<image>Where?", TEXT, TRUTH)


def test_a_truth_in_pixels_of_the_processed_picture():
    view = sample_view(make_group(normalized=False, truth=TEXT), OK, patch=14)
    assert view.true == view.predicted


def test_no_picture_and_no_boxes():
    view = sample_view(make_group(images=(), truth="4"), OK, patch=14)
    assert (view.image, view.predicted, view.true) == (None, [], [])
    view = sample_view(make_group(truth="\\boxed{4}"), OK, patch=14)
    assert view.true == []


def make_parts(folder, samples=1, **more):
    return SimpleNamespace(
        config=SimpleNamespace(
            log=SimpleNamespace(samples=samples), stages=("sft", "grpo"), data={"min_pixels": 5000}
        ),
        checkpoint_path=folder,
        **{"model_config": SimpleNamespace(vision=SimpleNamespace(patch_size=14)), **more},
    )


def test_so_many_samples_of_every_source(tmp_path):
    groups = [make_group(source, k) for k in range(3) for source in ("b", "a")]
    heldout = HeldOut(groups, [[OK]] * 6, range(6))
    views = list(sample_views(heldout, make_parts(tmp_path, samples=2)))
    assert [view.source for view in views] == ["a", "a", "b", "b"]
    assert list(sample_views(heldout, make_parts(tmp_path, samples=0))) == []


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The workdir of a finished run of a tiny model, and that model."""
    folder = tmp_path_factory.mktemp("finish")
    sizes = base.get_config().model.tiny
    sizes.vocab_size, sizes.layers, sizes.vision_depth = 400, 1, 1
    sizes.full_attention_layers = ()
    tiny.ensure_tiny(folder / "model", sizes, ["Where are the dogs?"], 0)
    model = models.load_pretrained(folder / "model")
    _, params = models.split(model)
    heldout = HeldOut([make_group()], [[OK]], [0])
    before = {"boxes": SourceMean(0.25, 1)}
    parts = make_parts(folder / "model", model_config=model.config)
    finish(parts, folder / "run", params, before, heldout, steps=3, seconds=4.0)
    return folder / "run", model


def test_the_end_of_a_run_is_told(finished):
    workdir, _ = finished
    assert (workdir / "summary.json").exists()
    assert "boxes" in (workdir / "report.html").read_text()
    assert [file.name for file in (workdir / "samples").iterdir()] == ["01_boxes.png"]


def test_without_an_evaluation_there_is_no_table(finished, tmp_path, capsys):
    workdir, model = finished
    parts = make_parts(workdir.parent / "model", model_config=model.config)
    finish(parts, tmp_path, models.split(model)[1], {}, HeldOut([], [], []), steps=3, seconds=4.0)
    [line] = capsys.readouterr().out.splitlines()[1:]
    assert line.startswith(f"{tmp_path}/report.html has curves")


def test_the_trained_model_loads_here_and_in_transformers(finished):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch and transformers warn about their own deprecations
        import torch
        from transformers import Qwen2_5_VLForConditionalGeneration

    workdir, model = finished
    processor = load_processor(workdir / "final")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Dogs?"}]}]
    inputs = processor(
        text=[processor.apply_chat_template(chat, add_generation_prompt=True)],
        images=[Image.open(io.BytesIO(png(84, 56)))],
        return_tensors="np",
    )
    ours = models.forward(models.load_pretrained(workdir / "final"), inputs)
    np.testing.assert_array_equal(ours, models.forward(model, inputs))
    oracle, loading = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        workdir / "final", dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values())
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in inputs.items()}
    tensors["mm_token_type_ids"] = (tensors["input_ids"] == model.config.image_token_id).int()
    with torch.no_grad():
        theirs = oracle(**tensors).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=2e-4)
