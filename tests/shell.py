"""The command line as the shell calls it: what a call ends with. The fixture `run` makes it, in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Headway = Callable[..., Outcome]
