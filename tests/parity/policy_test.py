"""Random models as policies against transformers: GRPO's sums and gradient, greedy completions.

One for each kind of input; `-m slow` draws twenty that get all kinds.
"""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
import pytest
from safetensors.numpy import save_file

from tests.parity.drawn import KINDS, draw_oracle, draw_rows
from tests.parity.oracle import END, IMAGE, START, VIDEO, Oracle, as_prompt, torch
from vtriune_jax import models, sharding
from vtriune_jax.data.packing import pack
from vtriune_jax.data.rows import Slots
from vtriune_jax.models import layout, weights
from vtriune_jax.rl.losses import LossConfig
from vtriune_jax.rl.update import init_state, make_update
from vtriune_jax.rollout.choice import Sampling
from vtriune_jax.rollout.local import LocalEngine
from vtriune_jax.types import Completion, Group, Prompt

CASES = [
    *enumerate(KINDS, 101),
    *(pytest.param((number, "all"), marks=pytest.mark.slow) for number in range(109, 129)),
]
TOKENS, SHORTEST, COPIES = 64, 5, 2
BANNED = (IMAGE, VIDEO, START, END)
LOSS = LossConfig(old="rollout", temperature=0.8, banned_ids=BANNED)


@dataclass(frozen=True)
class Case:
    """An oracle, its prompts as transformers takes them and as we do, and their features."""

    oracle: Oracle
    inputs: list[dict]
    prompts: list[Prompt]
    graphdef: Any
    params: Any
    features: Any

    @property
    def prompt_tokens(self):
        """The slot of the longest prompt."""
        return max(len(prompt.ids) for prompt in self.prompts)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "{}-{}".format(*case))
def case(request, tmp_path_factory):
    number, kind = request.param
    oracle = draw_oracle(number, tmp_path_factory.mktemp("drawn"), scale=6)
    rows = draw_rows(number, kind)
    inputs = [oracle.inputs([media], seed=number + row) for row, media in enumerate(rows)]
    prompts = [
        as_prompt(one, media, oracle.model.config) for one, media in zip(inputs, rows, strict=True)
    ]
    graphdef, params = models.split(oracle.model)
    windows = max(len(prompt.vision.segments) for prompt in prompts)
    visions = layout.stack_visions([prompt.vision for prompt in prompts], windows)
    features = models.encode(graphdef, params, visions)
    return Case(oracle, inputs, prompts, graphdef, params, features)


def test_greedy(case):
    engine = LocalEngine(case.graphdef, stop_ids=(), banned_ids=BANNED, pad_id=0, decode_text=str)
    groups = engine.generate(
        case.params,
        case.prompts,
        case.features,
        Sampling(max_tokens=TOKENS, n=1, temperature=0.0),
        jax.random.split(jax.random.key(0), len(case.prompts)),
        case.prompt_tokens,
    )
    for group, inputs in zip(groups, case.inputs, strict=True):
        completion = group.completions[0]
        expected = case.oracle.generate(inputs, TOKENS, suppress_tokens=list(BANNED))
        np.testing.assert_array_equal(completion.ids, expected)
        expected = torch_logps(case, inputs, group.prompt, completion.ids, temperature=1.0)
        np.testing.assert_allclose(completion.logps, expected.detach(), rtol=1e-3, atol=1e-4)


