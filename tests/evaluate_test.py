import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from vtriune_jax import sharding
from vtriune_jax.data.rows import Slots
from vtriune_jax.errors import UserError
from vtriune_jax.evaluate import evaluate, items, read_means, save_means
from vtriune_jax.failures import Failures
from vtriune_jax.metrics import SourceMean
from vtriune_jax.types import Completion, Group, Prompt, RewardConfig, Sample, Vision
from vtriune_jax.verifiers.in_process import InProcess

VISION = Vision(np.zeros((1, 16, 4)), np.zeros((1, 16, 2), int), np.ones((1, 16), int))


def make_sample(number: int) -> Sample:
    reward = RewardConfig("mathverify", f"\\boxed{{{number % 2}}}")
    return Sample("odd" if number % 2 else "even", str(number), (), (), reward)


def make_prompt(sample: Sample) -> Prompt:
    empty = np.zeros(2, np.int32)
    grid = np.array([[1, 4, 6], [1, 2, 2]])
    return Prompt(sample, empty, np.zeros((3, 2), np.int32), empty, VISION, grid)


class Engine:
    """Answers 0 always; remembers what it was asked and the keys."""

    def __init__(self):
        self.calls, self.keys = [], {}

    def generate(self, params, prompts, features, sampling, keys, prompt_tokens):
        self.calls.append((len(prompts), len(features), sampling, prompt_tokens))
        for prompt, key in zip(prompts, jax.random.key_data(keys).tolist(), strict=True):
            self.keys.setdefault(prompt.sample.id, key)
        nothing = np.zeros(0)
        return [Group(p, (Completion(nothing, nothing, "\\boxed{0}", "stop"),)) for p in prompts]


@pytest.fixture
def make_parts():
    """Seven held-out samples, and everything else as far as an evaluation looks at it."""
    with InProcess() as verifiers:

        def make(batch, on_bad_row="error"):
            keys = {"batch": batch, "temperature": 0.5, "iou_threshold": 0.5}
            return SimpleNamespace(
                config=SimpleNamespace(
                    eval=SimpleNamespace(**keys),
                    data=SimpleNamespace(threads=2, on_bad_row=on_bad_row),
                    seed=3,
                ),
                mesh=sharding.make_mesh(),
                slots=Slots(prompt_tokens=9, completion_tokens=4, windows=2, pad_id=0),
                model_config=SimpleNamespace(vision=SimpleNamespace(patch_size=14)),
                heldout=tuple(map(make_sample, range(7))),
                prompter=make_prompt,
                place=lambda params: params,
                encode=lambda params, prompts: prompts,
                engine=Engine(),
                served=None,
                verifiers=verifiers,
                failures=Failures(),
            )

        yield make


def test_every_sample_is_judged_once(make_parts):
    parts = make_parts(batch=3)
    heldout = evaluate(parts, {}, 7)
    assert [group.prompt.sample.id for group in heldout.groups] == list("0123456")
    assert [verdict.score for (verdict,) in heldout.verdicts] == [1, 0, 1, 0, 1, 0, 1]
    assert heldout.means() == {"even": SourceMean(1.0, 4), "odd": SourceMean(0.0, 3)}


def test_batches_have_one_shape_and_change_no_answer(make_parts):
    small, large = make_parts(batch=3), make_parts(batch=16)
    evaluate(small, {}, 7)
    evaluate(large, {}, 7)
    assert [call[:2] for call in small.engine.calls] == [(3, 3)] * 3
    assert [call[:2] for call in large.engine.calls] == [(16, 16)]
    assert small.engine.keys == large.engine.keys
    assert len(set(map(tuple, small.engine.keys.values()))) == 7
    *_, sampling, prompt_tokens = small.engine.calls[0]
    assert (sampling.n, sampling.temperature, sampling.max_tokens) == (1, 0.5, 4)
    assert prompt_tokens == 9


