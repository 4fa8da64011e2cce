"""What the timeline says when it is read as Chrome reads it: with or without the last bracket."""

import json
import threading

from vtriune_jax.timeline import Timeline


def events(path):
    return json.loads(path.read_text().rstrip().rstrip(",") + "]")


def test_spans_of_two_threads_and_of_a_run_that_goes_on(tmp_path):
    path = tmp_path / "timeline.json"
    with Timeline(path) as timeline:
        clock = timeline.clock("grpo", 4)
        with clock("update"), clock("inner"):
            pass

        def sample():
            with clock("rollout"):
                pass

        thread = threading.Thread(target=sample, name="rollouts_0")
        thread.start()
        thread.join()
    with Timeline(path) as timeline, timeline.clock("grpo", 5)("update"):
        pass

    spans = [event for event in events(path) if event["ph"] == "X"]
    assert [span["name"] for span in spans] == ["inner", "update", "rollout", "update"]
    assert [span["args"]["step"] for span in spans] == ["grpo 5"] * 3 + ["grpo 6"]
    assert spans[1]["tid"] != spans[2]["tid"]
    assert spans[0]["ts"] + spans[0]["dur"] <= spans[1]["ts"] + spans[1]["dur"] + 1e3
    names = {event["args"]["name"] for event in events(path) if event["ph"] == "M"}
    assert names == {"MainThread", "rollouts_0"}
    assert set(clock.seconds) == {"inner", "update", "rollout"}


def test_a_part_that_comes_twice_is_added_up(tmp_path):
    with Timeline(tmp_path / "timeline.json") as timeline:
        clock = timeline.clock("grpo", 0)
        for _ in range(2):
            with clock("rollout"):
                pass
    spans = [e for e in events(tmp_path / "timeline.json") if e["ph"] == "X"]
    total = sum(span["dur"] for span in spans) / 1e6
    assert abs(total - clock.seconds["rollout"]) < 1e-6