def test_grpo(case, tmp_path):
    """Clipped and unclipped tokens, left- and right-padded rows, prompts shared by completions."""
    groups, advantages = draw_completions(case)
    rows = [(group.prompt, one) for group in groups for one in group.completions]
    case.oracle.torch_model.zero_grad()
    by_row = []
    for row, (prompt, one) in enumerate(rows):
        inputs = case.inputs[row // COPIES]
        logps = torch_logps(case, inputs, prompt, one.ids, LOSS.temperature)
        by_row.append(torch_grpo(logps, torch.tensor(one.logps), float(advantages.flat[row])))
    tokens = sum(len(one.ids) for _, one in rows)
    (sum(loss for loss, _ in by_row) / tokens).backward()

    gradient, sums = our_gradient(case, groups, advantages)
    assert 0 < float(sums["clip_fraction"][0].sum()) < tokens
    # Every row is a data source of its own.
    for name, column in (("loss", 0), ("rollout_gap", 1)):
        expected = [row[column].item() for row in by_row]
        np.testing.assert_allclose(sums[name][0], expected, rtol=1e-3, atol=1e-4, err_msg=name)
    for path, expected in torch_gradient(case, tmp_path).items():
        scale = np.abs(expected).max()
        assert scale > 0, path
        np.testing.assert_allclose(
            gradient[path], expected, rtol=0, atol=1e-3 * scale, err_msg=path
        )


def draw_completions(case):
    """Random completions, with rollout log-probs around the real ones, and their advantages."""
    rng = np.random.default_rng(0)
    groups = []
    for inputs, prompt in zip(case.inputs, case.prompts, strict=True):
        completions = []
        for _ in range(COPIES):
            ids = rng.integers(0, 150, rng.integers(SHORTEST, 2 * SHORTEST)).astype(np.int32)
            logps = torch_logps(case, inputs, prompt, ids, LOSS.temperature).detach().numpy()
            noise = rng.normal(scale=0.3, size=len(ids))
            completions.append(Completion(ids, (logps + noise).astype(np.float32), "", "length"))
        groups.append(Group(prompt, tuple(completions)))
    return groups, rng.normal(size=(len(groups), COPIES)).astype(np.float32)


def torch_logps(case, inputs, prompt, ids, temperature):
    """Transformers' log-probs of a completion, without the ids that are never sampled."""
    whole = np.concatenate([prompt.ids, ids]).astype(np.int64)[None]
    whole = inputs | {"input_ids": whole, "attention_mask": np.ones_like(whole)}
    logits = case.oracle.torch_model(**case.oracle.torch_inputs(whole)).logits[0]
    logits = logits[len(prompt.ids) - 1 : -1] / temperature
    logits[:, list(BANNED)] = -torch.inf
    chosen = torch.from_numpy(ids.astype(np.int64))
    return logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]


def torch_grpo(logps, old, advantage):
    """The summed loss of one completion, and how far its log-probs are from the rollout's."""
    ratio = (logps - old).exp()
    clipped = ratio.clamp(1 - LOSS.clip_low, 1 + LOSS.clip_high)
    loss = -torch.minimum(advantage * ratio, advantage * clipped).sum()
    return loss, (logps - old).abs().sum()


def our_gradient(case, groups, advantages):
    """The gradient by the training step itself: its optimizer only remembers what it was given."""
    slots = Slots(case.prompt_tokens, 2 * SHORTEST, case.features.shape[1], pad_id=0)
    batch = pack(groups, advantages, 0 * advantages + 1, {"test": 0}, slots, case.features)
    rows = len(batch.ids)
    batch = jax.tree.map(np.asarray, batch)
    batch.source[:, 0] = np.arange(rows)
    remember = optax.chain(optax.trace(decay=0.0), optax.scale(0.0))
    mesh, freeze = sharding.make_mesh(devices=jax.devices()[:1]), ("^visual/",)
    state = init_state(case.params, remember, mesh, freeze)
    update = make_update(
        case.graphdef, remember, LOSS, mesh, state, num_sources=rows, freeze=freeze
    )
    state, sums = update(state, batch)
    return weights.flatten(state.opt_state[0].trace), sums


def torch_gradient(case, folder):
    """Transformers' gradients of the language parameters, read as if they were a checkpoint."""
    gradients = {
        name: parameter.grad.numpy()
        for name, parameter in case.oracle.torch_model.named_parameters()
        if not name.startswith("model.visual.")
    }
    save_file(gradients, folder / "model.safetensors")
    flat = weights.flatten(case.params)
    shapes = {path: leaf.shape for path, leaf in flat.items() if path.startswith("language/")}
    return weights.read(folder, shapes)