def test_nothing_to_evaluate(make_parts):
    parts = make_parts(batch=3)
    parts.heldout = ()
    assert evaluate(parts, {}, 7).means() == {}


class Picky:
    """A prompter that cannot make anything of some samples."""

    def __init__(self, broken):
        self.broken = broken

    def __call__(self, sample):
        if sample.id in self.broken:
            raise UserError(f"sample {sample.id} is broken")
        return make_prompt(sample)


def test_bad_samples_are_left_out_and_told_of(make_parts, capsys):
    parts = make_parts(batch=3, on_bad_row="skip")
    parts.prompter = Picky("1345")  # the second chunk has nothing left
    heldout = evaluate(parts, {}, 7)
    assert [group.prompt.sample.id for group in heldout.groups] == list("026")
    assert [len(judged) for judged in heldout.verdicts] == [1, 1, 1]
    assert [call[0] for call in parts.engine.calls] == [3, 3]
    told = "held-out: bad rows skipped: 4, the first: sample 1 is broken\n"
    assert capsys.readouterr().out == told


def test_a_bad_sample_is_an_error(make_parts):
    parts = make_parts(batch=3)
    parts.prompter = Picky("5")
    with pytest.raises(UserError, match="sample 5 is broken"):
        evaluate(parts, {}, 7)


def test_samples_larger_than_their_slots_are_bad(make_parts):
    parts = make_parts(batch=3)
    parts.slots = dataclasses.replace(parts.slots, prompt_tokens=1)
    with pytest.raises(UserError, match=r"sample 0 of .*: the prompt has 2 tokens, its slot 1"):
        evaluate(parts, {}, 7)


def test_only_bad_samples_are_an_error(make_parts):
    parts = make_parts(batch=3, on_bad_row="skip")
    parts.prompter = Picky("0123456")
    with pytest.raises(UserError, match=r"no held-out row can be used, the first .*sample 0 is"):
        evaluate(parts, {}, 7)


def test_a_first_evaluation_in_which_nothing_is_judged_is_an_error(make_parts, capsys):
    parts = make_parts(batch=3)
    reward = RewardConfig("mathverify", "four")
    parts.heldout = [dataclasses.replace(s, reward=reward) for s in parts.heldout]
    with pytest.raises(UserError, match="none of 7 held-out completions could be judged, the firs"):
        evaluate(parts, {}, 0, first=True)
    parts.failures = Failures()
    capsys.readouterr()
    assert evaluate(parts, {}, 7).means()["odd"] == SourceMean(None, 0, 3)
    even, odd = capsys.readouterr().out.splitlines()
    assert even.startswith("verifier error in even, row 0: ValueError: math-verify cannot read the")
    assert odd.startswith("verifier error in odd, row 1: ")


def test_items_come_group_by_group_with_sizes_in_pixels(make_parts):
    prompts = [make_prompt(make_sample(n)) for n in (4, 5)]
    texts = [Completion(np.zeros(0), np.zeros(0), text, "stop") for text in "abc"]
    groups = [Group(prompts[0], tuple(texts[:2])), Group(prompts[1], (texts[2],))]
    found = items(groups, make_parts(1), progress=0.25, threshold=0.5)
    assert [item.completion for item in found] == ["a", "b", "c"]
    assert [item.reward for item in found] == [
        p.sample.reward for p in (*prompts[:1] * 2, prompts[1])
    ]
    assert {(item.progress, item.threshold, item.grid) for item in found} == {
        (0.25, 0.5, ((56, 84), (28, 28)))
    }


def test_means_on_disk(tmp_path):
    path = tmp_path / "before.json"
    assert read_means(path) is None
    means = {"a/b": SourceMean(0.1 + 0.2, 3, 1), "dead": SourceMean(None, 0, 4)}
    save_means(path, means)
    assert read_means(path) == means
    assert [file.name for file in tmp_path.iterdir()] == ["before.json"]
