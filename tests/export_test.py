"""A run's checkpoint as a Hugging Face folder."""

import io
import json
import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import base
from vtriune_jax import export as module
from vtriune_jax import models, sharding, tiny
from vtriune_jax.checkpoint import Checkpointer
from vtriune_jax.data import images
from vtriune_jax.data.tokenizer import load_processor
from vtriune_jax.errors import UserError
from vtriune_jax.export import copy_processor, export, generation_config, main, write_folder
from vtriune_jax.models import weights
from vtriune_jax.optim import OptimConfig, make_optimizer
from vtriune_jax.rl.update import init_state
from vtriune_jax.workdir import record


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a run, as far as a checkpoint of sft and two of grpo, and their models."""
    workdir = tmp_path_factory.mktemp("export") / "run"
    config = base.get_config()
    sizes = config.model.tiny
    sizes.vocab_size, sizes.layers, sizes.vision_depth = 400, 2, 1
    sizes.full_attention_layers = ()
    record(config, workdir)
    tiny.ensure_tiny(workdir / "model", sizes, ["Where are the dogs?"], 0)
    start = models.load_pretrained(workdir / "model")
    graphdef, params = models.split(start)
    saved = {}
    for stage, steps in (("sft", [2]), ("grpo", [1, 2])):
        with Checkpointer(workdir / "checkpoints" / stage, every=1, keep=2) as checkpoints:
            for step in steps:
                moved = jax.tree.map(lambda leaf: leaf + 0.1 * len(saved), params)
                saved[stage, step] = models.merge(graphdef, moved)
                state = init_state(moved, make_optimizer(OptimConfig()), sharding.make_mesh())
                checkpoints.save(step, state, {})
    return workdir, saved


def assert_same(model, other):
    jax.tree.map(np.testing.assert_array_equal, models.split(model)[1], models.split(other)[1])


def test_the_newest_step_of_the_last_stage(run, tmp_path, capsys):
    workdir, saved = run
    out = tmp_path / "deep" / "out"
    assert main([f"--checkpoint={workdir}", f"--out={out}"]) == 0
    assert capsys.readouterr().out == f"{out} has the model of grpo step 2, as float32\n"
    assert_same(models.load_pretrained(out), saved["grpo", 2])
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(("stage", "step", "found"), [("sft", None, 2), ("grpo", 1, 1)])
def test_another_stage_or_step(run, tmp_path, stage, step, found):
    workdir, saved = run
    assert export(workdir, tmp_path, stage=stage, step=step).startswith(f"{stage} step {found}")
    assert_same(models.load_pretrained(tmp_path), saved[stage, found])


def torch_logits(folder, dtype, inputs):
    """What transformers makes of a folder, all keys of which it must know."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch and transformers warn about their own deprecations
        import torch
        from transformers import Qwen2_5_VLForConditionalGeneration

    model, loading = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    assert not any(loading.values())
    with torch.no_grad():
        return model, model(input_ids=torch.from_numpy(inputs)).logits.float().numpy()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_has_the_same_logits(run, tmp_path, dtype):
    workdir, saved = run
    export(workdir, tmp_path, dtype=dtype)
    ids = np.arange(40, 72).reshape(2, 16)
    model, theirs = torch_logits(tmp_path, "auto", ids)
    assert str(model.dtype) == f"torch.{dtype}"
    ours = models.load_pretrained(tmp_path, param_dtype=dtype)
    expected = jax.tree.map(lambda leaf: leaf.astype(dtype), models.split(saved["grpo", 2])[1])
    jax.tree.map(np.testing.assert_array_equal, models.split(ours)[1], expected)
    if dtype == "bfloat16":  # compare the weights, not how each rounds in between
        _, theirs = torch_logits(tmp_path, "float32", ids)
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    logits = models.forward(models.load_pretrained(tmp_path), inputs)
    np.testing.assert_allclose(logits, theirs, atol=2e-4)


def test_the_folder_has_all_that_a_user_needs(run, tmp_path):
    workdir, _ = run
    export(workdir, tmp_path)
    tokenizer = load_processor(tmp_path).tokenizer
    written = json.loads((tmp_path / "generation_config.json").read_text())
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert written == {"bos_token_id": pad, "eos_token_id": end, "pad_token_id": pad}
    model, _ = torch_logits(tmp_path, "float32", np.ones((1, 4), int))
    assert model.generation_config.eos_token_id == end


def test_ids_that_a_model_does_not_name(run):
    config = models.load_pretrained(run[0] / "model").config
    text = {**vars(config.text), "bos_token_id": None, "eos_token_id": (5, 6)}
    config = models.ModelConfig(**{**vars(config), "text": models.TextConfig(**text)})
    assert generation_config(config) == {
        "eos_token_id": (5, 6),
        "pad_token_id": config.text.pad_token_id,
    }


