"""The fake server with our own model behind it: true log-probs, of any checkpoint folder."""

from __future__ import annotations

import asyncio
import io
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.rollout.fake_models import (
    Draw,
    Expanded,
    Line,
    NoWeights,
    Settings,
    Shapes,
    read_headers,
)
from vtriune_jax import models
from vtriune_jax.data import images
from vtriune_jax.data.tokenizer import load_processor
from vtriune_jax.errors import UserError
from vtriune_jax.models import layout
from vtriune_jax.rollout.choice import Sampling
from vtriune_jax.rollout.local import LocalEngine
from vtriune_jax.types import Prompt, RewardConfig, Sample, Vision

BUCKET = 32
"""Prompts are padded to a multiple of this: few compilations."""


class Checkpoint:
    """Completions are planned whole by `LocalEngine`, and again from where they are after an
    update, which is what the real server does with retracted ones."""

    def __init__(self, settings: Settings, folder: Path):
        self.settings = settings
        self._processor = load_processor(folder).image_processor
        self._shapes = Shapes()
        self._features: dict[str, tuple[jax.Array, int]] = {}
        self._version, self._drawn = 0, 0
        self.load(folder)

    def load(self, folder: Path) -> None:
        """Take the weights of a folder."""
        self._shapes.check(read_headers(folder))
        try:
            model = models.load_pretrained(folder)
        except UserError as error:
            raise NoWeights(f"Failed to get weights iterator: {error}") from error
        self._graphdef, self._params = models.split(model)
        self._config = model.config
        self._version += 1
        if not self.settings.vision_cache:
            self._features.clear()

    def begin(self, prompt: Expanded, draw: Draw, n: int) -> list[Line]:
        """`n` completions of a prompt, planned together."""
        lines = [Line(prompt, draw) for _ in range(n)]
        self._plan(lines)
        return lines

    async def refresh(self, lines: Sequence[Line]) -> None:
        """Plan anew what was planned with other weights."""
        for line in lines:
            if line.state[0] != self._version:
                await asyncio.to_thread(self._plan, [line])

    def step(self, line: Line) -> tuple[int, float]:
        """The next id and its log-prob."""
        _, plan = line.state
        return plan.pop(0)

    def prompt_logps(self, prompt: Expanded) -> list[float]:
        """Of every id but the first, at temperature 1."""
        made = self._prompt(prompt, ())
        features = None
        if len(made.vision.segments):
            features = self._encoded(prompt, made.vision)
        logps = prompt_logps(
            self._graphdef,
            self._params,
            made.ids[None],
            made.positions[None],
            features,
            made.image_index[None],
        )
        return np.asarray(logps)[np.arange(len(prompt.ids) - 1), prompt.ids[1:]].tolist()

    def _plan(self, lines: Sequence[Line]) -> None:
        """All the remaining ids of lines of one prompt and one length."""
        line = lines[0]
        made = self._prompt(line.prompt, line.ids)
        tokens = -(-len(made.ids) // BUCKET) * BUCKET
        banned = tuple(i for i, bias in line.draw.bias if bias < -100)
        engine = LocalEngine(
            self._graphdef,
            stop_ids=sorted(line.draw.stop),
            banned_ids=banned,
            pad_id=0,
            decode_text=lambda ids: "",
        )
        sampling = Sampling(
            n=len(lines),
            temperature=line.draw.temperature,
            max_tokens=line.draw.max_new_tokens,  # more than are left: fewer compilations
        )
        features = None
        if len(made.vision.segments):
            features = self._encoded(line.prompt, made.vision)
        self._drawn += 1
        number = self._drawn
        if self.settings.by_prompt:
            number = zlib.crc32(repr((line.prompt.ids, line.prompt.hashes, line.ids)).encode())
        keys = jax.random.fold_in(jax.random.key(self.settings.seed), number)[None]
        groups = engine.generate(self._params, [made], features, sampling, keys, tokens)
        for each, completion in zip(lines, groups[0].completions, strict=True):
            plan = list(zip(completion.ids.tolist(), completion.logps.tolist(), strict=True))
            each.state = (self._version, plan)

    def _encoded(self, prompt: Expanded, vision: Vision) -> jax.Array:
        """The features of a prompt's images, old ones where the cache has them."""
        key = ",".join(prompt.hashes)
        features = self._features.get(key)
        if features is None:
            stacked = layout.stack_visions([vision], len(vision.segments))
            features = models.encode(self._graphdef, self._params, stacked), self._version
        if self.settings.vision_cache:
            self._features[key] = features
        return features[0]

    def _patches(self, prompt: Expanded) -> tuple[np.ndarray, np.ndarray]:
        files = []
        for picture in prompt.pictures:
            picture.save(buffer := io.BytesIO(), "PNG")
            files.append(buffer.getvalue())
        return images.patches(
            files,
            self._processor,
            "fake",
            min_pixels=self.settings.min_pixels,
            max_pixels=self.settings.max_pixels,
        )

    def _prompt(self, prompt: Expanded, more: Sequence[int]) -> Prompt:
        ids = np.array([*prompt.ids, *more], np.int32)
        patches, grid = self._patches(prompt)
        vision, units = layout.pack_vision(patches, grid, self._config)
        return Prompt(
            sample=Sample("fake", "fake", (), (), RewardConfig("none", "")),
            ids=ids,
            positions=layout.mrope_positions(ids, grid, self._config),
            image_index=layout.image_index(ids, units, self._config),
            vision=vision,
            grid_thw=grid,
        )


@partial(jax.jit, static_argnums=0)
def prompt_logps(
    graphdef: Any, params: Any, ids: Any, positions: Any, features: Any, image_index: Any
) -> jax.Array:
    """Log-probs of all that may follow each token."""
    model = models.merge(graphdef, params)
    hidden = model(ids, positions, jnp.ones_like(ids), features, image_index)
    return jax.nn.log_softmax(hidden[0] @ model.head(), axis=-1)
