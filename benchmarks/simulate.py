"""Is the simulation right? python benchmarks/simulate.py [--ahead=0,1] [--addresses=FILE]

Runs the training loop in miniature, with the real client, `Ahead`, `TailStream` and timeline, on a
fleet: that of --addresses, or two fake servers that are started here, whose tokens take 20 ms.
Update, writing and reading of weights are sleeps, in the last of which the servers are paused as in
a weight update; the verifiers are threads that sleep. The speed of a server is measured before and
after each case, at several numbers of completions in flight; the simulation is given the mean and
the lengths, and its steps are compared. With over-sampling (--over), interrupted completions are
kept ("carry") or drawn anew.

--banned: ids that end a completion, so that these have the lengths that they should, and those of
images.
"""

import argparse
import contextlib
import itertools
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone, not an installed package

from tests.rollout.fake_sglang import FakeServer
from tests.rollout.made_up import BANNED, STOP, make_prompt, write_folder
from vtriune_jax.ahead import Ahead
from vtriune_jax.data.stream import Chunk, PromptStream
from vtriune_jax.rollout.choice import Sampling
from vtriune_jax.rollout.errand import Errand
from vtriune_jax.rollout.fleet import Fleet
from vtriune_jax.rollout.sglang import SGLangEngine
from vtriune_jax.rollout.simulation.run import Scenario, simulate, steady
from vtriune_jax.rollout.simulation.speeds import Speeds
from vtriune_jax.tail import TailStream
from vtriune_jax.timeline import Timeline

PROMPTS, SAMPLES, STEPS, CAPACITY = 12, 4, 8, 16
VERIFY, WORKERS, PUBLISH, LOAD = 0.02, 4, 0.3, 0.2
PROMPT_TOKENS = 1000
"""For the simulation: what a prompt costs is measured as a whole."""
PARTS = ("rollout", "verify", "wait", "update", "sync")


def prompts_of(over, carry):
    """The stream of the training loop: prompt k is named k."""

    def chunks():
        for number in itertools.count():
            first = number * PROMPTS
            made = [make_prompt(k) for k in range(first, first + PROMPTS)]
            yield Chunk(number, made, [], {}, {})

    stream = PromptStream(chunks(), PROMPTS)
    return TailStream(stream, math.ceil(over * PROMPTS), lambda group: carry) if over else stream


def submit(engine, fleet, lengths, prompts, needed, begun=(), n=SAMPLES):
    """As `SGLangEngine.submit`, but that every prompt has completions of its own length."""
    errands = [
        Errand(
            fleet,
            engine._manner,
            engine._tally,
            prompt,
            Sampling(max_tokens=int(lengths[int(prompt.sample.id)]), n=n),
            drawn,
        )
        for prompt, drawn in [(g.prompt, g.completions) for g in begun] + [(p, ()) for p in prompts]
    ]
    return fleet.run(engine._rollout(errands, needed))


def sample(engine, fleet, count, tokens, n):
    """Waits for n completions of `count` prompts, all of the same length."""
    prompts = [make_prompt(k) for k in range(count)]
    submit(engine, fleet, [tokens] * count, prompts, count, n=n).result()


