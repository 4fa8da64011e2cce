"""What the client and the weight sync rely on, as checks of one server, fake or real.

Each takes a `Peer` and leaves it as it was. They ask for shapes and rules, not for particular
tokens; those of the real server are compared with ours in `sglang_test.py`.
"""

from __future__ import annotations

import base64
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.data.conftest import png
from tests.rollout.peer import Peer

CONTEXT = 32768
IMAGE = base64.b64encode(png(84, 112, seed=1)).decode()
IMAGE_TOKENS = 12
OTHER = base64.b64encode(png(56, 140, seed=2)).decode()
OTHER_TOKENS = 10


def params(tokens: int = 6, **more: Any) -> dict[str, Any]:
    plain = {"max_new_tokens": tokens, "temperature": 1.0, "top_p": 1.0, "top_k": -1}
    return plain | {"ignore_eos": True, "skip_special_tokens": False} | more


LOGPS = {"return_logprob": True, "logprob_start_len": -1}


def check_output(output: dict[str, Any], tokens: int, prompt_tokens: int, version: str) -> None:
    """A whole completion: everything that the client reads belongs together."""
    meta = output["meta_info"]
    assert meta["finish_reason"] == {"type": "length", "length": tokens}
    assert len(output["output_ids"]) == tokens == meta["completion_tokens"]
    logps = meta["output_token_logprobs"]
    assert [entry[1] for entry in logps] == output["output_ids"]
    assert all(entry[0] <= 0 and entry[2] is None for entry in logps)
    assert meta["output_token_logprobs_length"] == tokens
    assert meta["input_token_logprobs"] == []
    assert meta["prompt_tokens"] == prompt_tokens
    assert meta["weight_version"] == version
    assert meta["weight_versions"] == [{"version": version, "start": 0, "end": tokens}]
    assert meta["num_retractions"] == 0


def a_single_request_gives_an_object(peer: Peer) -> None:
    output = peer.generate(input_ids=peer.ids(), sampling_params=params(), rid="one", **LOGPS)
    assert output["meta_info"]["id"] == "one"
    check_output(output, 6, 5, peer.version())


def n_completions_give_a_list_with_other_ids(peer: Peer) -> None:
    for ids, sampling in [
        (peer.ids(1), params(n=3)),
        ([peer.ids(1)], [params(n=3)]),
    ]:
        outputs = peer.generate(
            input_ids=ids, image_data=[[IMAGE]], sampling_params=sampling, rid=["many"], **LOGPS
        )
        assert len({output["meta_info"]["id"] for output in outputs} | {"many"}) == 4
        for output in outputs:
            check_output(output, 6, 7 + IMAGE_TOKENS, peer.version())
            assert output["meta_info"]["image_tokens"] == IMAGE_TOKENS


def a_batch_shares_one_image_that_is_no_list(peer: Peer) -> None:
    prompts = [peer.ids(1), [*peer.ids(1), 16, 17]]
    sampling = [params(4), params(6)]
    outputs = peer.generate(
        input_ids=prompts, image_data=IMAGE, sampling_params=sampling, rid=["b0", "b1"], **LOGPS
    )
    assert [output["meta_info"]["id"] for output in outputs] == ["b0", "b1"]
    check_output(outputs[0], 4, 7 + IMAGE_TOKENS, peer.version())
    check_output(outputs[1], 6, 9 + IMAGE_TOKENS, peer.version())


def two_images_of_one_prompt_are_a_list_in_a_list(peer: Peer) -> None:
    two = {"input_ids": peer.ids(1, 2), "sampling_params": params(n=2)}
    outputs = peer.generate(image_data=[[IMAGE, OTHER]], **two, **LOGPS)
    for output in outputs:
        check_output(output, 6, 9 + IMAGE_TOKENS + OTHER_TOKENS, peer.version())
    status, answer = peer.post("/generate", {"image_data": [IMAGE, OTHER], **two})
    message = "The length of image_data should be equal to the batch size."
    assert (status, answer) == (400, {"error": {"message": message}})


def a_stream_gives_the_first_token_and_the_end(peer: Peer) -> None:
    events = peer.events(
        input_ids=[peer.ids(1)],
        image_data=IMAGE,
        sampling_params=[params(20, n=3, stream_interval=2**30)],
        rid=["stream"],
        **LOGPS,
    )
    first, last = {}, {}
    for event in events:
        whole = event["meta_info"]["finish_reason"] is not None
        (last if whole else first)[event["index"]] = event
    assert len(events) == 6
    assert set(first) == set(last) == {0, 1, 2}
    for k, event in last.items():
        check_output(event, 20, 7 + IMAGE_TOKENS, peer.version())
        assert first[k]["meta_info"]["id"] == event["meta_info"]["id"]
        assert 0 < len(first[k]["output_ids"]) < 20


def one_completion_of_a_stream_has_a_number_too(peer: Peer) -> None:
    sampling = [params(3, stream_interval=2**30)]
    events = peer.events(input_ids=[peer.ids()], sampling_params=sampling, rid=["s"], **LOGPS)
    assert {event["index"] for event in events} == {0}
    check_output(events[-1], 3, 5, peer.version())


