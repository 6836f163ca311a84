"""Checkpoints of a run: which there are, what is in one, and which of them is the newest that is whole.

`store` writes and reads them. Nothing in one is trusted: a damaged one is told by name, and the one before it is used.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headway.spec import convert
from headway.store import MANIFEST, read_folder, sweep
from headway.train.ranks import like
from headway.weights import open_weights

TENSORS = {"model", "best", "optimizer"}  # and "average", where there is one
RECORDS = {"progress", "spec", "data"}


@dataclass
class Progress:
    """What has been spent, and what was seen; saved with every checkpoint. `loss` and `variance` are running ones."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_loss: float = math.inf
    evaluations: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    loss: float = math.nan
    variance: float = 0.0


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read, every byte checked."""

    folder: Path
    tensors: dict[str, Mapping[str, Tensor]]
    progress: Progress
    spec: Any
    data: Any


def latest(folder: Path) -> Path | None:
    """The newest checkpoint below `folder`."""
    found = sorted(p for p in folder.glob("step-*") if (p / MANIFEST).is_file())
    return found[-1] if found else None


def read(folder: Path, whole: bool = True) -> Saved:
    """One checkpoint; a ValueError of one line names the file that is at fault. Unless it is read `whole`, tensors are
    read one by one, when they are asked for."""
    tensors, records = read_folder(folder, None if whole else open_weights)
    lacking = sorted((TENSORS - tensors.keys()) | (RECORDS - records.keys()))
    if lacking:
        raise ValueError(f"{folder / MANIFEST}: tells of no {lacking[0]}, which a checkpoint has; use an older one")
    progress = convert(records["progress"], Progress, str(folder / "progress.json"))
    return Saved(folder, tensors, progress, records["spec"], records["data"])


def newest(folder: Path, whole: bool = True) -> tuple[Saved | None, dict[Path, str]]:
    """The newest checkpoint that is whole, and what is wrong with each that is newer. None where there never was one;
    where all are damaged, a ValueError."""
    faults: dict[Path, str] = {}
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            return read(path, whole), faults
        except ValueError as error:
            faults[path] = str(error)
    if faults:
        raise ValueError(f"{next(iter(faults.values()))}; no older checkpoint is whole: start anew with --overwrite")
    return None, {}


def set_aside(path: Path) -> Path:
    """Takes a damaged checkpoint out of the way of its successor, and keeps it for who wants to know."""
    aside = path.with_name(f"damaged-{path.name}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    except OSError as error:
        raise ValueError(f"{path}: damaged, and cannot be set aside ({error.strerror}); remove it") from None
    return aside


def prune(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints, and what a crash left unfinished."""
    for old in sorted(folder.glob("step-*"))[:-keep]:
        # renamed first: half removed, it would be taken for a damaged one
        old.rename(old.with_name(f".{old.name}.part"))
    sweep(folder)


def optimizer_tensors(optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """All tensors of the optimisers' states, named by optimiser, parameter and entry."""
    found = {}
    for i, optimizer in enumerate(optimizers):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for j, p in enumerate(parameters):
            for key, value in optimizer.state.get(p, {}).items():
                found[f"{i}.{j}.{key}"] = value
    return found


def restore_optimizers(optimizers: list[torch.optim.Optimizer], tensors: Mapping[str, Tensor], where: Path) -> None:
    """The way back of `optimizer_tensors`; `where` is whom an error blames."""
    parameters = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in optimizers]
    for name, value in tensors.items():
        named = re.fullmatch(r"(\d{1,9})\.(\d{1,9})\.(\w+)", name)
        i, j = (int(named[1]), int(named[2])) if named else (len(parameters), 0)
        if not named or i >= len(parameters) or j >= len(parameters[i]):
            raise ValueError(f"{where}: {name!r} belongs to no parameter of this run; use an older checkpoint")
        p = parameters[i][j]
        if tuple(value.shape) not in ((), tuple(p.shape)) or not value.is_floating_point():
            raise ValueError(
                f"{where}: {name} is {value.dtype} of shape {list(value.shape)}, and its parameter has "
                f"{list(p.shape)}; use an older checkpoint"
            )
        # what has the parameter's shape is cut as it is; a count of steps is not
        optimizers[i].state[p][named[3]] = like(value, p) if value.shape == p.shape else value.to(p.device)
