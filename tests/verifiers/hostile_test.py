"""What a model may come up with, against every verifier: there is always an answer, neighbours in
the batch are judged as if alone, and no worker takes more than a gigabyte."""

import json
import math
import threading
import time
from contextlib import closing

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.verifiers.conftest import BOX
from vtriune_jax.types import RewardConfig
from vtriune_jax.verifiers import detection, known_verifiers
from vtriune_jax.verifiers.client import VerifierClient
from vtriune_jax.verifiers.embedded import VerifierServer
from vtriune_jax.verifiers.item import Item
from vtriune_jax.verifiers.judge import judge
from vtriune_jax.verifiers.router import Router

SIDE = "{'bbox_2d': [%s, 0, 100, 100], 'label': 'dog'}"
HOSTILE = {
    "nothing": "",
    # of mathematics
    "a tower of exponents": "9^{9^{9^{9}}}",
    "a factorial": "99999999!",
    "a sum of a million terms": "1+" * 500_000 + "1",
    "a large power": r"(x+1)^{100000}",
    "an endless sum": r"\sum_{n=1}^{10000000} \frac{1}{n^2}",
    "an integral without end": r"\int_0^1 x^{x^{x^{x}}} dx",
    "deep parentheses": "(" * 20_000 + "1" + ")" * 20_000,
    "nested roots": r"\sqrt{" * 3_000 + "2" + "}" * 3_000,
    "nested fractions": r"\frac{1}{" * 2_000 + "2" + "}" * 2_000,
    "a matrix": r"\begin{pmatrix}" + "1 & " * 2_000 + r"\end{pmatrix}",
    # of delimiters
    "a megabyte of braces": "{" * 2**20,
    "a megabyte of closing braces": "}" * 2**20,
    "a megabyte of dollars": "$" * 2**20,
    "boxes in boxes": r"\boxed{" * 10_000,
    "tags in tags": "<answer>" * 20_000 + "</answer>" * 20_000,
    "tags cut off": "<answer>\n" * 50_000,
    # of regular expressions
    "spaces before a full stop": " " * 200_000 + "!",
    "almost a number": "1" * 50_000 + "e" + "1" * 50_000 + "x",
    "almost an answer": "the answer is " * 20_000,
    "almost letters": "A, " * 50_000 + "Z",
    "almost numbers": "-1.5," * 50_000 + "-",
    "almost a string": "'" + "\\" * 100_001,
    "many dashes": "-" * 100_000,
    # of texts
    "NUL bytes": "\0" * 1_000,
    "lone surrogates": "\ud800\udfff\udc00",
    "a right-to-left mark": "\u202e3",
    "other digits": "".join(map(chr, range(0x660, 0x66A))) + "²③Ⅳ",
    "combining marks": "e" + "\u0301" * 100_000,
    "every quote": "'\"`´",
    "a very long number": "9" * 100_000,
    "numbers beyond float": "1e999, -1e999, 1e-999",
    # of JSON and boxes
    "lists in lists": "[" * 100_000,
    "objects in objects": '{"a":' * 100_000,
    "a JSON bomb": '{"a": ' + "[[" * 50_000 + "]]" * 50_000 + "}",
    "many keys": "{" + ", ".join(f'"{k}": {k}' for k in range(20_000)) + "}",
    "equal keys": "{" + '"bbox_2d": [1, 2, 3, 4], ' * 5_000 + '"label": "dog"}',
    "NaN": f"[{SIDE % 'NaN'}, {SIDE % 'Infinity'}, {SIDE % '-Infinity'}]",
    "negative sizes": "[{'bbox_2d': [300, 300, 100, 100], 'label': 'dog'}]",
    "overflowing areas": "[{'bbox_2d': [-1e300, -1e300, 1e300, 1e300], 'label': 'dog'}]",
    "a huge integer": f"[{SIDE % ('-' + '9' * 5_000)}]",
    "booleans": f"[{SIDE % 'true'}]",
    "a long label": "[{'bbox_2d': [1, 2, 3, 4], 'label': '" + "dog" * 50_000 + "'}]",
    "10,000 boxes": str([{"bbox_2d": [k, 0, k + 9, 9], "label": "cat"} for k in range(10_000)]),
    "5,000 boxes": str([{"bbox_2d": [k, 0, k + 9, 9], "label": "c"} for k in range(5_000)]),
}
QUESTIONS = {
    "combination": ("\\boxed{blue}", "blue", {"verifiers": [{"name": "exact"}]}),
    "counting": (r"\boxed{1234}", "1234", {}),
    "detection": (f"\n<answer>\n{BOX}\n</answer>", f"<answer>{BOX}</answer>", {}),
    "edit_distance": (r"\boxed{blue sky}", "blue sky", {}),
    "exact": (r"\boxed{blue}", "blue", {}),
    "grounding": (f"<answer>{BOX}</answer>", BOX, {}),
    "json_format": (
        '<answer>{"x": 1}</answer>',
        '{"x": 1}',
        {"schema": {"type": "object", "required": ["x"], "properties": {"x": {"maximum": 9}}}},
    ),
    "mathverify": (r"\boxed{42}", r"\boxed{42}", {}),
    "multiple_choice": (r"\boxed{D}", "D", {}),
    "numeric": (r"\boxed{1234}", "1234", {}),
    "vqa": (r"\boxed{blue}", "blue", {}),
}
"""Verifier → a completion that it finds right, the truth, parameters."""
LIMIT = 2.0
GIB = 2**30