def a_completion_can_be_aborted_by_its_id(peer: Peer) -> None:
    def seen(event: Any) -> None:
        if event["index"] == 1 and event["meta_info"]["finish_reason"] is None:
            time.sleep(0.05)
            assert peer.post("/abort_request", {"rid": event["meta_info"]["id"]}) == (200, "")

    events = peer.events(
        seen,
        input_ids=[peer.ids(1)],
        image_data=IMAGE,
        sampling_params=[params(300, n=2, stream_interval=2**30)],
        **LOGPS,
    )
    last = {event["index"]: event for event in events}
    assert last[0]["meta_info"]["finish_reason"]["type"] == "length"
    aborted = last[1]["meta_info"]
    assert aborted["finish_reason"]["type"] == "abort"
    assert not aborted["finish_reason"].get("status_code")
    drawn = [entry[1] for entry in aborted["output_token_logprobs"]]
    assert 0 < len(drawn) < 300
    assert drawn == last[1]["output_ids"]
    assert aborted["weight_versions"][-1]["end"] == len(drawn)


def an_unknown_id_may_be_aborted(peer: Peer) -> None:
    assert peer.post("/abort_request", {"rid": "nobody"}) == (200, "")


def mistakes_have_their_status(peer: Peer) -> None:
    ids = peer.ids()
    nothing = "Either text, input_ids or input_embeds should be provided."
    body = {"sampling_params": params()}
    assert peer.post("/generate", body) == (400, {"error": {"message": nothing}})
    (event,) = peer.events(**body)
    assert event["error"]["message"] == nothing
    assert event["error"]["code"] == 400
    long = (
        f"The input ({CONTEXT + 1} tokens) is longer than the model's context length "
        f"({CONTEXT} tokens)."
    )
    body = {"input_ids": [11] * (CONTEXT + 1), "sampling_params": params()}
    assert peer.post("/generate", body) == (400, {"error": {"message": long}})
    (event,) = peer.events(**body)
    assert event["error"]["message"] == long
    bias = {str(peer.vocab): 1.0}
    status, answer = peer.post(
        "/generate", {"input_ids": ids, "sampling_params": params(logit_bias=bias)}
    )
    message = f"logit_bias must has keys in [0, {peer.vocab - 1}], got {peer.vocab}."
    assert (status, answer) == (400, {"error": {"message": message}})
    body = {"input_ids": ids, "sampling_params": params(seed=1)}
    assert peer.post("/generate", body) == (500, "Internal Server Error")
    assert peer.post("/nothing", {}) == (404, {"detail": "Not Found"})
    for path in ("/pause_generation", "/continue_generation", "/abort_request"):
        status, answer = peer.post(path)
        assert (status, answer["type"], answer["code"]) == (400, "Bad Request", 400)


def an_id_cannot_be_used_twice_at_once(peer: Peer) -> None:
    body = {"input_ids": peer.ids(), "sampling_params": params(300), "rid": "twin"}
    with ThreadPoolExecutor() as threads:
        first = threads.submit(peer.post, "/generate", body)
        time.sleep(0.15)
        status, answer = peer.post("/generate", body)
        assert first.result()[0] == 200
    message = "Duplicate request ID detected: twin"
    assert (status, answer) == (400, {"error": {"message": message}})


def a_bias_bans_and_forces(peer: Peer) -> None:
    banned = {str(i): -1e9 for i in range(peer.vocab) if i != 21}
    output = peer.generate(
        input_ids=peer.ids(), sampling_params=params(3, logit_bias=banned), **LOGPS
    )
    assert output["output_ids"] == [21] * 3
    assert all(abs(e[0]) < 1e-6 for e in output["meta_info"]["output_token_logprobs"])


def the_stop_token_is_kept_with_its_logp(peer: Peer) -> None:
    sampling = params(9, ignore_eos=False, stop_token_ids=[21], logit_bias={"21": 1e4})
    output = peer.generate(input_ids=peer.ids(), sampling_params=sampling, **LOGPS)
    meta = output["meta_info"]
    assert meta["finish_reason"] == {"type": "stop", "matched": 21}
    assert output["output_ids"] == [21]
    assert len(meta["output_token_logprobs"]) == 1


def greedy_is_the_likeliest_at_temperature_one(peer: Peer) -> None:
    body = {"input_ids": peer.ids(1), "image_data": [IMAGE], **LOGPS}
    one, other = (
        peer.generate(**body, sampling_params=sampling)
        for sampling in (params(temperature=0), params(top_k=1))
    )
    assert one["output_ids"] == other["output_ids"]


def logps_of_the_prompt_can_be_asked_for(peer: Peer) -> None:
    output = peer.generate(
        input_ids=peer.ids(1),
        image_data=[IMAGE],
        sampling_params=params(0),
        return_logprob=True,
        logprob_start_len=0,
    )
    meta = output["meta_info"]
    logps, shown = zip(*[entry[:2] for entry in meta["input_token_logprobs"]], strict=True)
    assert logps[0] is None
    assert all(logp < 0 for logp in logps[1:])
    pads = [0] * IMAGE_TOKENS
    assert list(shown) == [11, 12, 13, peer.vision_start, *pads, peer.vision_end, 14, 15]
    assert output["output_ids"] == []
    assert meta["finish_reason"] == {"type": "length", "length": 0}


