"""Ranks: the processes that `torchrun` started for one run, and how they share a model. FSDP2 does the work.

"ddp" keeps the whole model on every rank and adds up gradients; "fsdp" cuts weights, gradients and optimiser state
over the ranks, block by block (2304.11277). Both are `fully_shard`, on a mesh of (ranks, 1) or of (ranks,).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from headway import machine
from headway.block import Block
from headway.positions import Borrowed

Parallel = Literal["ddp", "fsdp"]


class OfRank(ValueError):
    """A fault that one rank alone may know of, so that it speaks for itself."""


class Ranks:
    """This process among those of a run; alone where `torchrun` did not start it.

    `with Ranks() as ranks:` joins the others and leaves them at the end.
    """

    def __init__(self) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.device = machine.device()
        self._group = ExitStack()
        if self.size > 1 and self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))

    @property
    def first(self) -> bool:
        """Whether this rank speaks and writes for all."""
        return self.rank == 0

    def __enter__(self) -> Ranks:
        if self.size > 1 and not dist.is_initialized():
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            # ranks wait while the first one measures the trained model, however long that takes
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=timedelta(days=7))
            self._group.callback(dist.destroy_process_group)
        return self

    def __exit__(self, *fault: object) -> None:
        self._group.close()

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            dist.barrier()

    def sum(self, *values: float | int) -> list[float | int]:
        """Each value, added up over all ranks."""
        if self.size == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(shared)
        return shared.tolist()

    def firsts(self, value: float) -> float:
        """The first rank's value, on every rank: what clocks say must be the same everywhere."""
        return self.sum(value if self.first else 0.0)[0]

    def spread(self, model: nn.Module, parallel: Parallel) -> None:
        """Shares a model with the other ranks, in place; it was built alike on all of them."""
        if self.size == 1:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        kind = self.device.type
        if parallel == "ddp":
            mesh = init_device_mesh(kind, (self.size, 1), mesh_dim_names=("replicate", "shard"))
        else:
            mesh = init_device_mesh(kind, (self.size,))
        for block in alone(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for name in ("project", "scores"):  # what a two-tower model is called by, beside forward
            if hasattr(model, name):
                register_fsdp_forward_method(model, name)

    def hold_gradients(self, model: nn.Module, hold: bool) -> None:
        """Whether the next backward pass keeps its gradients to itself: all but the last of a step do."""
        if self.size > 1:
            model.set_requires_gradient_sync(not hold)  # type: ignore[operator]


def full(t: Tensor) -> Tensor:
    """A tensor as one process would have it; all ranks must ask together."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def whole(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """The tensors as one process would have them, one after the other; all ranks must ask together, and those that do
    not `keep` any hold one at a time. What was shared comes to lie in the CPU's memory."""
    found = {}
    for name, t in tensors.items():
        value = full(t)
        if keep:
            found[name] = value.cpu() if value is not t else t
    return found


def like(value: Tensor, shared: Tensor) -> Tensor:
    """A whole tensor that every rank has, cut and placed as `shared` is."""
    value = value.to(shared.device)
    if not isinstance(shared, DTensor):
        return value
    return distribute_tensor(value, shared.device_mesh, shared.placements, src_data_rank=None)


def own_part(value: Tensor) -> Tensor:
    """What of a tensor lies on this rank, sharing its memory: all of it, unless ranks share it."""
    return value.to_local() if isinstance(value, DTensor) else value


def joined(part: Tensor, shared: Tensor) -> Tensor:
    """The whole of which `part` lies on this rank, cut as `shared` is; all ranks must ask together."""
    if not isinstance(shared, DTensor):
        return part
    whole = DTensor.from_local(part, shared.device_mesh, shared.placements, shape=shared.shape, stride=shared.stride())
    return whole.full_tensor()


def restore(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts whole tensors into a model that may be shared with other ranks."""
    model.load_state_dict({name: like(tensors[name], own) for name, own in model.state_dict().items()})


def alone(model: nn.Module) -> Sequence[nn.Module]:
    """The blocks that can be gathered one by one: all of them, unless some read parameters of others."""
    blocks: list[nn.Module] = [module for module in model.modules() if isinstance(module, Block)]
    owners: dict[Tensor, int] = {}
    for i, block in enumerate(blocks):
        if any(isinstance(part, Borrowed) for part in block.modules()):
            return []
        if any(owners.setdefault(p, i) != i for p in block.parameters()):
            return []
    return blocks
