"""Train: python -m vtriune_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

--config=FILE         a Python file with get_config(); every key is described in configs/base.py
--config.KEY=VALUE    set a key of it, for example --config.grpo.lr=1e-5 (as often as needed)
--workdir=FOLDER      where the run lives (checkpoints, metrics.jsonl, summary.json, report.html);
                      the same command continues what it finds there
--help                show this text

On several hosts the same command is started once on each; the workdir must be a folder that all of
them see. On TPU pods, under Slurm, Open MPI and in indexed Jobs of Kubernetes (with jax[k8s]) the
processes find each other by themselves, else by
--coordinator=HOST:PORT  an address of the host of process 0, with a free port
--processes=N            how many there are
--process=I              which one this is, from 0
--wait=SECONDS           for the others to come, at the start (300)

Exit status: 0 done, 2 a mistake in the input (one line says which), 3 another process of the run is
gone (the same commands continue), 130 interrupted.
Compiled programs are kept in ~/.cache/vtriune_jax (JAX_COMPILATION_CACHE_DIR overrides it).
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from absl import flags

from vtriune_jax import config as configs
from vtriune_jax.commands import fill, keep_programs, return_memory, tell_compilers
from vtriune_jax.errors import UserError
from vtriune_jax.workdir import held, settle


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv` (without the program's name) and returns the exit status."""
    status = 1
    try:
        status = _guarded(argv)
    finally:
        if status and "jax" in sys.modules:  # or nobody has been met yet
            from vtriune_jax import hosts

            hosts.leave(status)
    return status


def _guarded(argv: Sequence[str]) -> int:
    """The same, as if there were no other processes."""
    try:
        options, overrides = parse(argv)
        if options.help:
            print(__doc__)
            return 0
        train(options, overrides)
    except UserError as error:
        return _fail(str(error))
    except (OSError, RuntimeError, ValueError) as error:
        if disk_full(error):
            return _fail(
                f"no space left on the disk ({error}); free some, the same command continues"
            )
        from vtriune_jax import hosts

        if not hosts.is_lost(error):
            raise
        reason = str(error).splitlines()[0]
        return _fail(
            f"another process of this run is gone, see what it said last ({reason[:200]}); the "
            "same command on all hosts continues from the last checkpoint",
            status=3,
        )
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def parse(argv: Sequence[str]) -> tuple[flags.FlagValues, list[tuple[str, str]]]:
    """The flags, and the `--config.key=value` overrides in order. Raises UserError.

    The overrides are not left to `config_flags`, which stops at the first mistake: `config.load`
    reports those of the command line together with those of the file.
    """
    options = flags.FlagValues()
    flags.DEFINE_string("config", None, "", flag_values=options)
    flags.DEFINE_string("workdir", None, "", flag_values=options)
    flags.DEFINE_string("coordinator", None, "", flag_values=options)
    flags.DEFINE_integer("processes", None, "", flag_values=options)
    flags.DEFINE_integer("process", None, "", flag_values=options)
    flags.DEFINE_integer("wait", 300, "", flag_values=options, lower_bound=1)
    flags.DEFINE_bool("help", False, "", flag_values=options, short_name="h")
    overrides, others = split_overrides(argv)
    try:
        fill(options, others, ("--config=configs/quickstart.py", "--workdir=runs/NAME"))
    except UserError as error:
        options.mark_as_parsed()  # as far as absl came
        raise UserError(f"{error}{_config_mistakes(options.config, overrides)}") from error
    if "://" in (options.workdir or ""):
        raise UserError(
            f"--workdir={options.workdir} is not a local folder; launch/tpu_vm.sh copies to gs://"
        )
    return options, overrides


def _config_mistakes(path: str | None, overrides: Sequence[tuple[str, str]]) -> str:
    """What else is wrong, for a command line that is wrong itself."""
    try:
        if path:
            configs.load(path, overrides)
    except UserError as error:
        return f"; besides, {error}"
    return ""


def split_overrides(argv: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """The `--config.key=value` words as (key, text), and the others. Raises UserError."""
    overrides, others = [], []
    words = iter(argv)
    for word in words:
        if found := re.fullmatch(r"--?config\.([^=]+)(?:=(.*))?", word, re.DOTALL):
            overrides.append((found[1], _value(word, found[2], words)))
        else:
            others.append(word)
    return overrides, others


def train(options: flags.FlagValues, overrides: Sequence[tuple[str, str]]) -> None:
    """Checks the config, prepares JAX and the workdir, trains. Heavy imports wait for the check."""
    config = configs.load(options.config, overrides)
    tell_compilers()
    import jax

    from vtriune_jax import hosts

    keep_programs()
    return_memory()
    hosts.join(options.coordinator, options.processes, options.process, options.wait)
    workdir = Path(options.workdir).expanduser()
    hosts.check_same("settings", _settings(config, jax.__version__))
    with ExitStack() as stack:
        hosts.from_first(lambda: stack.enter_context(held(workdir)))
        hosts.from_first(lambda: settle(config, workdir))
        hosts.check_shared(workdir)
        from vtriune_jax.train import run

        run(config, workdir)


def _settings(config: Any, version: str) -> dict[str, Any]:
    """What must be the same for all processes of a run: not where their files and servers are."""
    own = r"data\.(cache|threads)|verifiers\.(addresses|workers)"
    flat = configs.flatten(config.to_dict())
    found = {key: value for key, value in flat.items() if not re.fullmatch(own, key)}
    return {**found, "the version of jax": version}


def disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, is a full disk or a used-up quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if os.strerror(errno.ENOSPC) in str(error):  # as the C++ of Orbax words it
            return True
        error = error.__cause__ or error.__context__
    return False


def _value(word: str, value: str | None, words: Iterator[str]) -> str:
    """The value of an override: after its "=", or the next word."""
    value = next(words, None) if value is None else value
    if value is None:
        raise UserError(f"{word} needs a value: {word}=…")
    return value


def _fail(text: str, status: int = 2) -> int:
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
