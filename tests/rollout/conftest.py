"""A tiny checkpoint for rollouts, and real servers of it."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest
from flax import nnx

from configs import base
from tests.rollout.made_up import write_folder
from tests.rollout.real_sglang import Fleet, serve
from vtriune_jax import export, models, tiny
from vtriune_jax.data import digits
from vtriune_jax.models import weights


class Served(NamedTuple):
    """A model and the folder that was exported from it."""

    folder: Path
    config: models.ModelConfig
    graphdef: nnx.GraphDef
    params: Any


def exported(folder: Path, source: Path, model: models.Qwen2_5_VL, scale: float) -> Served:
    """Exports the model with larger matrices, so that greedy text does not fall into a rut.

    The scales in use are ones at which rounding of the weights moves log-probs least.
    """
    graphdef, params = models.split(model)
    params = jax.tree.map(lambda leaf: leaf * scale if leaf.ndim > 1 else leaf, params)
    flat = weights.flatten(params)
    export.write_folder(folder, source, model.config, flat.__getitem__)
    return Served(folder, model.config, graphdef, params)


@pytest.fixture(scope="session")
def served_versions(tmp_path_factory) -> tuple[Served, Served]:
    """Two versions of one tiny model: what servers start with, and what they can be updated to."""
    home = tmp_path_factory.mktemp("served")
    sizes = base.get_config().model.tiny
    sizes.vocab_size, sizes.hidden, sizes.intermediate, sizes.layers = 400, 64, 96, 2
    sizes.mrope_section = (2, 3, 3)
    sizes.vision_hidden, sizes.vision_intermediate, sizes.vision_depth = 32, 48, 2
    sizes.full_attention_layers = (1,)
    source = tiny.ensure_tiny(home / "tiny", sizes, digits.texts(), seed=0)
    model = models.load_pretrained(source)
    return exported(home / "first", source, model, 6.0), exported(
        home / "second", source, model, 8.0
    )


@pytest.fixture(scope="session")
def made_up_folders(tmp_path_factory) -> tuple[Path, Path]:
    """For fake servers: two checkpoints that differ in the language model and the tower."""
    home = tmp_path_factory.mktemp("made-up")
    return write_folder(home / "first", 1, 1), write_folder(home / "second", 2, 2)


@pytest.fixture(scope="session")
def real_server(served_versions, tmp_path_factory) -> Fleet:
    """One real server of the first version, shared: who changes its weights puts them back."""
    with serve(served_versions[0].folder, tmp_path_factory.mktemp("fleet")) as fleet:
        yield fleet
