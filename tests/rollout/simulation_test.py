"""The simulation against what can be worked out on paper."""

import math
from dataclasses import replace

import numpy as np
import pytest

from vtriune_jax.errors import UserError
from vtriune_jax.rollout.simulation import lengths
from vtriune_jax.rollout.simulation.run import Run, Scenario, simulate, steady
from vtriune_jax.rollout.simulation.speeds import Speeds, read_decode
from vtriune_jax.rollout.simulation.split import best_split

# A token takes 0.01 s with one in flight and 0.02 s with 101: 0.01 + (n - 1) / 10,000.
SPEEDS = Speeds(decode=((1, 100.0), (101, 5050.0)), capacity=64, update=10.0, publish=2.0, load=1.0)
SCENARIO = Scenario(
    SPEEDS, lengths.constant(500), servers=8, prompts=64, samples=8, prompt_tokens=100, steps=8
)
ROLLOUT = 500 * (0.01 + 63 / 10_000)  # 64 completions a server
MIXED = replace(SCENARIO, lengths=lengths.log_normal(300, 0.8, 2000))


def step(scenario):
    return steady(simulate(scenario), scenario.ahead)


def speeds(scenario, **changes):
    return replace(scenario, speeds=replace(scenario.speeds, **changes))


def test_constant_lengths_on_policy_one_thing_after_the_other():
    found = step(SCENARIO)
    assert found["time/rollout"] == pytest.approx(ROLLOUT)
    assert found["time/step"] == pytest.approx(ROLLOUT + 10 + 2 + 1)
    assert found["idle/trainer"] == pytest.approx(ROLLOUT / (ROLLOUT + 13))
    assert found["idle/fleet"] == pytest.approx(13 / (ROLLOUT + 13))
    assert (found["staleness/mean"], found["staleness/max"]) == (0, 0)
    assert found["time/tail"] == 0


@pytest.mark.parametrize("update", [1.0, 4.0, 10.0])
def test_one_step_ahead_takes_the_longer_of_rollout_and_update(update):
    """The fleet stands still for the second of loading, if it is not done by then."""
    found = step(speeds(replace(SCENARIO, ahead=1), update=update))
    rollout = ROLLOUT + (1.0 if update + 2 < ROLLOUT else 0.0)
    assert found["time/step"] == pytest.approx(max(rollout, update + 3))
    assert found["time/wait"] == pytest.approx(max(rollout - update - 3, 0))
    assert found["staleness/max"] == 1


def test_tokens_after_an_update_in_flight_are_of_the_new_version():
    """Of ROLLOUT seconds the first update + publish are old."""
    found = step(speeds(replace(SCENARIO, ahead=1), update=1.0))
    assert found["staleness/mean"] == pytest.approx(3.0 / ROLLOUT)
    older = step(speeds(replace(SCENARIO, ahead=1), update=10.0))
    assert older["staleness/mean"] == pytest.approx(1.0)


@pytest.mark.parametrize("ahead", [0, 1, 2, 4])
def test_nothing_is_older_than_ahead(ahead):
    records = simulate(replace(MIXED, ahead=ahead))
    assert len(records) == MIXED.steps
    assert max(record["staleness/max"] for record in records) == ahead
    assert all(record["staleness/mean"] <= record["staleness/max"] for record in records)


def test_prompts_are_read_one_after_the_other():
    found = step(speeds(SCENARIO, prefill=1000.0))  # 8 prompts a server, 0.1 s each
    # Completions of the first prompts run alone meanwhile only where no prompt waits: none do.
    assert found["time/rollout"] == pytest.approx(0.8 + ROLLOUT)


def test_prompts_wait_for_room():
    """Two rounds of half as many."""
    found = step(speeds(SCENARIO, capacity=32))
    assert found["time/rollout"] == pytest.approx(2 * 500 * (0.01 + 31 / 10_000))


