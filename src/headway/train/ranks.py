"""Ranks: the processes that `torchrun` started for one run, and how they share a model. FSDP2 does the work.

"ddp" keeps the whole model on every rank and adds up gradients; "fsdp" cuts weights, gradients and optimiser state
over the ranks, block by block (2304.11277). Both are `fully_shard`, on a mesh of (ranks, 1) or of (ranks,).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

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

    def cutter(self, parallel: Parallel, half: bool = False) -> Callable[[nn.Module], None]:
        """What shares a block, and at last the model around it, with the other ranks, in place. With `half`, weights
        are rounded to bf16 as they are gathered, and gradients are added up in fp32."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        kind = self.device.type
        if parallel == "ddp":
            mesh = init_device_mesh(kind, (self.size, 1), mesh_dim_names=("replicate", "shard"))
        else:
            mesh = init_device_mesh(kind, (self.size,))
        rounded = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        policy = rounded if half else MixedPrecisionPolicy()

        def cut(module: nn.Module) -> None:
            fully_shard(module, mesh=mesh, mp_policy=policy)
            for name in ("project", "scores"):  # what a two-tower model is called by, beside forward
                if hasattr(module, name):
                    register_fsdp_forward_method(module, name)

        return cut

    def hold_gradients(self, model: nn.Module, hold: bool) -> None:
        """Whether the next backward pass keeps its gradients to itself: all but the last of a step do."""
        if self.size > 1:
            model.set_requires_gradient_sync(not hold)  # type: ignore[operator]


def _is_shared(t: Any) -> bool:
    """Whether it is a part of a tensor that ranks share (DTensor). Loading that takes half a second, which one process
    is spared: where nobody has loaded it, there is none."""
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(t, loaded.DTensor)


def full(t: Any) -> Tensor:
    """A tensor as one process would have it; all ranks must ask together."""
    return t.full_tensor() if _is_shared(t) else t


class Gathered(Mapping[str, Tensor]):
    """Tensors as one process would have them, in the CPU's memory, each gathered when it is asked for; all ranks must
    ask together, in one order."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return full(self.tensors[name].detach()).cpu()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Without gathering anything; the whole tensors' ones."""
        return {name: tuple(t.shape) for name, t in self.tensors.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: t.dtype for name, t in self.tensors.items()}


def like(value: Tensor, shared: Any) -> Tensor:
    """A whole tensor that every rank has, cut and placed as `shared` is."""
    value = value.to(shared.device)
    if not _is_shared(shared):
        return value
    from torch.distributed.tensor import distribute_tensor

    # a copy: a view would hold the whole
    return distribute_tensor(value, shared.device_mesh, shared.placements, src_data_rank=None).clone()


def own_part(value: Any) -> Tensor:
    """What of a tensor lies on this rank, sharing its memory: all of it, unless ranks share it."""
    return value.to_local() if _is_shared(value) else value


class Deal:
    """Matrices of one shape, cut by rows over ranks as `shared` is: dealt out whole, as many to each rank, and taken
    back. All ranks must ask together; each then holds about what its own parts take."""

    def __init__(self, shared: Any, count: int) -> None:
        self.group, self.size, self.count = shared.device_mesh.get_group(), shared.device_mesh.size(), count
        self.each = -(-count // self.size)  # matrices of a rank; the last ones may be none, and are zeros
        whole, self.columns = shared.shape
        chunk = -(-whole // self.size)
        self.rows = [max(0, min(chunk, whole - rank * chunk)) for rank in range(self.size)]
        self.own = self.rows[shared.device_mesh.get_local_rank()]

    def out(self, parts: Sequence[Float[Tensor, "r C"]]) -> Float[Tensor, "K R C"]:
        """From this rank's rows of every matrix to its matrices."""
        empty = [torch.zeros_like(parts[0])] * (self.each * self.size - self.count)
        sent = torch.stack([*parts, *empty]).unflatten(0, (self.each, self.size)).transpose(0, 1)
        found = self._exchanged(sent, [self.own] * self.size, self.rows)
        pieces = found.split([self.each * rows * self.columns for rows in self.rows])
        each = zip(pieces, self.rows, strict=True)
        return torch.cat([piece.view(self.each, rows, self.columns) for piece, rows in each], 1)

    def back(self, matrices: Float[Tensor, "K R C"]) -> list[Float[Tensor, "r C"]]:
        """From this rank's matrices to its rows of every matrix."""
        sent = torch.cat([piece.flatten() for piece in matrices.split(self.rows, 1)])
        found = self._exchanged(sent, self.rows, [self.own] * self.size)
        parts = found.view(self.size, self.each, self.own, self.columns).transpose(0, 1).flatten(0, 1)
        return list(parts[: self.count].unbind())

    def _exchanged(self, sent: Tensor, gone: list[int], come: list[int]) -> Float[Tensor, " N"]:
        """What comes of rows of `each` matrices, where so many go to each rank and come from it."""
        numbers = lambda rows: [self.each * some * self.columns for some in rows]
        found = sent.new_empty(sum(numbers(come)))
        dist.all_to_all_single(found, sent.flatten(), numbers(come), numbers(gone), group=self.group)
        return found


def is_cut(t: Any) -> bool:
    """Whether ranks have different parts of a tensor ("fsdp"), not the whole each."""
    return _is_shared(t) and t.device_mesh.ndim == 1


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