def question(verifier, completion=None):
    right, truth, params = QUESTIONS[verifier]
    return Item(
        right if completion is None else completion,
        RewardConfig(verifier, truth, format_ratio=0.1, params=params),
        grid=((280, 280),),
    )


def wrapped(verifier, text):
    """Where the verifier looks for an answer."""
    if verifier in ("detection", "grounding", "json_format"):
        return f"\n<answer>\n{text}\n</answer>"
    return rf"so \boxed{{{text}}}"


@pytest.fixture
def door(request):
    """A function that judges items, and the process whose children do it."""
    if request.param == "router":
        with closing(Router(workers=2, limit=LIMIT)) as router:
            yield router.score, psutil.Process()
    else:
        with (
            VerifierServer(workers=2, limit=LIMIT) as server,
            VerifierClient(server.addresses, deadline=90.0) as client,
        ):
            yield client.score, psutil.Process(server._process.pid)


class Watch:
    """The most memory that any worker of a process was seen with."""

    def __init__(self, parent):
        self._parent, self._over = parent, threading.Event()
        self.most, self.seen = 0, 0

    def __enter__(self):
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()

    def _run(self):
        while not self._over.wait(0.02):
            for child in self._parent.children():
                try:
                    if "vtriune_jax.verifiers.worker" in child.cmdline():
                        self.most = max(self.most, child.memory_info().rss)
                        self.seen += 1
                except psutil.Error:  # it has just ended
                    continue


def check(items, verdicts):
    """Odd ones are right, and even ones hostile."""
    assert len(items) == len(verdicts)
    for verdict in verdicts:
        assert math.isfinite(verdict.score)
        assert 0 <= verdict.score <= 1
        if verdict.status != "ok":
            assert verdict.score == 0
            assert 0 < len(verdict.reason) <= 500
            assert "\n" not in verdict.reason
            assert "no verdict after" not in verdict.reason
    for item, verdict in zip(items[1::2], verdicts[1::2], strict=True):
        assert verdict.status == "ok", (item.reward.verifier, verdict.reason)
        assert verdict.parts["accuracy"] == pytest.approx(1.0), item.reward.verifier


def test_there_is_a_question_for_every_verifier():
    assert sorted(QUESTIONS) == sorted(known_verifiers())