def test_a_prompt_larger_than_a_server_has_it_for_itself():
    found = step(speeds(SCENARIO, capacity=5))
    assert found["time/rollout"] == pytest.approx(8 * 500 * (0.01 + 7 / 10_000), rel=0.1)


def test_verdicts_come_after_the_rollout():
    found = step(speeds(SCENARIO, verify=0.1, verify_workers=4))
    assert found["time/verify"] == pytest.approx(512 * 0.1 / 4)


def test_every_prompt_is_trained_on_exactly_once_and_in_full():
    for scenario in (
        MIXED,
        replace(MIXED, ahead=1),
        replace(MIXED, ahead=3, over_sampling=0.25),
        replace(MIXED, over_sampling=0.5, carry=9),
        replace(MIXED, ahead=1, over_sampling=0.1, carry=9),
        speeds(replace(MIXED, ahead=2, over_sampling=0.3), capacity=16),
    ):
        run = Run(scenario)
        records = run.run()
        assert len(run.trained) == MIXED.steps * MIXED.prompts
        assert len(set(run.trained)) == len(run.trained)
        assert all(record["tokens"] > 0 for record in records)
        if not scenario.over_sampling:
            assert sorted(run.trained) == list(range(len(run.trained)))
            assert sum(record["interrupted_prompts"] for record in records) == 0


def test_tokens_are_counted_once_by_version():
    """Every token of a completion is booked on one version, whatever happens to it on its way."""
    scenario = speeds(replace(MIXED, ahead=2, over_sampling=0.3, carry=9), prefill=5000.0)
    run = Run(scenario)
    booked = []
    record = run._record

    def check(batch):
        for prompt in batch.chosen:
            booked.extend((sum(s.spans.values()), s.length) for s in prompt.sequences)
        return record(batch)

    run._record = check
    run.run()
    counted, known = np.array(booked).T
    assert len(counted) == MIXED.steps * MIXED.prompts * MIXED.samples
    np.testing.assert_allclose(counted, known, atol=0.01)


def test_interrupting_stragglers_shortens_the_tail():
    plain, over = step(MIXED), step(replace(MIXED, over_sampling=0.25))
    assert over["interrupted_prompts"] == 16
    assert over["time/tail"] < plain["time/tail"]
    assert over["staleness/max"] == 0  # interrupted ones begin anew


@pytest.mark.parametrize("carry", [1, 2])
def test_tokens_are_carried_over_up_to_an_age(carry):
    records = simulate(replace(MIXED, over_sampling=0.5, carry=carry, steps=20))
    assert 1 <= max(record["staleness/max"] for record in records) <= carry + 1


def test_the_place_of_an_interrupted_prompt_is_taken_at_once():
    """Steps want one of two prompts, on two servers with room for one each. When 10 tokens end the
    second step, the 1,000 beside them are interrupted, and both prompts of the third begin."""
    prompts = iter([10, 1000, 10, 1000, 10, 10, 10, 10, 10, 10])
    one_each = speeds(SCENARIO, capacity=8, update=100.0)
    scenario = replace(one_each, servers=2, prompts=1, over_sampling=1.0, ahead=2, steps=3)
    lengths_in_order = lambda _, n: np.full(n, next(prompts))  # noqa: E731
    third = simulate(replace(scenario, lengths=lengths_in_order))[2]
    token = SPEEDS.token_seconds()[8]
    assert third["time/rollout"] == pytest.approx(20 * token)


def test_sampling_ahead_hides_the_tail_behind_the_next_step():
    slow = speeds(MIXED, update=1.0)
    assert step(replace(slow, ahead=2))["idle/fleet"] < step(slow)["idle/fleet"]
    assert step(replace(slow, ahead=2))["time/step"] < step(replace(slow, ahead=1))["time/step"]


def test_a_seed_is_a_run():
    assert simulate(MIXED) == simulate(MIXED)
    assert simulate(MIXED) != simulate(replace(MIXED, seed=1))


