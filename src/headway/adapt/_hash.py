"""The hash of a base: which weights an adapter was learned upon, in fp32 or bf16 alike."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from headway.adapt._base import INSIDE


def base_hash(net: nn.Module) -> str:
    """SHA-256 of names, shapes and values of all weights but heads and adapters; values as bf16, to which fp32 and bf16
    agree."""
    found = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        if INSIDE in f".{name}" or name.startswith("heads."):
            continue
        found.update(f"{name} {list(tensor.shape)}".encode())
        plain = tensor.detach().cpu()
        plain = plain.to(torch.bfloat16) if plain.is_floating_point() else plain
        found.update(plain.contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()
