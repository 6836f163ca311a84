"""Compiled feed-forwards: torch.compile fuses norm, activation, dropout and sum of each block's feed-forward branch.

Mixers are left as they are: which of their kernels runs is chosen anew for each batch, in Python. All branches of a
kind share what is compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from headway.block import Block


def compile_feedforwards(model: nn.Module) -> None:
    """Has every feed-forward branch of a model compiled when it first runs, in place, for inputs of any length."""
    branches = [m.feedforward for m in model.modules() if isinstance(m, Block) and m.feedforward is not None]
    if not branches:
        raise ValueError("compile: this model has no feed-forward, and nothing else is compiled: leave it out")
    for branch in branches:
        branch.compile(dynamic=True, fullgraph=True)


def uncompiled() -> Any:
    """What is compiled runs as it was written for as long as the block lasts: who counts FLOPs has to see them."""
    return torch.compiler.set_stance("force_eager")


@contextmanager
def told() -> Iterator[None]:
    """What the compiler cannot do is one line, not its trace."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    try:
        yield
    except (TorchDynamoException, InductorError) as error:
        reason = " ".join(str(error).split("\n\n")[0].split())[:200]
        raise ValueError(
            f"compile: torch.compile cannot do this model's feed-forwards ({reason}): leave it out"
        ) from error