def measured(engine, fleet, servers, short=10, long=50):
    """((in flight, tokens per second), …) of a server, and its seconds to take in a prompt.

    All servers work at once, as in the loop. What does not grow with the tokens is the prompts'.
    """
    found, own = [], 0.0
    for prompts, n in ((1, 1), (1, SAMPLES), (2, SAMPLES), (CAPACITY // SAMPLES, SAMPLES)):
        seconds = []
        for tokens in (short, long):
            start = time.monotonic()
            sample(engine, fleet, prompts * servers, tokens, n)
            seconds.append(time.monotonic() - start)
        token = (seconds[1] - seconds[0]) / (long - short)
        own = max(seconds[0] - short * token, 1e-6) / prompts
        found.append((prompts * n, prompts * n / token))
    return tuple(found), own


def mean_of(one, other):
    """Of two results of `measured`."""
    (decode, own), (later, own_later) = one, other
    rates = tuple((n, (a + b) / 2) for (n, a), (_, b) in zip(decode, later, strict=True))
    return rates, (own + own_later) / 2


def loop(engine, fleet, lengths, update, case, folder):
    """Seconds of each step, and of each of its parts."""
    ahead, over, carry = case
    prompts = prompts_of(over, carry)
    ask = partial(submit, engine, fleet, lengths)

    def collect(step, params, first, clock):
        with clock("rollout"):
            if over:
                groups = prompts.answer(ask, first[0])
            else:
                groups = ask(first[0], len(first[0])).result().groups
        with clock("verify"):
            list(verifiers.map(time.sleep, [VERIFY] * (len(groups) * SAMPLES)))
        return SimpleNamespace(groups=groups)

    def tell(path, body):
        for server in fleet.servers():
            fleet.run(fleet.post(server, path, body)).result()

    records = []
    with (
        ThreadPoolExecutor(WORKERS) as verifiers,
        Timeline(folder / "timeline.json") as timeline,
        Ahead(
            collect,
            prompts,
            partial(timeline.clock, "grpo"),
            ahead=ahead,
            last=STEPS,
            threads=True,
        ) as rollouts,
    ):
        for step in range(STEPS):
            start = time.monotonic()
            _, clock = rollouts.take(step, None)
            with clock("update"):
                time.sleep(update)
            with clock("sync"):
                time.sleep(PUBLISH)
                tell("/pause_generation", {"mode": "retract"})
                time.sleep(LOAD)
                tell("/continue_generation", {})
            seconds = {f"time/{part}": clock.seconds.get(part, 0.0) for part in PARTS}
            records.append(seconds | {"time/step": time.monotonic() - start})
    return records


def replayed(lengths):
    """The lengths of the prompts one after the other, in place of a distribution."""
    rest = iter(lengths)
    return lambda _, n: np.full(n, next(rest))


@contextlib.contextmanager
def fleet_of(addresses):
    """That of a file, or of two fake servers."""
    with contextlib.ExitStack() as stack:
        if not addresses:
            folder = write_folder(Path(stack.enter_context(TemporaryDirectory())) / "weights", 1, 1)
            flags = {"process": True, "token_seconds": 0.02, "model_path": folder}
            servers = [FakeServer(**flags) for _ in range(2)]
            addresses = [stack.enter_context(server).address for server in servers]
        fleet = stack.enter_context(Fleet(addresses))
        fleet.wait_ready(60)
        time.sleep(1)  # for the other one
        yield fleet


def main():
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--ahead", default="0,1,2")
    flags.add_argument("--over", default="0.25", help="over-sampling, of the cases that have it")
    flags.add_argument("--addresses", default="")
    flags.add_argument("--banned", default=",".join(map(str, (STOP, *BANNED))))
    flags.add_argument("--mean", type=float, default=60.0, help="tokens of a completion")
    flags.add_argument("--updates", default="0.5,3.0", help="seconds")
    options = flags.parse_args()
    rng = np.random.default_rng(0)
    drawn = rng.lognormal(np.log(options.mean) - 0.18, 0.6, PROMPTS * (STEPS + 8))
    lengths = np.clip(np.ceil(drawn), 5, 4 * options.mean).astype(int)
    with fleet_of(options.addresses) as fleet, TemporaryDirectory() as folder:
        engine = SGLangEngine(
            fleet,
            stop_ids=(),
            banned_ids=tuple(map(int, options.banned.split(","))),
            image_id=-1,
            decode_text=str,
            pictures=lambda prompt: (),
        )
        servers = fleet.servers()
        for server in servers:
            server.capacity = CAPACITY
        sample(engine, fleet, len(servers), 20, SAMPLES)
        cases = [(ahead, 0.0, False) for ahead in map(int, options.ahead.split(","))]
        cases += [(ahead, float(options.over), carry) for ahead, carry in ((0, False), (1, True))]
        print("update ahead over carry   measured  simulated  ratio   (step, s; then its parts)")
        worst = 0.0
        for update, case in itertools.product(map(float, options.updates.split(",")), cases):
            ahead, over, carry = case
            before = measured(engine, fleet, len(servers))
            real = steady(loop(engine, fleet, lengths, update, case, Path(folder)), ahead)
            decode, own = mean_of(before, measured(engine, fleet, len(servers)))
            speeds = Speeds(
                decode=decode,
                prefill=PROMPT_TOKENS / own,
                capacity=CAPACITY,
                verify=VERIFY,
                verify_workers=WORKERS,
                publish=PUBLISH,
                load=LOAD,
                update=update,
            )
            scenario = Scenario(
                speeds,
                replayed(lengths),
                servers=len(servers),
                prompts=PROMPTS,
                samples=SAMPLES,
                prompt_tokens=PROMPT_TOKENS,
                steps=STEPS,
                ahead=ahead,
                over_sampling=over,
                carry=1000 if carry else 0,
            )
            made = steady(simulate(scenario), ahead)
            ratio = made["time/step"] / real["time/step"]
            worst = max(worst, abs(ratio - 1))
            parts = "  ".join(
                f"{part} {real[f'time/{part}']:.2f}/{made[f'time/{part}']:.2f}" for part in PARTS
            )
            print(
                f"{update:6.1f} {ahead:5} {over:4.2f} {carry:5} {real['time/step']:10.2f} "
                f"{made['time/step']:10.2f} {ratio:6.2f}   {parts}   "
                f"tokens/s {', '.join(f'{n}: {rate:.0f}' for n, rate in decode)}",
                flush=True,
            )
        print(f"largest difference of a step's time: {worst:.0%}")


if __name__ == "__main__":
    main()
