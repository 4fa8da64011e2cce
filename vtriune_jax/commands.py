"""What the command lines of this package (main, export, compile) have in common."""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from vtriune_jax.errors import UserError


def fill(options: flags.FlagValues, words: Sequence[str], needed: Sequence[str]) -> None:
    """Reads `--name=value` words into defined flags, --help among them.

    `needed` shows each flag that must be given, as in "--out=FOLDER"; with --help none must.

    Raises:
      UserError: a word is no such flag, a value does not suit, or a needed flag is missing.
    """
    try:
        stray = options(["vtriune_jax", *words])[1:]
    except flags.Error as error:
        raise UserError(f"{error} (--help shows them all)") from error
    if stray:
        raise UserError(f"{stray[0]!r} is not a flag: write --name=value (--help shows them all)")
    for example in needed:
        name = example.removeprefix("--").partition("=")[0]
        if not options.help and not getattr(options, name):
            raise UserError(f"{example} is missing (--help shows all flags)")
