"""Kernels: the fast ways to compute what `attend.reference` defines. One file each: the file's name is the backend's.

A kernel's file defines three functions:
- `run(q, k, v, mask, q_pos, k_pos, bias, scale, softcap, dropout)`, equal to the reference, gradients included;
- `refuses(call)`: why it cannot answer this call, or "" where it can;
- `pays(call)`: why it is the one to take here, or "" where a plainer one is as fast.
Both questions are answered from a `Call`: facts on the Python side, never a tensor's values, so no device waits.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from headway.mask import Mask


@dataclass(frozen=True)
class Call:
    """What is known of a call of `attend` before it runs.

    positions: q_pos and k_pos are given. aligned: and they rise by one from token to token within each sequence.
    """

    mask: Mask
    rows: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: str
    gradients: bool = False
    positions: bool = False
    aligned: bool = True
    bias: bool = False
    softcap: bool = False
    dropout: bool = False


@runtime_checkable
class Kernel(Protocol):
    """What a kernel's file offers."""

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask,
        q_pos: Tensor | None,
        k_pos: Tensor | None,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
        dropout: float,
    ) -> Tensor: ...

    def refuses(self, call: Call) -> str: ...

    def pays(self, call: Call) -> str: ...


def names() -> tuple[str, ...]:
    """All kernels, found by file name; a leading underscore marks a file that a kernel is made of."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in found if not name.startswith("_")))


def find(name: str) -> Kernel:
    """A kernel by its name."""
    return importlib.import_module(f"{__name__}.{name}")  # type: ignore[return-value]


def places(
    q: Tensor, k: Tensor, q_pos: Tensor | None, k_pos: Tensor | None
) -> tuple[Int[Tensor, "#B T"], Int[Tensor, "#B S"]]:
    """The positions of queries and keys; 0, 1, 2, ... where they are not given."""
    q_pos = torch.arange(q.shape[2], device=q.device)[None] if q_pos is None else q_pos
    k_pos = torch.arange(k.shape[2], device=k.device)[None] if k_pos is None else k_pos
    return q_pos, k_pos
