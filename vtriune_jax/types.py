"""The data that crosses module borders, as frozen dataclasses, in the order of the pipeline.

    data → prompts → rollout → verifiers → advantages → update → metrics → checkpoint

Axis words, here and in every shape of the package: `rows tokens patches windows slots units heads
head_dim embed vocab layers groups samples boxes`. A *slot* is the place of one patch in a window; a
*unit* is a merged square of patches, i.e. one image token. Host-side classes hold NumPy arrays;
`Vision`, `Batch` and `TrainState` are pytrees and go to devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Num

# ---------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Message:
    """One chat turn; `content` holds the literal `<image>` once per image."""

    role: str
    content: str


@dataclass(frozen=True)
class RewardConfig:
    """How one row wants its completions judged (the row's `reward_model` field).

    reward = (accuracy_ratio · accuracy + format_ratio · format) / (accuracy_ratio + format_ratio)
    """

    verifier: str
    ground_truth: str
    answer: str = ""
    accuracy_ratio: float = 1.0
    format_ratio: float = 0.0
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One row of the V-Triune schema; `images` stay encoded (PNG, JPEG, …) until needed."""

    data_source: str
    id: str
    images: tuple[bytes, ...]
    messages: tuple[Message, ...]
    reward: RewardConfig
    ability: str = ""
    demonstration: str = ""
    """What SFT imitates: `extra_info.demonstration`, else `reward_model.ground_truth`."""
    where: str = field(default="", compare=False, repr=False)
    """The file and the row, for errors; ids are the user's own, and may repeat."""

    @property
    def place(self) -> str:
        """How errors name it."""
        return self.where or f"sample {self.id} of {self.data_source}"


# ------------------------------------------------------------------------------------- prompts


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Vision:
    """The images of a row (or of several, with leading axes), cut into windows of the ViT.

    Edge windows are padded, so that the shapes are static; `segments` is 0 in the padding and
    counts the image frames of the row from 1. Slots of one unit (2×2 patches) are neighbours.
    """

    patches: Num[Array, "*rows windows slots patch"] | np.ndarray
    """Bytes of pixels, which the vision tower normalises, or floats that are normalised already."""
    positions: Int[Array, "*rows windows slots 2"] | np.ndarray
    """(row, column) of each patch in its image, for the rotary embedding."""
    segments: Int[Array, "*rows windows slots"] | np.ndarray


@dataclass(frozen=True)
class Prompt:
    """A sample as the model reads it: token ids with one placeholder per image unit."""

    sample: Sample
    ids: np.ndarray
    """[tokens] int32"""
    positions: np.ndarray
    """[3, tokens] int32, the M-RoPE positions (time, height, width)."""
    image_index: np.ndarray
    """[tokens] int32: the place of the token's feature in the encoded units of this row, or -1."""
    vision: Vision
    """Without leading axes; zero windows for a prompt without images."""
    grid_thw: np.ndarray
    """[images, 3] int32: frames, rows and columns of patches."""


# ------------------------------------------------------------------------------------- rollout


@dataclass(frozen=True)
class Completion:
    """What was sampled for a prompt: these ids are trained on, the text is only for verifiers."""

    ids: np.ndarray
    """[tokens] int32, the stop token included when there is one."""
    logps: np.ndarray
    """[tokens] float32, of the sampling distribution."""
    text: str
    finish: Literal["stop", "length", "abort"]
    """`abort`: it was interrupted, and can be continued."""
    versions: tuple[tuple[str | int, int, int], ...] = ()
    """(version of the weights, from token, to token) in order, where the engine tells."""


@dataclass(frozen=True)
class Group:
    """A prompt and its n completions."""

    prompt: Prompt
    completions: tuple[Completion, ...]


# ----------------------------------------------------------------------------------- verifiers


@dataclass(frozen=True)
class Verdict:
    """The judgement of one completion; `score` and `parts` mean something only if it is ok."""

    status: Literal["ok", "timeout", "error"]
    score: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)
    """`accuracy`, `format`, and what else the verifier reports (`iou_50`, `map`, …)."""
    reason: str = ""


# -------------------------------------------------------------------------------------- update


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Rows of static shape: prompts and n completions in each (`data.rows`).

    Where `predictors` is None the last n · completion tokens of a row are n slots, one for each
    completion, and all before them is one prompt. A row of padding has segment 0 and mask 0
    throughout.
    """

    ids: Int[Array, "rows tokens"] | np.ndarray
    positions: Int[Array, "rows 3 tokens"] | np.ndarray
    segments: Int[Array, "rows tokens"] | np.ndarray
    """0 in the padding; tokens see earlier tokens of their own segment, but not of other slots."""
    image_index: Int[Array, "rows tokens"] | np.ndarray
    """The place of the token's feature among the encoded units of its prompt, or -1. The prompt of
    segment s is the s-th of the row."""
    mask: Float[Array, "rows n completion"] | np.ndarray
    """1 where the token is trained on."""
    advantages: Float[Array, "rows n completion"] | np.ndarray
    rollout_logps: Float[Array, "rows n completion"] | np.ndarray
    source: Int[Array, "rows n"] | np.ndarray
    """Index of the completion's data source, for metrics."""
    predictors: Int[Array, "rows n completion"] | np.ndarray | None = None
    """Of packed rows: the place of the token before each token of a completion."""
    vision: Vision | None = None
    """Patches [rows, prompts, …], when the vision tower is trained …"""
    features: Float[Array, "rows prompts units embed"] | None = None
    """… or its output, encoded once per prompt, when it is frozen."""
    old_logps: Float[Array, "rows n completion"] | None = None
    """The trainer's before the first update of a step, where its loss needs them; NaN in this one,
    whose own they are."""
    reference_logps: Float[Array, "rows n completion"] | None = None
    """The reference model's, where there is a penalty on the distance from it."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What the update changes."""

    step: Int[Array, ""]
    params: Any
    opt_state: Any