def it_tells_its_health_and_capacity(peer: Peer) -> None:
    assert peer.get("/health") == ""
    info = peer.get("/server_info")
    assert info["max_total_num_tokens"] > 1000
    (state,) = info["internal_states"]
    assert state["effective_max_running_requests_per_dp"] > 1
    assert peer.get("/model_info")["model_type"] == "qwen2_5_vl"


def an_update_changes_answers_path_and_version(peer: Peer) -> None:
    body = {"input_ids": peer.ids(1), "image_data": [IMAGE], **LOGPS}
    before, version = peer.generate(**body, sampling_params=params(temperature=0)), peer.version()
    status, answer = peer.update("/nowhere", "step-9")
    assert (status, answer["success"]) == (400, False)
    assert answer["message"].startswith("Failed to get weights iterator: ")
    assert peer.version() == version
    try:
        told = "Succeeded to update model weights. Weight version updated to step-1."
        expected = {"success": True, "message": told, "num_paused_requests": 0}
        assert peer.update(peer.second, "step-1") == (200, expected)
        info = peer.get("/model_info")
        assert (info["weight_version"], info["model_path"]) == ("step-1", str(peer.second))
        after = peer.generate(**body, sampling_params=params(temperature=0))
        assert (
            after["meta_info"]["output_token_logprobs"][0]
            != (before["meta_info"]["output_token_logprobs"][0])
        )
        check_output(after, 6, 7 + IMAGE_TOKENS, "step-1")
    finally:
        assert peer.update(peer.first, version)[0] == 200
    again = peer.generate(**body, sampling_params=params(temperature=0))
    assert again["output_ids"] == before["output_ids"]
    status, answer = peer.post("/update_weight_version", {"new_version": "renamed"})
    assert answer == {
        "success": True,
        "message": "Weight version updated to renamed",
        "new_version": "renamed",
    }
    peer.post("/update_weight_version", {"new_version": version})
    assert peer.version() == version


def under_way(peer: Peer, tokens: int = 150) -> tuple[Any, Any]:
    """(threads, future of a completion that has its first token)."""
    begun, threads = threading.Event(), ThreadPoolExecutor()
    future = threads.submit(
        peer.events,
        lambda event: begun.set(),
        input_ids=[peer.ids(1)],
        image_data=IMAGE,
        sampling_params=[params(tokens, stream_interval=2**30)],
        **LOGPS,
    )
    begun.wait(60)
    time.sleep(0.1)
    return threads, future


def retracted_completions_go_on_with_other_weights(peer: Peer) -> None:
    version = peer.version()
    threads, future = under_way(peer)
    ok = {"message": "Generation paused successfully.", "status": "ok"}
    assert peer.post("/pause_generation", {"mode": "retract"}) == (200, ok)
    late = threads.submit(peer.generate, input_ids=peer.ids(), sampling_params=params(3), **LOGPS)
    status, text = peer.post("/flush_cache", {})
    assert status == 200
    assert text.startswith("Cache flushed.")
    try:
        assert peer.update(peer.second, "step-1")[0] == 200
        time.sleep(0.3)
        assert not future.done()
        assert not late.done()
        ok = {"message": "Generation continued successfully.", "status": "ok"}
        assert peer.post("/continue_generation", {}) == (200, ok)
        meta = future.result()[-1]["meta_info"]
        check_output(late.result(), 3, 5, "step-1")
        old, new = meta["weight_versions"]
        assert (old["version"], new["version"]) == (version, "step-1")
        assert 0 == old["start"] < old["end"] == new["start"] < new["end"] == 150
        assert meta["num_retractions"] == 1
        assert meta["weight_version"] == "step-1"
    finally:
        peer.post("/continue_generation", {})
        assert peer.update(peer.first, version)[0] == 200


def a_pause_that_aborts_gives_back_what_there_is(peer: Peer) -> None:
    threads, future = under_way(peer)
    assert peer.post("/flush_cache", {})[0] == 400
    assert peer.post("/pause_generation", {})[0] == 200
    output = future.result()[-1]
    peer.post("/continue_generation", {})
    assert output["meta_info"]["finish_reason"]["type"] == "abort"
    assert 0 < len(output["output_ids"]) < 150
    threads.shutdown()


def an_update_waits_for_those_under_way(peer: Peer) -> None:
    version = peer.version()
    threads, future = under_way(peer, 60)
    try:
        assert peer.update(peer.second, "step-1")[0] == 200
        check_output(future.result(timeout=5)[-1], 60, 7 + IMAGE_TOKENS, version)
    finally:
        assert peer.update(peer.first, version)[0] == 200
    threads.shutdown()


CHECKS = [
    check
    for name, check in list(globals().items())
    if callable(check)
    and getattr(check, "__annotations__", {}) == {"peer": "Peer", "return": "None"}
]