@pytest.mark.parametrize(
    ("door", "verifier"),
    [
        ("router", "mathverify"),  # 17 of these texts take the whole limit
        pytest.param("server", "mathverify", marks=pytest.mark.slow),
        ("router", "all others"),
        ("server", "all others"),
    ],
    indirect=["door"],
)
def test_hostile_completions_cost_their_neighbours_nothing(door, verifier):
    score, parent = door
    names = [verifier] if verifier in QUESTIONS else sorted(set(QUESTIONS) - {"mathverify"})
    items, kinds = [], []
    for kind, text in HOSTILE.items():
        for name in names:
            items += [question(name, wrapped(name, text)), question(name)]
            kinds.append((name, kind))
    with Watch(parent) as memory:
        verdicts = score(items)
    check(items, verdicts)
    for (name, kind), verdict in zip(kinds, verdicts[::2], strict=True):
        assert verdict.parts.get("accuracy", 0.0) == 0, (name, kind)
    assert memory.seen
    assert memory.most < GIB
    if verifier == "mathverify":
        assert verdicts[2 * list(HOSTILE).index("a tower of exponents")].status == "timeout"
    else:
        assert {verdict.status for verdict in verdicts} == {"ok"}


@pytest.mark.parametrize("compat", [True, False])
def test_hundreds_of_boxes_on_both_sides_each_in_the_way_of_the_next(compat):
    """Overlapping by nearly all they have, and the best partner of each is the next one's, too."""

    def boxes(count, shift):
        corners = [k + shift for k in range(count)]
        return str([{"bbox_2d": [k, k, k + 999, k + 999], "label": "dog"} for k in corners])

    tasks = [
        (f"\n<answer>\n{boxes(count, shift)}\n</answer>", f"<answer>{boxes(count, 0)}</answer>")
        for count, shift in ((250, 0.5), (250, 0), (256, -0.5), (256, 0.25))
    ]
    start = time.process_time()
    if compat:
        parm = {"is_training": True, "step": 1, "total_steps": 9}
        parm = {"reward_verifier_parm": json.dumps(parm | {"det_reward_ratio": {"map": 1.0}})}
        names = ("prompt", "answer", "data_source")
        fixed = dict.fromkeys(names, "") | {"reward_verifier": "detection"} | parm
        for completion, truth in tasks:
            asked = fixed | {"response": completion, "solution": truth}
            rewards = judge(asked, compat=True, iou_threshold="average")["rewards"]
            assert rewards["report_iou_50_label_match_recall_reward"] == 1
    else:
        many = [(*task, {"iou_threshold": "average"}, 0.0) for task in tasks] * 4
        for parts in detection.verify_batch(many):
            assert parts["recall_50"] == parts["iou_first_recall_50"] == 1
    assert time.process_time() - start < 2 * LIMIT


PIECES = [
    *(
        "\\boxed{",
        "{",
        "}",
        "$",
        "\\(",
        "\\)",
        "<answer>",
        "\n<answer>\n",
        "\n</answer>",
        "<think>",
    ),
    *("[", "]", "'bbox_2d': ", '"bbox_2d":', "'label': 'dog'", '"', "'", ",", ":", "\\", "```json"),
    *("\\frac{", "\\sqrt{", "^{", "_", "!", "+", "-", "x", "1", "9", "1e9", "NaN", "%", "A", "B)"),
    *(
        "\\int",
        "\\sum_{n=1}^{99}",
        "\\begin{cases}",
        " ",
        "\0",
        "\ud800",
        "\u202e",
        "²",
        "½",
        "\uff11",
    ),
]
PIECE = st.sampled_from(PIECES) | st.text(max_size=5)
TEXTS = st.lists(st.tuples(PIECE, st.integers(1, 30)), max_size=20).map(
    lambda pieces: "".join(piece * times for piece, times in pieces)
)


@settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(st.lists(st.tuples(st.sampled_from(sorted(QUESTIONS)), TEXTS, st.booleans()), max_size=10))
def test_whatever_is_asked_is_answered_in_time(router, asked):
    items = []
    for name, text, bare in asked:
        items += [question(name, text if bare else wrapped(name, text)), question(name)]
    check(items, router.score(items))
