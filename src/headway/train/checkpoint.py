"""Checkpoints of a run: which there are, and what an optimiser brings into one. `store` writes and reads them."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from headway.store import MANIFEST


def latest(folder: Path) -> Path | None:
    """The newest checkpoint below `folder`."""
    found = sorted(p for p in folder.glob("step-*") if (p / MANIFEST).is_file())
    return found[-1] if found else None


def prune(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints, and what a crash left unfinished."""
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    for part in folder.glob(".*.part"):
        shutil.rmtree(part, ignore_errors=True)


def optimizer_tensors(optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """All tensors of the optimisers' states, named by optimiser, parameter and entry."""
    found = {}
    for i, optimizer in enumerate(optimizers):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for j, p in enumerate(parameters):
            for key, value in optimizer.state.get(p, {}).items():
                found[f"{i}.{j}.{key}"] = value
    return found


def restore_optimizers(optimizers: list[torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    """The way back of `optimizer_tensors`."""
    for name, value in tensors.items():
        i, j, key = name.split(".", 2)
        parameters = [p for group in optimizers[int(i)].param_groups for p in group["params"]]
        p = parameters[int(j)]
        optimizers[int(i)].state[p][key] = value.to(p.device)