def test_processor_files_are_copied_and_nothing_else(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    (source / "merges.txt").mkdir(parents=True)
    wanted = ["tokenizer.json", "generation_config.json"]
    others = ["pytorch_model.bin", "model.safetensors", "config.json", "README.md", ".part"]
    for name in [*wanted, *others]:
        (source / name).write_text(name)
    copy_processor(source, target, {"min_pixels": 3})
    assert sorted(file.name for file in target.iterdir()) == sorted(wanted)


@pytest.mark.parametrize("saved_by", ["hub", "transformers"])
@pytest.mark.parametrize(
    "limits", [{"min_pixels": 128 * 128, "max_pixels": None}, {"max_pixels": 56 * 56}, {}]
)
def test_the_processor_has_the_runs_limits_of_pixels(run, tmp_path, saved_by, limits):
    source, target = run[0] / "model", tmp_path / "target"
    target.mkdir()
    if saved_by == "transformers":
        source = tmp_path / "source"
        load_processor(run[0] / "model").save_pretrained(source)
        assert not (source / "preprocessor_config.json").exists()
    copy_processor(source, target, limits)
    before, after = (load_processor(folder).image_processor for folder in (source, target))
    picture = Image.fromarray(np.zeros((100, 100, 3), np.uint8))
    theirs = after(picture, return_tensors="np")["image_grid_thw"]
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    trained_on = images.patches([buffer.getvalue()], before, "", **limits)[1]
    np.testing.assert_array_equal(theirs, trained_on)


@pytest.mark.parametrize("target", ["elsewhere", "nowhere"])
def test_a_link_to_a_folder_stays(parts, tmp_path, target):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "disk" / "link"
    link.parent.mkdir()
    link.symlink_to(tmp_path / target)
    for _ in range(2):
        write_folder(link, *parts, replace=True)
        assert [path.name for path in link.parent.iterdir()] == ["link"]
        assert (tmp_path / target / "config.json").exists()
        assert link.is_symlink()


def test_parameters_are_read_one_by_one(run, tmp_path, monkeypatch):
    """The others, and the optimizer's moments, are not in memory meanwhile."""
    workdir, _ = run
    handler = module.read_params.__globals__["ocp"].PyTreeCheckpointHandler
    restore, sizes = handler.restore, []

    def note(*args, **kwargs):
        found = restore(*args, **kwargs)
        sizes.append(len(jax.tree.leaves(found)))
        return found

    monkeypatch.setattr(handler, "restore", note)
    export(workdir, tmp_path)
    params = models.split(models.load_pretrained(tmp_path))[1]
    assert sizes == [1] * len(jax.tree.leaves(params))


def test_a_folder_with_files_stays(run, tmp_path):
    workdir, _ = run
    (tmp_path / "mine").write_text("")
    for out in (tmp_path, tmp_path / "mine"):
        with pytest.raises(UserError, match="exists and is not an empty folder"):
            export(workdir, out)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


class Killed(BaseException):
    pass


@pytest.fixture
def parts(run):
    """The arguments of `write_folder` behind the first."""
    workdir, saved = run
    model = saved["sft", 2]
    flat = weights.flatten(models.split(model)[1])
    return workdir / "model", model.config, flat.__getitem__, {}


def test_a_failure_leaves_nothing(parts, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def fails(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, "copy_processor", fails)
        with pytest.raises(Killed):
            write_folder(out, *parts)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part" / "left.safetensors").write_text("of a process that was killed")
    write_folder(out, *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (out / "left.safetensors").exists()


def test_replacing_an_earlier_folder(parts, tmp_path):
    (tmp_path / "old").write_text("")
    write_folder(tmp_path, *parts, replace=True)
    assert (tmp_path / "config.json").exists()
    assert not (tmp_path / "old").exists()


@pytest.mark.parametrize("failure", [Killed, OSError(5, "Input/output error")])
def test_an_earlier_folder_outlives_a_failure(parts, tmp_path, monkeypatch, failure):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("")
    rename = Path.rename

    def fails(path, target):
        if path.name == ".out.part":
            raise failure
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(UserError if isinstance(failure, OSError) else Killed):
        write_folder(out, *parts, replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "old").exists()


@pytest.mark.parametrize("replace", [False, True])
def test_an_earlier_folder_outlives_a_kill(parts, tmp_path, monkeypatch, replace):
    """Between its two renames, and the failure of the next call."""
    out = tmp_path / "out"
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "old").write_text("")
    (tmp_path / ".out.part").mkdir()

    def fails(*_, **__):
        raise Killed

    monkeypatch.setattr(module.pretrained, "save_params", fails)
    with pytest.raises(Killed if replace else UserError):
        write_folder(out, *parts, replace=replace)
    assert (out / "old").exists()


def test_a_folder_that_cannot_be_written(parts, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_folder(tmp_path / "file" / "out", *parts)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out=x"], "error: --checkpoint=runs/NAME is missing (--help shows all flags)"),
        (["--checkpoint={run}"], "error: --out=FOLDER is missing (--help shows all flags)"),
        (["--checkpoint={run}", "--out=x", "y"], "error: 'y' is not a flag: write --name=value"),
        (
            ["--checkpoint={run}", "--out=x", "--steps=3"],
            "error: Unknown command line flag 'steps'",
        ),
        (["--checkpoint=/nowhere", "--out=x"], "error: cannot read /nowhere/config.json (No such"),
        (
            ["--checkpoint={run}/model", "--out=x"],
            "error: {run}/model/config.json is not of a run;",
        ),
        (
            ["--checkpoint={run}", "--out=x", "--stage=dpo"],
            "error: {run} has no checkpoint of --stage=dpo, only of ['sft', 'grpo']",
        ),
        (
            ["--checkpoint={run}", "--out=x", "--step=7"],
            "error: {run} has no checkpoint --step=7 of grpo: [1, 2]",
        ),
        (
            ["--checkpoint={run}", "--out=x", "--dtype=int8"],
            "error: dtype='int8' is unknown; choose 'float32' or 'bfloat16'",
        ),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    assert main([flag.format(run=run[0]) for flag in flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith(message.format(run=run[0]))
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help(capsys):
    assert main(["--help"]) == 0
    assert "--checkpoint=FOLDER" in capsys.readouterr().out


@pytest.fixture
def copied(run, tmp_path):
    """A copy of the run to damage."""
    shutil.copytree(run[0], tmp_path / "run")
    return tmp_path / "run"


def test_no_checkpoint_yet(copied, tmp_path):
    shutil.rmtree(copied / "checkpoints")
    with pytest.raises(UserError, match="has no checkpoint of sft or grpo yet"):
        export(copied, tmp_path / "out")


def test_a_relative_model_path_is_of_where_the_run_was_started(copied, tmp_path, monkeypatch):
    noted = copied / "config.json"
    noted.unlink()
    config = base.get_config()
    config.model.path = "model"
    with monkeypatch.context() as patch:
        patch.chdir(copied)
        record(config, copied)
    export(copied, tmp_path / "out")
    # A run that was moved, or is of a time when the folder was not noted.
    for folder in ({"started_in": "/nowhere"}, {}):
        keys = json.loads(noted.read_text())
        del keys["started_in"]
        noted.write_text(json.dumps(keys | folder))
        with pytest.raises(UserError, match=rf"{noted} has model.path='model'; export from"):
            export(copied, tmp_path / "other")
        with monkeypatch.context() as patch:
            patch.chdir(copied)
            export(copied, tmp_path / f"out{len(folder)}")


def test_a_checkpoint_of_another_model(copied, tmp_path):
    file = copied / "model" / "config.json"
    hf = json.loads(file.read_text())
    hf["text_config"]["num_hidden_layers"] = 1
    file.write_text(json.dumps(hf))
    with pytest.raises(UserError, match=r"is of another model: language/layers"):
        export(copied, tmp_path / "out")


def test_a_checkpoint_of_a_model_with_more_parameters(run):
    """Such as a head, where config.json has come to tie it."""
    workdir, saved = run
    shapes = {
        p: s.shape for p, s in weights.flatten(models.abstract(saved["sft", 2].config)[1]).items()
    }
    del shapes["language/norm/scale"]
    with pytest.raises(
        UserError, match=r"language/norm/scale is float32\[128\] there and absent by"
    ):
        module.read_params(workdir / "checkpoints" / "sft", 2, shapes, lambda *_: None)


def test_a_damaged_checkpoint(copied, tmp_path):
    state = copied / "checkpoints" / "grpo" / "2" / "state"
    shutil.rmtree(state / "d", ignore_errors=True)
    for file in state.rglob("*"):
        if file.is_file() and file.stat().st_size > 5000:
            file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"checkpoint .*grpo/2 cannot be read .*another step"):
        export(copied, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_each_parameter_goes_where_the_mesh_wants_it(run):
    workdir, saved = run
    config = saved["grpo", 1].config
    shapes = {p: s.shape for p, s in weights.flatten(models.abstract(config)[1]).items()}
    where = jnp.zeros(()).sharding
    read = module.read_params(workdir / "checkpoints" / "grpo", 1, shapes, lambda *_: where)
    kernel = read("language/layers/mlp/gate/kernel")
    expected = weights.flatten(models.split(saved["grpo", 1])[1])
    np.testing.assert_array_equal(kernel, expected["language/layers/mlp/gate/kernel"])
    assert kernel.sharding == where
