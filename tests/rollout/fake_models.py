"""Where the tokens of the fake server come from: a pseudo-model, or our own JAX model.

A source reads checkpoint folders, expands the images of a prompt, and draws token after token with
log-probs that belong to its present weights. `Pseudo` costs microseconds a token; its
distributions follow from (weights, ids so far, pixels) alone. `Checkpoint` computes the real ones.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

MASK = 2**64 - 1
ROWS = 256
"""Different distributions of the pseudo-model."""


class NoWeights(Exception):
    """There is no readable checkpoint: the server answers 400 and keeps what it has."""


class WrongShape(Exception):
    """A tensor has another shape than the model's: the real server dies of it."""


@dataclass
class Draw:
    """How one completion is drawn."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    stop: frozenset[int] = frozenset()
    bias: tuple[tuple[int, float], ...] = ()


@dataclass
class Expanded:
    """A prompt as the server holds it."""

    ids: list[int]
    """With one pad per unit of an image."""
    image_tokens: int = 0
    pictures: list[Image.Image] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    """Of the pixels after resizing."""


@dataclass(eq=False)
class Line:
    """One completion under way."""

    prompt: Expanded
    draw: Draw
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    state: Any = None
    """What the source keeps for it."""


@dataclass
class Settings:
    """What a server must know of its model."""

    vocab: int = 512
    image_pad: int = 500
    eos: frozenset[int] = frozenset()
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    seed: int = 0
    vision_cache: bool = True
    """As the real server's: images seen before keep their old embeddings after an update."""
    by_prompt: bool = False
    """Draws follow from the prompt alone, whoever asks and when (of a `Checkpoint`)."""


def settings_of(options: argparse.Namespace) -> Settings:
    """From the checkpoint folder where there is one, else made up."""
    settings = Settings(
        seed=options.seed,
        vision_cache=not options.no_vision_cache,
        by_prompt=options.by_prompt,
    )
    if not options.model_path:
        return settings
    folder = Path(options.model_path)
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config", config)
    settings.vocab, settings.image_pad = text["vocab_size"], config["image_token_id"]
    settings.eos = frozenset([text["eos_token_id"]])
    pixels = json.loads((folder / "preprocessor_config.json").read_text())
    settings.min_pixels, settings.max_pixels = pixels["min_pixels"], pixels["max_pixels"]
    return settings


def source_of(options: argparse.Namespace, settings: Settings) -> Any:
    """What `--responder` names, with the weights of `--model-path`."""
    if options.responder == "checkpoint":
        from tests.rollout.fake_checkpoint import Checkpoint

        return Checkpoint(settings, Path(options.model_path))
    source = Pseudo(settings)
    if options.model_path:
        source.load(Path(options.model_path))
    return source


def decoded(data: str) -> Image.Image:
    """Base64, or a data URL, as a picture; ValueError for anything else."""
    try:
        raw = base64.b64decode(data.split(",", 1)[1] if data.startswith("data:") else data)
        return Image.open(io.BytesIO(raw)).convert("RGB")
    except (AttributeError, OSError, ValueError) as error:
        raise ValueError(
            f"An exception occurred while loading IMAGE data at index 0: Error while loading data "
            f"{str(data)[:40]}...: {error}"
        ) from error


def resized(picture: Image.Image, settings: Settings, unit: int = 28) -> Image.Image:
    """As Qwen2-VL's processor: sides are multiples of 28, the area within the limits."""
    width, height = picture.size
    sides = [max(unit, round(side / unit) * unit) for side in picture.size]
    if sides[0] * sides[1] > settings.max_pixels:
        shrink = math.sqrt(width * height / settings.max_pixels)
        sides = [max(unit, math.floor(side / shrink / unit) * unit) for side in picture.size]
    elif sides[0] * sides[1] < settings.min_pixels:
        grow = math.sqrt(settings.min_pixels / (width * height))
        sides = [math.ceil(side * grow / unit) * unit for side in picture.size]
    size = (sides[0], sides[1])
    return picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC)


