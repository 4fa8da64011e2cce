"""Where the servers are: a list, a file that is read again and again, or a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from vtriune_jax.errors import UserError

Addresses = Sequence[str] | str | Path | Callable[[], Sequence[str]]


def read_addresses(addresses: Addresses) -> list[str]:
    """The addresses now, without a slash at the end; UserError if there are none or odd ones."""
    if callable(addresses):
        found = list(addresses())
    elif isinstance(addresses, (str, Path)):
        try:
            lines = Path(addresses).read_text().splitlines()
        except OSError as error:
            raise UserError(
                f"rollout.addresses: cannot read {addresses} ({error.strerror}); give the file "
                "that launch/rollouts.sh writes, one address a line"
            ) from None
        found = [line.split("#")[0].strip() for line in lines]
    else:
        found = list(addresses)
    found = [address.rstrip("/") for address in found if address]
    odd = [address for address in found if not address.startswith(("http://", "https://"))]
    if odd or not found:
        what = repr(odd[0]) if odd else "no address"
        raise UserError(
            f"rollout.addresses: found {what}; expected servers like http://10.0.0.2:30000"
        )
    return list(dict.fromkeys(found))
