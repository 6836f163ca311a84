"""What tests of objectives do with a small recipe: make its model, learn a batch by heart, take gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from headway.recipe import Recipe
from headway.train.data import Prepared, prepare
from headway.train.network import network, spec_of


def made(given: Recipe) -> tuple[Prepared, nn.Module]:
    prepared = prepare(given)
    assert given.model is not None
    torch.manual_seed(0)
    return prepared, network(spec_of(given.model, prepared), prepared.tools)


def learned(prepared: Prepared, net: nn.Module, batch: Any, steps: int, rate: float) -> float:
    """The loss a target, after so many steps on one batch."""
    optimizer = torch.optim.AdamW(net.parameters(), rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = prepared.objective(net, batch)
        (loss.total / batch.targets).backward()
        optimizer.step()
    return float(loss.plain) / batch.targets


def gradients(prepared: Prepared, net: nn.Module, batches: Sequence[Any]) -> tuple[float, list[Tensor]]:
    """The loss a target, and the gradients, of batches as micro-batches of one step, each with its own dropout."""

    @contextmanager
    def scope(part: int) -> Iterator[None]:
        torch.manual_seed(part)
        yield

    net.zero_grad()
    targets = float(sum(batch.targets for batch in batches))
    plain, count = prepared.objective.backward(net, batches, targets, scope)
    assert count == targets
    return plain / count, [p.grad.clone() for p in net.parameters() if p.grad is not None]
