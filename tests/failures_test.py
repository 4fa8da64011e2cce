from types import SimpleNamespace

import pytest

from tests.pretend import Processes
from vtriune_jax.errors import UserError
from vtriune_jax.failures import MOST, Failures
from vtriune_jax.types import Verdict

OK = Verdict("ok", 1.0)
NO_BOX = "ValueError: the ground truth holds no box: {!r}"


def groups(*rows):
    samples = [SimpleNamespace(data_source=source, id=name) for source, name in rows]
    return [SimpleNamespace(prompt=SimpleNamespace(sample=sample)) for sample in samples]


def failed(reason="", status="error"):
    return Verdict(status, reason=reason)


def told(capsys):
    return capsys.readouterr().out.splitlines()


def test_the_first_reason_of_each_kind_is_told_once(capsys):
    failures = Failures()
    rows = groups(("cells", "c1"), ("cells", "c2"), ("math", "m1"))
    judged = [
        [OK, failed(NO_BOX.format("one"))],
        [failed(NO_BOX.format("two")), failed("took longer than 5 s", "timeout")],
        [failed("took longer than 5 s", "timeout"), failed("ValueError: in\ntwo lines")],
    ]
    for _ in range(2):
        failures.tell(rows, judged, "held-out")
    assert told(capsys) == [
        f"verifier {words} (masked, counted as failed)"
        for words in (
            "error in cells, row c1: ValueError: the ground truth holds no box: 'one'",
            "timeout in cells, row c2: took longer than 5 s",
            "timeout in math, row m1: took longer than 5 s",
            "error in math, row m1: ValueError: in two lines",
        )
    ]
    failures.tell(groups(("new", "n1")), [[failed(NO_BOX.format("x"))]], "grpo")
    assert len(told(capsys)) == 1


def test_what_is_told_is_bounded(capsys):
    failures = Failures()
    for start in (0, 15):
        rows = groups(*((f"source{k}", "x") for k in range(start, start + 15)))
        failures.tell(rows, [[failed("é" * 500)]] * 15, "grpo")
    lines = told(capsys)
    assert len(lines) == MOST
    assert max(map(len, lines)) < 400


@pytest.mark.parametrize(
    "judged",
    [
        [],
        [[OK, failed()], [failed(), failed()]],
        [[failed()] * 2, [failed("took longer than 5 s", "timeout"), failed()]],
        [[failed("no verdict after 10 s and 3 attempts; last OSError")] * 2] * 2,
    ],
    ids=["nothing", "some", "slow", "no servers"],
)
def test_a_run_goes_on(judged):
    Failures().tell(groups(("a", "1"), ("a", "2"))[: len(judged)], judged, "grpo", first=True)


def test_a_run_in_which_nothing_is_judged_is_stopped_at_its_start():
    given = groups(("a", "1"), ("b", "2")), [[failed(NO_BOX.format("x"))], [failed("other")]]
    failures = Failures()
    with pytest.raises(
        UserError,
        match=r"none of 2 held-out completions could be judged, the first because: verifier error "
        r"in a, row 1: ValueError: the ground truth holds no box: 'x'; correct reward_model of the",
    ):
        failures.tell(*given, "held-out", first=True)
    failures.tell(*given, "held-out")


@pytest.mark.parametrize(("other", "stops"), [([[OK]], False), ([[failed("x")]], True), ([], True)])
def test_several_processes_agree(other, stops, monkeypatch, capsys):
    """The first one tells of the others' reasons, too, and all stop or none."""
    judged = [other, [[failed("one")], [failed("one")]]]

    def work(index):
        rows = groups(("a", "1"), ("b", "2"))[: len(judged[index])]
        try:
            Failures().tell(rows, judged[index], "grpo", first=True)
        except UserError as error:
            return str(error)

    found = Processes(2, monkeypatch).run(work)
    assert found[0] == found[1]
    assert bool(found[0]) == stops
    lines = told(capsys)
    assert "verifier error in b, row 2: one (masked, counted as failed)" in lines
    assert len(lines) == len(set(lines))
