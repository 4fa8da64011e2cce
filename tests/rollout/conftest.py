"""A tiny checkpoint for rollouts, and real servers of it."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orjson
import pytest
from flax import nnx

from configs import base
from tests.rollout.fake_models import Draw, Pseudo, Settings, expand
from tests.rollout.fake_sglang import FakeServer
from tests.rollout.made_up import BANNED, PAD, STOP, VOCAB, write_folder
from tests.rollout.real_sglang import Fleet, serve
from tests.rollout.syncing import publisher_of, until
from vtriune_jax import export, models, tiny
from vtriune_jax.data import digits
from vtriune_jax.models import weights
from vtriune_jax.rollout import fleet as rollout_fleet
from vtriune_jax.rollout.sync import WeightSync
from vtriune_jax.rollout.wire import BAN, wire_prompt


class Served(NamedTuple):
    """A model and the folder that was exported from it."""

    folder: Path
    config: models.ModelConfig
    graphdef: nnx.GraphDef
    params: Any


def exported(folder: Path, source: Path, model: models.Qwen2_5_VL, scale: float) -> Served:
    """Exports the model with larger matrices, so that greedy text does not fall into a rut.

    The seeds and scales in use are ones at which rounding moves log-probs little.
    """
    graphdef, params = models.split(model)
    params = jax.tree.map(lambda leaf: leaf * scale if leaf.ndim > 1 else leaf, params)
    flat = weights.flatten(params)
    export.write_folder(folder, source, model.config, flat.__getitem__, limits={})
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
    first = models.load_pretrained(source)
    second = models.init(first.config, seed=1)
    return (
        exported(home / "first", source, first, 6.0),
        exported(home / "second", source, second, 8.0),
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


@pytest.fixture
def server(made_up_folders):
    with FakeServer(model_path=made_up_folders[0], weight_version="v0") as server:
        yield server


@pytest.fixture
def pair(made_up_folders, server):
    with FakeServer(model_path=made_up_folders[0], weight_version="v0", random_seed=1) as other:
        yield server, other


@pytest.fixture(scope="session")
def oracle(made_up_folders):
    """oracle(prompt, ids) → their log-probs under the first folder's weights."""
    settings = Settings(VOCAB, PAD, frozenset([STOP]), 28 * 28, 28 * 28 * 1280)
    source = Pseudo(settings)
    source.load(made_up_folders[0])
    bias = tuple((i, BAN) for i in BANNED)

    def logps(prompt, ids, temperature=0.8):
        sent = wire_prompt(prompt, PAD, lambda prompt: prompt.sample.images)
        draw = Draw(temperature=temperature, bias=bias)
        images = orjson.loads(orjson.dumps(sent.images))
        (line,) = source.begin(expand(sent.ids, images, settings), draw, 1)
        source._uniform = lambda: 0.5
        found = []
        for i in ids.tolist():
            source.step(line)
            state = source._states(line.prompt)[-1]
            for before in line.ids:
                state = source._mix(state, before)
            found.append(source._table(state, line.draw)[0][i])
            line.ids.append(i)
            line.state = None
        return np.array(found, np.float32)

    return logps


@pytest.fixture
def served(served_versions):
    return served_versions[0]


@pytest.fixture
def start(served):
    """Starts fake servers of the first version, and ends them."""
    running = []

    def one(**flags):
        server = FakeServer(model_path=served.folder, **flags)
        running.append(server)
        server.start()
        return server

    yield one
    for server in running:
        server.kill()


@pytest.fixture
def fleet_of(start):
    """A fleet of so many servers, all ready."""
    fleets = []

    def make(count=2, servers=None, **flags):
        servers = servers or [start(**flags) for _ in range(count)]
        fleet = rollout_fleet.Fleet(
            [server.address for server in servers], backoff=0.05, health_timeout=2.0
        )
        fleets.append(fleet)
        until(lambda: all(server.works for server in fleet.servers()))
        return fleet, servers

    yield make
    for fleet in fleets:
        fleet.close()


@pytest.fixture
def sync_of(served, tmp_path):
    def make(fleet, **changes):
        return WeightSync(fleet, publisher_of(served, tmp_path / "out"), **changes)

    return make
