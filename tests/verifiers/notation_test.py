import json
import math

import pytest

from vtriune_jax.types import Verdict
from vtriune_jax.verifiers.notation import dumps, loads


@pytest.mark.parametrize(
    "text", ['{"a": [1, -2.5e3, "é", null, true]}', r'"\ud800"', "[1e999]", "7"]
)
def test_what_the_standard_library_reads_is_read_alike(text):
    assert loads(text) == loads(text.encode()) == json.loads(text)


def test_not_a_number_is_read():
    assert math.isnan(loads("[1, NaN]")[1])


@pytest.mark.parametrize("text", ["", "{", "[1,]", "{'a': 1}", "[" * 10**5, b"\xff\xff"])
def test_what_is_no_json(text):
    with pytest.raises((ValueError, RecursionError)):
        loads(text)


@pytest.mark.parametrize("reason", ["", "took 5 s", "é", "a lone \ud800"])
def test_a_verdict_is_written_as_an_object(reason):
    verdict = Verdict("ok", 0.1, {"accuracy": 1 / 3}, reason)
    assert json.loads(dumps([verdict])) == [vars(verdict)]
