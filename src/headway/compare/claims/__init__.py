"""Claims: what is commonly said of architectures, and a measurement that can contradict it. One file each: the file's
name is the claim's name. It defines SECTION ("A" to "G"), TITLE, SAID (what is commonly said), METHOD (how it is
measured, in one line), RULE (what the verdict follows from) and `measure(how) -> Found`;
and may define SECONDS, what it takes on two cores, (quick, full).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

from headway.spec import Strict, nearest

Tell = Callable[[str, float], None]  # what is being done, and the share of the claim that is done, 0 to 1
Row = tuple[str | float | int | None, ...]
HOLDS, PARTLY, FAILS, OPEN = "holds", "holds in part", "does not hold here", "not decided here"


class How(Strict, frozen=True):
    """quick: minutes in all, else hours. device: "cpu" or "cuda". mixers, tasks: the user's own, {"name": dotted path,
    option: value}. tell: hears what is being done. memory: what is measured, by its settings, so that what a mapping
    that is kept holds already is not measured again."""

    quick: bool = True
    device: str = "cpu"
    seed: int = 0
    mixers: tuple[dict[str, Any], ...] = ()
    tasks: tuple[dict[str, Any], ...] = ()
    tell: Tell = lambda what, share: None
    memory: dict[str, Any] = {}


class Table(Strict, frozen=True):
    """`rows` of texts and numbers under `columns`; None is a figure that is missing. A number's spread, (least,
    greatest), stands in `spread` at "row,column": of what was measured more than once, or of a share of questions what
    95 in 100 other sets of questions would give."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    spread: dict[str, tuple[float, float]] = {}


class Line(Strict, frozen=True):
    """(x, y) points of one name; `dots` that no line joins."""

    name: str
    points: tuple[tuple[float, float], ...]


class Plot(Strict, frozen=True):
    """What a picture shows, and one plain sentence that says what is to be seen in it."""

    title: str
    sentence: str
    x: str
    y: str
    lines: tuple[Line, ...]
    kind: Literal["line", "dots"] = "line"
    log_x: bool = False
    log_y: bool = False


class Found(Strict, frozen=True):
    """verdict: one of HOLDS, PARTLY, FAILS, OPEN, by the claim's RULE; because: the figures that decided, in words.
    settings: everything needed to measure it again."""

    verdict: str
    because: str
    tables: tuple[Table, ...]
    plots: tuple[Plot, ...] = ()
    notes: tuple[str, ...] = ()
    settings: dict[str, Any] = {}


@runtime_checkable
class Claim(Protocol):
    """A claim's file."""

    SECTION: str
    TITLE: str
    SAID: str
    METHOD: str
    RULE: str

    def measure(self, how: How) -> Found: ...


def curves(title: str, sentence: str, x: str, y: str, each: Mapping[str, Mapping[int, float]]) -> Plot:
    """A line a name, both axes logarithmic: what grows as a power is straight."""
    lines = tuple(Line(name=name, points=tuple((float(n), v) for n, v in one.items())) for name, one in each.items())
    return Plot(title=title, sentence=sentence, x=x, y=y, lines=lines, log_x=True, log_y=True)


def names() -> list[str]:
    """All claims, in the order of their sections, then by name."""
    return sorted(_files(), key=lambda name: (_file(name).SECTION, name))


def find(name: str) -> Claim:
    """The file of a claim."""
    if name not in (known := _files()):
        raise ValueError(f"no claim '{name}'{nearest(name, known)}")
    return _file(name)


def _files() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]


def _file(name: str) -> Claim:
    return importlib.import_module(f"{__name__}.{name}")  # type: ignore[return-value]
