"""Simulate: python -m vtriune_jax.rollout.simulate --config=configs/orsta_7b.py

The training loop as discrete events, for hardware that is not here: how long a step takes, who
waits for whom, how old the completions are that it trains on. Prints the best split of each budget
of chips between trainer and fleet, or one split. Seeded; needs no accelerator.

--config=FILE, --config.KEY=VALUE   as for vtriune_jax.main. What counts: prompts, samples, slots,
                       verifiers.workers, rollout.over_sampling and rollout.carry
--budget=8,64,256,1024  chips for trainer and fleet together
--trainer_chips=N      with --servers=N, in place of --budget: this split
--gpus_per_server=N    (1)
--ahead=0,1            steps that sampling may be ahead of training, each simulated
--steps=N              to simulate (10)
--json=FILE            write the numbers there, of every step
--help                 show this text

What completions are like:

--lengths=WHAT         the metrics.jsonl of a run, a file with one length a line, constant:N, or
                       lognormal:MEAN,SPREAD
--prompt_tokens=N      mean prompt (the slot, batch.prompt_tokens)

How fast things are. What is not given is assumed, from data sheets, and the output says so:

--decode=N:R,…         tokens per second of a server with N completions in flight, as 1:90,64:4200
--prefill=R            prompt tokens per second of a server
--capacity=N           completions at a time in a server (128)
--update=WHAT          seconds of the trainer per step; S@N if measured on N chips, of which more
                       are faster; or the JSON file of vtriune_jax.compile
--publish=S            seconds of the trainer to write the weights
--load=S               seconds in which all servers stand still to read them
--verify=S             seconds of a verifier's worker per completion (0)

Exit status: 0 done, 2 a mistake in the input (one line says which).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from absl import flags

from vtriune_jax import config as configs
from vtriune_jax.commands import fill
from vtriune_jax.errors import UserError
from vtriune_jax.main import split_overrides
from vtriune_jax.rollout.simulation import assumed, lengths
from vtriune_jax.rollout.simulation.run import Scenario, simulate, steady
from vtriune_jax.rollout.simulation.speeds import Speeds, read_decode
from vtriune_jax.rollout.simulation.split import best_split

COLUMNS = (
    # (heading, metric, format)
    ("step s", "time/step", "{:.1f}"),
    ("rollout", "time/rollout", "{:.1f}"),
    ("tail", "time/tail", "{:.1f}"),
    ("verify", "time/verify", "{:.1f}"),
    ("update", "time/update", "{:.1f}"),
    ("sync", "time/sync", "{:.1f}"),
    ("idle: trainer", "idle/trainer", "{:.0%}"),
    ("fleet", "idle/fleet", "{:.0%}"),
    ("staleness", "staleness/mean", "{:.2f}"),
    ("most", "staleness/max", "{:.0f}"),
)
"""Of the table; seconds and shares are of the mean step."""


@dataclass(frozen=True)
class Setting:
    """A scenario but for the number of chips."""

    scenario: Scenario
    gpus_per_server: int
    update: tuple[float, int]
    """Seconds of a step, and on how many chips; 0: on any number."""
    assumed: tuple[str, ...]
    """What was not given, in words."""

    def with_chips(self, trainer: int, servers: int, ahead: int) -> Scenario:
        """The scenario with so many chips in the trainer and so many servers."""
        seconds, chips = self.update
        speeds = replace(
            self.scenario.speeds, update=seconds * chips / trainer if chips else seconds
        )
        return replace(self.scenario, speeds=speeds, servers=servers, ahead=ahead)


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv` (without the program's name) and returns the exit status."""
    try:
        options, overrides = parse(argv)
        if options.help:
            print(__doc__)
            return 0
        setting = read(options, configs.load(options.config, overrides))
        print(heading(options.config, setting.scenario))
        for line in setting.assumed:
            print(f"assumed, not measured: {line}")
        rows = []
        print(table_head())
        for trainer, servers, ahead in splits(options, setting):
            records = simulate(setting.with_chips(trainer, servers, ahead))
            rows.append(
                {
                    "trainer_chips": trainer,
                    "servers": servers,
                    "fleet_chips": servers * setting.gpus_per_server,
                    "ahead": ahead,
                    "mean": steady(records, ahead),
                    "steps": records,
                }
            )
            print(line_of(rows[-1]), flush=True)
        if options.json:
            _write(Path(options.json), {"assumed": setting.assumed, "runs": rows})
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def parse(argv: Sequence[str]) -> tuple[flags.FlagValues, list[tuple[str, str]]]:
    """The flags, and the `--config.key=value` overrides in order. Raises UserError."""
    options = flags.FlagValues()
    for name in ("config", "lengths", "decode", "update", "json"):
        flags.DEFINE_string(name, None, "", flag_values=options)
    for name, least in (("trainer_chips", 1), ("servers", 1), ("prompt_tokens", 0)):
        flags.DEFINE_integer(name, None, "", lower_bound=least, flag_values=options)
    for name, default in (("gpus_per_server", 1), ("capacity", 128), ("steps", 10)):
        flags.DEFINE_integer(name, default, "", lower_bound=1, flag_values=options)
    for name in ("prefill", "publish", "load"):
        flags.DEFINE_float(name, None, "", lower_bound=0.0, flag_values=options)
    flags.DEFINE_float("verify", 0.0, "", lower_bound=0.0, flag_values=options)
    flags.DEFINE_list("budget", ["8", "64", "256", "1024"], "", flag_values=options)
    flags.DEFINE_list("ahead", ["0", "1"], "", flag_values=options)
    flags.DEFINE_bool("help", False, "", flag_values=options, short_name="h")
    overrides, others = split_overrides(argv)
    fill(options, others, ("--config=configs/orsta_7b.py",))
    if (options.trainer_chips is None) != (options.servers is None):
        raise UserError("--trainer_chips=N and --servers=N make a split together; give both")
    return options, overrides


