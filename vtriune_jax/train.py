"""The training run, top to bottom:

    data → prompts → rollout → verifiers → advantages → update → metrics → checkpoint
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vtriune_jax import metrics, models
from vtriune_jax.assemble import Parts, assemble
from vtriune_jax.checkpoint import Checkpointer
from vtriune_jax.data.mixture import Mixture
from vtriune_jax.data.packing import pack, split_batch, stack_vision
from vtriune_jax.evaluate import evaluate, items
from vtriune_jax.optim import OptimConfig, make_optimizer
from vtriune_jax.rl.advantages import group_advantages
from vtriune_jax.rl.losses import LossConfig
from vtriune_jax.rl.update import init_state, make_encode, make_update
from vtriune_jax.rollout.local import Sampling
from vtriune_jax.types import Completion, Group, Prompt, TrainState, Verdict
from vtriune_jax.writers import MetricsWriter


def run(config: ConfigDict, workdir: Path) -> None:
    """Runs the stages of the config in `workdir`, going on where an earlier run was ended."""
    with assemble(config, workdir) as parts, MetricsWriter(workdir) as writer:
        params = parts.params
        for stage in stages(config):
            params = run_stage(stage, params, parts, writer, workdir)
        
