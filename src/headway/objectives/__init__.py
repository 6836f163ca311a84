"""Objectives: what a model is trained to do. One file each, found by its name in a recipe.

Each file defines one class `Objective`: options as keyword arguments of `__init__`, and
`__call__(model, batch) -> Loss`, a *sum* over tokens with their count, so that the caller normalises over whatever it
accumulates.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
from torch import Tensor, nn

from headway.spec import convert, nearest


class Loss(NamedTuple):
    """`total` is what is minimised, `plain` the cross-entropy without smoothing, both summed over `tokens`."""

    total: Tensor
    plain: Tensor
    tokens: int


def names() -> list[str]:
    """The objectives there are, by file name."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def build(named: dict[str, Any]) -> Callable[[nn.Module, Any], Loss]:
    """An objective from {"name": ..., option: value}."""
    name = named.get("name", "seq2seq")
    if name not in names():
        raise ValueError(f"objective.name: no objective '{name}'{nearest(str(name), names())}")
    kind = importlib.import_module(f"{__name__}.{name}").Objective
    parameters = list(inspect.signature(kind.__init__, eval_str=True).parameters.values())[1:]
    known = msgspec.defstruct(
        name, [(p.name, p.annotation, p.default) for p in parameters], forbid_unknown_fields=True, kw_only=True
    )
    given = {key: value for key, value in named.items() if key != "name"}
    return kind(**msgspec.structs.asdict(convert(given, known, "objective")))
