"""Words: what `longformer:window=256,dilation=2` and `encoder.0-5` mean."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from headway.spec import named, nearest


def mixer_of(text: str) -> dict[str, Any]:
    """A mixer as a spec has it, of `NAME` or `NAME:OPTION=VALUE,OPTION=VALUE`; a list is written [256,0]."""
    return named(text, f"--mixer {text}", "NAME:OPTION=VALUE,OPTION=VALUE, as in longformer:window=256")


def layers_of(given: str | Sequence[int] | None, depths: Mapping[str, int]) -> dict[str, list[int]]:
    """The layers that are meant, by stack: all (None), numbers, or words such as "0-5,11", "encoder", "decoder.0-5"."""
    if given is None:
        return {stack: list(range(depth)) for stack, depth in depths.items()}
    parts = re.split(r"\s*,\s*", given.strip()) if isinstance(given, str) else [str(layer) for layer in given]
    found: dict[str, set[int]] = {}
    for part in parts:
        match = re.fullmatch(r"(?:([a-z]+)(?:\.|$))?(?:(\d+)(?:-(\d+))?)?", part)
        if not part or match is None:
            raise ValueError(f"layers: {part!r} is no layer: write numbers and ranges, as in 0-5,11 or encoder.0-5")
        stack = _stack(match[1], part, depths)
        first = int(match[2] or 0)
        last = int(match[3] or match[2] or depths[stack] - 1)
        if not first <= last < depths[stack]:
            raise ValueError(f"layers: {part} is not among the {depths[stack]} layers, 0 to {depths[stack] - 1}")
        found.setdefault(stack, set()).update(range(first, last + 1))
    return {stack: sorted(layers) for stack, layers in found.items()}


def _stack(name: str | None, part: str, depths: Mapping[str, int]) -> str:
    if name is not None and name not in depths:
        raise ValueError(f"layers: this model has no stack '{name}'{nearest(name, depths)}")
    if name is None and len(depths) > 1:
        there = " or ".join(f"{stack}.{part}" for stack in depths)
        raise ValueError(f"layers: {part} could be of either stack: write {there}")
    return name or next(iter(depths))