def test_more_servers_are_not_slower():
    times = [step(replace(MIXED, servers=n))["time/rollout"] for n in (1, 2, 4, 8, 16)]
    assert times == sorted(times, reverse=True)


def test_the_best_split_is_the_best_of_all():
    """The longer of rollout and update, with constant lengths: where they meet."""

    def make(trainer, servers):
        chips = replace(SCENARIO.speeds, update=120.0 / trainer, capacity=512)
        return replace(SCENARIO, speeds=chips, servers=servers, ahead=1)

    all_of_them = {(16 - n, n): step(make(16 - n, n))["time/step"] for n in range(1, 16)}
    found = best_split(make, 16, 1)
    assert all_of_them[found] == pytest.approx(min(all_of_them.values()))
    trainer, servers = best_split(make, 16, 4)
    assert trainer + 4 * servers == 16


def test_decode_speeds():
    seconds = Speeds(decode=read_decode("1:100,11:1000"), capacity=21).token_seconds()
    assert seconds[1] == pytest.approx(0.01)
    assert seconds[6] == pytest.approx(0.0105)
    assert seconds[21] == pytest.approx(0.012)
    for text in ("", "1", "1:x", "1.5:3"):
        with pytest.raises(UserError, match="IN_FLIGHT:TOKENS_PER_SECOND"):
            read_decode(text)
    for text in ("0:5", "1:0", "4:5,2:9", "2:5,2:6"):
        with pytest.raises(UserError, match="rising numbers in flight"):
            Speeds(decode=read_decode(text)).token_seconds()


def draws(text, most, count=4000):
    rng = np.random.default_rng(0)
    draw = lengths.read(str(text), most)
    return np.concatenate([draw(rng, 8) for _ in range(count // 8)])


def test_lengths_by_name():
    assert set(draws("constant:7", 100)) == {7}
    found = draws("lognormal:100,0.5", 100_000)
    assert found.mean() == pytest.approx(100, rel=0.03)
    assert np.log(found).std() == pytest.approx(0.5, rel=0.05)
    assert draws("lognormal:100,0.5", 120).max() == 120


def test_lengths_of_a_file(tmp_path):
    file = tmp_path / "lengths"
    file.write_text("5\n9\n2000\n")
    assert set(draws(file, 100)) == {5, 9, 100}


@pytest.mark.parametrize(("mean", "cut"), [(300.0, 0.05), (900.0, 0.4), (100.0, 0.01)])
def test_lengths_of_a_run_have_its_mean_and_its_share_of_cut_ones(tmp_path, mean, cut):
    file = tmp_path / "metrics.jsonl"
    metrics = f'"length/a": {mean}, "truncated/a": {cut}'
    file.write_text('{"loss": 1.0}\n' + f"{{{metrics}}}\n" * 3)
    found = draws(file, 1024, 40_000)
    assert found.mean() == pytest.approx(mean, rel=0.03)
    assert (found >= 1024).mean() == pytest.approx(cut, rel=0.1)


def test_sources_of_a_run_keep_their_own_lengths(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"length/short": 20.0, "length/long": 800.0, "truncated/long": 0.1}\n')
    draw, rng = lengths.read(str(file), 1024), np.random.default_rng(0)
    means = [draw(rng, 64).mean() for _ in range(50)]
    assert {round(math.log10(mean)) for mean in means} == {1, 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("constant:x", "not in the form"),
        ("constant:0", "at least 1"),
        ("lognormal:5", "not in the form"),
        ("lognormal:-5,1", "above 0"),
        ("/none", "cannot be read"),
        ("words", "neither number nor JSON"),
        ("empty", "lengths of at least 1"),
        ("zeros", "lengths of at least 1"),
        ("sft", "no metric length/SOURCE"),
    ],
)
def test_lengths_that_cannot_be(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "words": "a\n",
        "empty": "",
        "zeros": "0\n",
        "sft": '{"loss": 1}\n',
    }.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        lengths.read(text, 100)
