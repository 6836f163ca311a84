"""Targets: which modules a pattern means: "blocks.*.mixer.{q,v}" are the queries and values of every mixer.

`*`, `?` and `[...]` as in file names (a `*` crosses dots), `{a,b}` for either. A pattern may leave out the beginning of
a name and every `inner`. Linears that do several things at once are known by each of them: key_value is key and
value, a gated enter is gate and up.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from headway.layers import FeedForward

WHOLE = "whole"
SHORT = {"query": "q", "key": "k", "value": "v", "key_value": "kv", "out": "o"}


class Place(NamedTuple):
    """A module by its name, or one part of its outputs; `shown` is what a pattern is held against."""

    name: str
    module: nn.Module
    part: str = WHOLE
    outputs: slice | None = None
    shown: str = ""


def expand(pattern: str) -> list[str]:
    """A pattern without braces for each of their choices: "a.{b,c}" is "a.b" and "a.c"."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        if "{" in pattern or "}" in pattern:
            raise ValueError(f"targets '{pattern}': a brace is not closed; write {{a,b}}")
        return [pattern]
    begin, end = pattern[: found.start()], pattern[found.end() :]
    return [one for choice in found[1].split(",") for one in expand(f"{begin}{choice.strip()}{end}")]


def places(net: nn.Module, fits: Callable[[nn.Module, str], bool]) -> Iterator[Place]:
    """Every module that fits, with the parts of its outputs behind it."""
    gated = {id(module.enter) for module in net.modules() if isinstance(module, FeedForward) and module.gated}
    for name, module in net.named_modules():
        if not name or ".adapters." in f".{name}." or not fits(module, name):
            continue
        shown = _shown(name)
        yield Place(name, module, shown=shown)
        stem, dot, leaf = shown.rpartition(".")
        parts = ("key", "value") if leaf == "key_value" else ("gate", "up") if id(module) in gated else ()
        for i, part in enumerate(parts):
            half = module.out_features // 2
            yield Place(name, module, part, slice(i * half, (i + 1) * half), f"{stem}{dot}{part}")  # type: ignore[operator]


def find(net: nn.Module, patterns: Sequence[str], fits: Callable[[nn.Module, str], bool], *, who: str) -> list[Place]:
    """The places that any pattern means, in the network's order; a whole module goes before its parts.

    Each pattern, and each choice of a brace, has to mean something.
    """
    there = list(places(net, fits))
    found: set[tuple[str, str]] = set()
    for one in (one for pattern in patterns for one in expand(pattern)):
        names = {(place.name, place.part) for place in there if _means(one, place.shown)}
        if not names:
            raise ValueError(_nothing(one, there, who))
        found |= names
    return [p for p in there if (p.name, p.part) in found and (p.part == WHOLE or (p.name, WHOLE) not in found)]


def meant(net: nn.Module, patterns: Sequence[str], fits: Callable[[nn.Module, str], bool]) -> tuple[str, ...]:
    """Those of the patterns, and of the choices of their braces, that mean something here; all, if none does."""
    there, every = list(places(net, fits)), [one for pattern in patterns for one in expand(pattern)]
    return tuple(one for one in every if any(_means(one, place.shown) for place in there)) or tuple(every)


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern means a name of a module or parameter."""
    return any(_means(one, _shown(name)) for one in expand(pattern))


def _shown(name: str) -> str:
    """A name as patterns are held against it."""
    return ".".join(piece for piece in name.split(".") if piece != "inner")


def _means(pattern: str, shown: str) -> bool:
    stem, dot, leaf = shown.rpartition(".")
    names = [shown, *([f"{stem}{dot}{SHORT[leaf]}"] if leaf in SHORT else [])]
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}") for name in names)


def _nothing(pattern: str, there: list[Place], who: str) -> str:
    """What to say of a pattern that means nothing: the names nearest to it, of those there are."""
    known = sorted({re.sub(r"(?<=\.)\d+(?=\.)", "*", place.shown) for place in there})
    near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.4) or known[:8]
    told = f"near it: {', '.join(near)}" if near else "there is no module that it could"
    return f"targets '{pattern}' matches nothing that {who} can change; {told}"