def read(options: flags.FlagValues, config: Any) -> Setting:
    """What the flags and the config say, and assumptions for the rest. Raises UserError."""
    grpo, slots, gpus = config.grpo, config.batch, options.gpus_per_server
    most = slots.completion_tokens
    prompt_tokens = slots.prompt_tokens if options.prompt_tokens is None else options.prompt_tokens
    model, guesses = None, []

    def guess(flag: str, given: Any, make: Any, words: str) -> Any:
        nonlocal model
        if given is not None:
            return given
        model = model or assumed.model_size(config.model)
        value = make(model)
        guesses.append(f"--{flag}={words.format(value)}")
        return value

    draw = lengths.read(options.lengths or f"lognormal:{most / 4:g},{lengths.SPREAD}", most)
    if not options.lengths:
        guesses.append(f"--lengths=lognormal:{most / 4:g},{lengths.SPREAD} (cut at {most})")
    decode = read_decode(options.decode) if options.decode else None
    context = prompt_tokens + most / 4
    update = _update(options.update, grpo.minibatches * grpo.epochs) if options.update else None
    tokens = grpo.prompts * grpo.samples * (prompt_tokens + most) * grpo.epochs
    speeds = Speeds(
        decode=guess(
            "decode",
            decode,
            partial(assumed.decode, gpus=gpus, context=context, most=options.capacity),
            "{0[0][0]}:{0[0][1]:.0f},{0[1][0]}:{0[1][1]:.0f}",
        ),
        prefill=guess("prefill", options.prefill, partial(assumed.prefill, gpus=gpus), "{:.0f}"),
        capacity=options.capacity,
        verify=options.verify,
        verify_workers=config.verifiers.workers,
        publish=guess("publish", options.publish, assumed.transfer, "{:.1f}"),
        load=guess("load", options.load, assumed.transfer, "{:.1f}"),
    )
    update = guess("update", update, partial(assumed.update, tokens=tokens), "{0[0]:.0f}@{0[1]}")
    scenario = Scenario(
        speeds=speeds,
        lengths=draw,
        servers=1,
        prompts=grpo.prompts,
        samples=grpo.samples,
        prompt_tokens=prompt_tokens,
        steps=options.steps,
        over_sampling=config.rollout.over_sampling,
        carry=config.rollout.carry,
        seed=config.seed,
    )
    return Setting(scenario, gpus, update, tuple(guesses))


def splits(options: flags.FlagValues, setting: Setting) -> list[tuple[int, int, int]] | Any:
    """(trainer's chips, servers, ahead) of each line to come, one after the other."""
    aheads = _numbers("ahead", options.ahead, 0)
    if options.trainer_chips is not None:
        yield from ((options.trainer_chips, options.servers, ahead) for ahead in aheads)
        return
    for budget in _numbers("budget", options.budget, 1 + setting.gpus_per_server):
        for ahead in aheads:
            make = partial(setting.with_chips, ahead=ahead)
            yield *best_split(make, budget, setting.gpus_per_server), ahead


def heading(name: str, scenario: Scenario) -> str:
    """What is simulated, in a line."""
    more = f", {scenario.over_sampling:.0%} more begun" if scenario.over_sampling else ""
    return (
        f"{name}: {scenario.steps} steps of {scenario.prompts:,} prompts × {scenario.samples} "
        f"completions, {scenario.prompt_tokens:g} tokens a prompt{more}"
    )


def table_head() -> str:
    """The headings over `line_of`."""
    head = "".join(f"{heading:>{len(heading) + 2}}" for heading, *_ in COLUMNS)
    return f"chips: trainer  fleet  ahead{head}"


def line_of(row: dict[str, Any]) -> str:
    """The mean step of a run."""
    cells = "".join(
        f"{form.format(row['mean'][name]):>{len(heading) + 2}}" for heading, name, form in COLUMNS
    )
    return f"{row['trainer_chips']:>14}{row['fleet_chips']:>7}{row['ahead']:>7}{cells}"


def _update(text: str, calls: int) -> tuple[float, int]:
    """(seconds of a step, chips) of --update; a step calls the compiled update `calls` times."""
    if text.endswith(".json"):
        try:
            found = json.loads(Path(text).read_text())
            return found["estimated_step_seconds"] * calls, found["devices"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--update={text} is no file of vtriune_jax.compile with an estimate "
                f"({type(error).__name__}: {error}); write one for a topology that it fits"
            ) from None
    seconds, _, chips = text.partition("@")
    try:
        return float(seconds), int(chips or 0)
    except ValueError:
        raise UserError(f"--update={text}: give seconds, as 180, or 180@16, or a file") from None


def _numbers(name: str, words: list[str], least: int) -> list[int]:
    if not all(word.strip().isdigit() and int(word) >= least for word in words):
        raise UserError(f"--{name}={','.join(words)} must be whole numbers from {least} on")
    return [int(word) for word in words]


def _write(path: Path, numbers: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(numbers, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--json={path} cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