def expand(ids: Sequence[int], images: Sequence[str], settings: Settings) -> Expanded | None:
    """One pad per image → one per unit; None where the real server would hang for ever."""
    pictures = [resized(decoded(each), settings) for each in images]
    if list(ids).count(settings.image_pad) != len(pictures):
        return None
    units = [(p.width // 28) * (p.height // 28) for p in pictures]
    hashes = [hashlib.blake2b(p.tobytes(), digest_size=8).hexdigest() for p in pictures]
    out, left = [], iter(units)
    for i in ids:
        out += [i] * next(left) if i == settings.image_pad else [i]
    return Expanded(out, sum(units), pictures, hashes)


def read_headers(folder: Path) -> dict[str, tuple[Path, list[int], int, int]]:
    """Tensor → (file, shape, begin, end) of all safetensors of a folder."""
    files = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not files:
        raise NoWeights(
            "Failed to get weights iterator: Repo id must be in the form 'repo_name' or "
            f"'namespace/repo_name': '{folder}'. Use `repo_type` argument if needed.."
        )
    json.loads((folder / "config.json").read_text())
    tensors = {}
    for file in files:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            tensors[name] = (file, entry["shape"], 8 + size + begin, 8 + size + end)
    return tensors


class Shapes:
    """Remembers the shapes of the first checkpoint; another one's must be equal."""

    def __init__(self) -> None:
        self._shapes: dict[str, list[int]] = {}

    def check(self, tensors: dict[str, tuple[Path, list[int], int, int]]) -> None:
        """WrongShape for a tensor of another shape; a new or missing name is let through."""
        for name, (_, shape, _, _) in tensors.items():
            if self._shapes.setdefault(name, shape) != shape:
                raise WrongShape(f"{name}: {shape}, not {self._shapes[name]}")


class Pseudo:
    """Random but lawful: ROWS distributions, of which a hash of everything before chooses one."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self._shapes = Shapes()
        self._language = self._vision = 1
        self._cache: dict[str, int] = {}
        logits = np.random.default_rng(7).normal(0, 2, (ROWS, settings.vocab))
        self._logits = logits.astype(np.float64)
        self._tables: dict[tuple[int, Draw | None], tuple[np.ndarray, np.ndarray]] = {}
        self._draws: dict[tuple, Draw] = {}
        self._uniform = random.Random(settings.seed).random

    def load(self, folder: Path) -> None:
        """Take the weights of a folder: only their bytes matter."""
        tensors = read_headers(folder)
        self._shapes.check(tensors)
        sums = {True: hashlib.blake2b(digest_size=8), False: hashlib.blake2b(digest_size=8)}
        for name, (file, _, begin, end) in sorted(tensors.items()):
            with file.open("rb") as stream:
                stream.seek(begin)
                sums["visual" in name].update(name.encode() + stream.read(end - begin))
        self._vision = int.from_bytes(sums[True].digest(), "little")
        self._language = int.from_bytes(sums[False].digest(), "little")
        if not self.settings.vision_cache:
            self._cache.clear()

    def begin(self, prompt: Expanded, draw: Draw, n: int) -> list[Line]:
        """`n` completions of a prompt, nothing drawn yet."""
        key = (draw.max_new_tokens, draw.temperature, draw.stop, draw.bias)
        draw = self._draws.setdefault(key, draw)  # one object, so that tables are found again
        return [Line(prompt, draw) for _ in range(n)]

    async def refresh(self, lines: Sequence[Line]) -> None:
        """Nothing is planned ahead here."""

    def step(self, line: Line) -> tuple[int, float]:
        """The next id and its log-prob."""
        weights, state = line.state or (None, 0)
        if weights != (self._language, self._vision):
            weights = (self._language, self._vision)
            state = self._states(line.prompt)[-1]
            for i in line.ids:
                state = self._mix(state, i)
        logps, sums = self._table(state, line.draw)
        if line.draw.temperature == 0:
            chosen = int(logps.argmax())
        else:
            chosen = int(np.searchsorted(sums, self._uniform() * sums[-1], side="right"))
        line.state = (weights, self._mix(state, chosen))
        return chosen, float(logps[chosen])

    def prompt_logps(self, prompt: Expanded) -> list[float]:
        """Of every id but the first, at temperature 1."""
        states = self._states(prompt)
        return [
            float(self._table(state, None)[0][i])
            for state, i in zip(states, prompt.ids[1:], strict=False)
        ]

    def _states(self, prompt: Expanded) -> list[int]:
        """The hash behind each id of a prompt."""
        state, states = self._language, []
        for picture in prompt.hashes:
            embedding = self._mix(self._vision, int(picture, 16))
            if self.settings.vision_cache:
                embedding = self._cache.setdefault(picture, embedding)
            state = self._mix(state, embedding)
        for i in prompt.ids:
            state = self._mix(state, i)
            states.append(state)
        return states

    @staticmethod
    def _mix(state: int, value: int) -> int:
        state = (state * 6364136223846793005 + value * 2862933555777941757 + 3037000493) & MASK
        return state ^ (state >> 29)

    def _table(self, state: int, draw: Draw | None) -> tuple[np.ndarray, np.ndarray]:
        """Log-probs of a state, and their running sum."""
        key = ((state >> 17) % ROWS, draw and id(draw))
        if key not in self._tables:
            logits = self._logits[key[0]].copy()
            for i, bias in draw.bias if draw else ():
                logits[i] += bias
            logits = logits / ((draw.temperature if draw else 1.0) or 1.0)
            logps = logits - logits.max()
            logps -= np.log(np.exp(logps).sum())
            self._tables[key] = (logps, np.cumsum(np.exp(logps)))
        return self._tables[key]
