"""Activation checkpointing (1604.06174): a block keeps its input alone, and runs again on the way back.

Memory falls from all activations to one vector a token and block; a step costs one forward pass more. The generator of
random numbers is put back for the second run, so that dropout is the same and gradients are equal to the bit.
"""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from headway.block import Block


def recompute(model: nn.Module) -> None:
    """Has every block of a model run again on the way back, in place; `keep_all` undoes it."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    if not blocks:
        raise ValueError("activation_checkpointing runs blocks again, and this model has none: leave it out")
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]


def keep_all(model: nn.Module) -> None:
    """Blocks keep their activations again."""
    for module in model.modules():
        if isinstance(module, Block):
            vars(module).pop("forward", None)
