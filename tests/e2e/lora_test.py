"""A run with adapters: what it saves and writes, and that it goes on where it was ended."""

import json

import numpy as np
import pytest

from tests.e2e.runs import arguments, params, records, timeless
from vtriune_jax import collect
from vtriune_jax.export import export
from vtriune_jax.main import main

LORA = {
    "model_lora.rank": 4,
    "model_lora.alpha": 8.0,
    "model_lora.target": "attn/|mlp/down",
    "sft_lr": 1e-2,
    "grpo_lr": 1e-2,
}


@pytest.fixture(scope="module")
def keys(warm, data):
    return {"model_path": warm / "final", **LORA, **data}


@pytest.fixture(scope="module")
def whole(keys, tmp_path_factory):
    """The workdir of three steps of imitation and three of GRPO."""
    workdir = tmp_path_factory.mktemp("lora") / "run"
    assert main(arguments(workdir, **keys)) == 0
    return workdir


class PowerCutError(Exception):
    """Ends a run in the middle."""


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_run_that_was_ended_goes_on_as_if_not(whole, keys, stage, tmp_path, monkeypatch):
    def cut(of, step, *rest):
        if (of.name, step) == (stage, 2):
            raise PowerCutError
        return verify(of, step, *rest)

    verify = collect.verify
    with monkeypatch.context() as patch:
        patch.setattr(collect, "verify", cut)
        with pytest.raises(PowerCutError):
            main(arguments(tmp_path, **keys))
    assert main(arguments(tmp_path, **keys)) == 0
    for got, want in zip(records(tmp_path), records(whole), strict=True):
        assert timeless(got) == timeless(want)
    got, want = (path / "final" / "model.safetensors" for path in (tmp_path, whole))
    assert got.read_bytes() == want.read_bytes()


def test_only_the_adapted_matrices_have_moved(warm, whole):
    before, after = params(warm / "final"), params(whole / "final")
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    names = ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/down")
    assert moved == {f"language/layers/{name}/kernel" for name in names}
    assert all(line["grad_norm"] > 0 for line in records(whole))


def test_checkpoints_hold_adapters_and_their_moments_only(whole):
    [extra] = (whole / "checkpoints" / "grpo" / "3" / "extra").glob("metadata")
    layout = json.loads(extra.read_text())["layout"]
    arrays = {name for name, kind in layout.items() if not kind.endswith("[]")}
    assert len(arrays) == 3 * 2 * 5
    assert all("/lora/" in name for name in arrays)


@pytest.mark.parametrize("base_dtype", ["float32", "bfloat16"])
def test_an_export_is_the_final_folder(whole, keys, base_dtype, tmp_path):
    if base_dtype == "bfloat16":
        keys = {**keys, "model_lora.base_dtype": base_dtype, "stages": "sft", "sft_steps": 1}
        whole = tmp_path / "run"
        assert main(arguments(whole, **keys)) == 0
    assert export(whole, tmp_path / "out").endswith("as float32")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        got, want = (folder / name for folder in (tmp_path / "out", whole / "final"))
        assert got.read_bytes() == want.read_bytes()


def test_a_target_that_matches_nothing(keys, tmp_path, capsys):
    assert main(arguments(tmp_path, **{**keys, "model_lora.target": "conv"})) == 2
    assert "model.lora.target='conv' matches no matrix" in capsys.readouterr().err
    assert main(arguments(tmp_path, **{**keys, "model_lora.target": "("})) == 2
    assert "model.lora.target='(' must be a regular expression" in capsys.readouterr().err
