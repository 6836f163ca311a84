"""Tasks: small problems made from seeds, each built to need one ability. One file each: the file's name is its name.

A file defines one `Task`, whose fields are its options: {"name": "mqar", "pairs": 8}. `batch` draws rows; `causal` says
that an answer depends on earlier tokens alone, `pooled` that a row has one answer, told from the mean of its tokens.
A task of your own is a module that you have imported, named by its dotted path.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from headway.spec import Strict, convert, nearest

PAD = 0  # where a task's rows differ in length, `valid` is false there


class Batch(NamedTuple):
    """ids, below `vocabulary`; targets, below `answers`: one a token, or one a row where a task is pooled; counts:
    which of them are asked; valid: false at padding, None without any."""

    ids: Int[Tensor, "B T"]
    targets: Int[Tensor, "B N"]
    counts: Bool[Tensor, "B N"]
    valid: Bool[Tensor, "B T"] | None = None

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda part: part.to(device))

    def rows(self, chosen: Any) -> Batch:
        """Some of the rows, by a slice or a tensor of their numbers."""
        return self._each(lambda part: part[chosen])

    def _each(self, made: Callable[[Tensor], Tensor]) -> Batch:
        valid = None if self.valid is None else made(self.valid)
        return Batch(made(self.ids), made(self.targets), made(self.counts), valid)


class Task(Strict, frozen=True):
    """The base of every task. PUBLISHED: what others reached, and SETUP how they went about it."""

    causal: ClassVar[bool] = True
    pooled: ClassVar[bool] = False
    PUBLISHED: ClassVar[dict[str, str]] = {}
    SETUP: ClassVar[str] = ""

    @property
    def vocabulary(self) -> int:
        """How many different ids rows may hold."""
        raise TypeError(f"{type(self).__name__} defines no vocabulary")

    @property
    def answers(self) -> int:
        """How many different targets there are."""
        return self.vocabulary

    def chance(self, length: int) -> float:
        """The accuracy of one who answers without having read."""
        return 1 / self.answers

    def batch(self, random: np.random.Generator, rows: int, length: int) -> Batch:
        """`rows` rows of `length` tokens; the same generator in the same state gives the same rows."""
        raise TypeError(f"{type(self).__name__} defines no batch")

    def held_out(self) -> Task:
        """The task that draws rows to test with: itself where any two draws differ, else other material."""
        return self


def names() -> list[str]:
    """Headway's own tasks, found by file name."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def find(name: str) -> type[Task]:
    """The task class of a name, or of the dotted path of a module that the user's own code has imported."""
    if "." in name:
        if name not in sys.modules:
            raise ValueError(f"task '{name}' is not imported, and a name never runs code: `import {name}` before")
        module = sys.modules[name]
    elif name not in names():
        raise ValueError(f"no task '{name}'{nearest(name, names())}")
    else:
        module = importlib.import_module(f"{__name__}.{name}")
    own = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Task)]
    own = [value for value in own if value.__module__ == module.__name__]
    if len(own) != 1:
        raise ValueError(f"a task's file defines one Task; {module.__name__} defines {len(own)}")
    return own[0]


def build(named: dict[str, Any]) -> Task:
    """A task from {"name": ..., option: value}; a wrong option is an error that names the nearest right one."""
    if not isinstance(named.get("name"), str):
        raise ValueError(f"a task is {{'name': one of {', '.join(names())}, option: value}}, not {named!r}")
    given = {key: value for key, value in named.items() if key != "name"}
    return convert(given, find(named["name"]), f"task {named['name']}")


def at_tokens(ids: np.ndarray, targets: np.ndarray, counts: np.ndarray) -> Batch:
    """A batch that asks at tokens, from arrays of rows x tokens."""
    return Batch(torch.from_numpy(ids).long(), torch.from_numpy(targets).long(), torch.from_numpy(counts).bool())


def of_rows(ids: np.ndarray, labels: np.ndarray, valid: np.ndarray | None = None) -> Batch:
    """A batch whose rows have one label each."""
    targets = torch.from_numpy(labels).long()[:, None]
    there = None if valid is None or valid.all() else torch.from_numpy(valid).bool()
    return Batch(torch.from_numpy(ids).long(), targets, torch.ones_like(targets, dtype=torch.bool), there)


def require_length(name: str, length: int, least: int, why: str) -> None:
    """Refuses lengths into which a task does not fit."""
    if length < least:
        raise ValueError(f"{name}: {length} tokens are too few, {why} take {least}: raise the length, or ask for less")
