"""A model of 32 dimensions, a batch of 8 rows with images and padding, and an update for them."""

import functools

import jax
import numpy as np

from vtriune_jax import models, optim, sharding
from vtriune_jax.models import ModelConfig, TextConfig, VisionConfig, layout
from vtriune_jax.rl.losses import LossConfig
from vtriune_jax.rl.update import init_state, make_update
from vtriune_jax.types import Batch

ROWS, PROMPT, COMPLETION, SOURCES = 8, 12, 6, 3
CONFIG = ModelConfig(
    vision=VisionConfig(
        depth=2, embed=16, mlp=24, heads=2, out=32, full_attention=(1,), patch_size=2, window_size=8
    ),
    text=TextConfig(
        vocab=64, embed=32, mlp=48, layers=2, heads=4, kv_heads=2, mrope_section=(2, 1, 1)
    ),
    image_token_id=60,
    video_token_id=61,
    vision_start_token_id=62,
    vision_end_token_id=63,
    tied=True,
)
GRPO = LossConfig(old="rollout", banned_ids=CONFIG.banned_ids)
SFT = LossConfig(kind="sft", banned_ids=CONFIG.banned_ids)
FREEZE = ("^visual/",)
# A large eps: with a small one Adam turns the rounding noise of a zero gradient into a step.
TX = optim.make_optimizer(optim.OptimConfig(learning_rate=1e-2, eps=1e-2))


@functools.cache
def model(config=CONFIG):
    """→ (graphdef, params on the host)"""
    graphdef, params = models.split(models.init(config, seed=0))
    return graphdef, jax.device_get(params)


def build(mesh=None, loss=GRPO, micro_batches=1, freeze=FREEZE, config=CONFIG):
    """→ (update, a fresh state, graphdef, mesh)"""
    mesh = sharding.make_mesh() if mesh is None else mesh
    graphdef, params = model(config)
    state = init_state(params, TX, mesh, freeze)
    update = make_update(
        graphdef,
        TX,
        loss,
        mesh,
        state,
        num_sources=SOURCES,
        freeze=freeze,
        micro_batches=micro_batches,
    )
    return update, state, graphdef, mesh


def make_batch(rows=ROWS, seed=0, vision=False) -> Batch:
    """Left-padded prompts with one image of 4 units, right-padded completions, noisy log-probs."""
    rng = np.random.default_rng(seed)
    tokens = PROMPT + COMPLETION
    ids = rng.integers(0, 60, (rows, tokens)).astype(np.int32)
    ids[:, PROMPT - 6 : PROMPT - 2] = CONFIG.image_token_id
    place = np.arange(tokens)
    starts, ends = rng.integers(0, 4, rows), PROMPT + rng.integers(2, COMPLETION + 1, rows)
    segments = ((place >= starts[:, None]) & (place < ends[:, None])).astype(np.int32)
    positions = np.where(segments, place - starts[:, None], 0).astype(np.int32)
    grid = np.array([[1, 4, 4]])
    patches = rng.normal(size=(rows, 16, CONFIG.vision.patch)).astype(np.float32)
    packed = [layout.pack_vision(p, grid, CONFIG, windows=1) for p in patches]
    image_index = np.full((rows, tokens), -1, np.int32)
    image_index[:, PROMPT - 6 : PROMPT - 2] = [unit_index for _, unit_index in packed]
    features = rng.normal(size=(rows, 4, CONFIG.text.embed)).astype(np.float32)
    stacked = layout.stack_visions([v for v, _ in packed], 1)
    own = np.random.default_rng([seed, 1])
    old_logps, reference_logps = own.normal(-4.15, 0.3, (2, rows, COMPLETION))
    return Batch(
        ids=ids,
        positions=np.repeat(positions[:, None], 3, 1),
        segments=segments,
        image_index=image_index,
        mask=segments[:, None, PROMPT:].astype(np.float32),
        advantages=np.repeat(rng.normal(size=(rows, 1, 1)), COMPLETION, 2).astype(np.float32),
        rollout_logps=rng.normal(-4.15, 0.3, (rows, 1, COMPLETION)).astype(np.float32),
        source=rng.integers(0, SOURCES, (rows, 1)).astype(np.int32),
        vision=jax.tree.map(lambda x: x[:, None], stacked) if vision else None,
        features=None if vision else features[:, None],
        old_logps=old_logps[:, None].astype(np.float32),
        reference_logps=reference_logps[:, None].astype(np.float32),
    )
