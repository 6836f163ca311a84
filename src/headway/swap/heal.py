"""Heal: a short distillation of a swapped model from the original (1503.02531).

Least of KL(p || p') + mean over layers of 1 - cos(h_l, h'_l), over the user's own text. Only what the swap changed is
trained: the mixers that are new, and tables of positions that were extended. Everything else stays bit for bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.hub import Loaded
from headway.objectives.distill import divergence
from headway.recipe import OptimizerSpec
from headway.swap.drift import Watch
from headway.swap.reading import Batch, Seen, batches, read
from headway.train.optim import build_optimizers, set_rate

BATCH = 1024  # tokens of a step, or one row


def heal(
    original: Loaded,
    swapped: Loaded,
    rows: Tensor,
    steps: int,
    touched: Collection[str],
    *,
    lr: float = 1e-3,
    watch: Watch = lambda what, done, total: None,
) -> list[float]:
    """Trains the parameters of `swapped` whose names are `touched`, in place; the loss at each step.

    Stopped by Ctrl-C or an error, the weights are as they were before.
    """
    spec = OptimizerSpec(name="adamw", lr=lr, warmup=min(20, steps // 10), betas=(0.9, 0.98), weight_decay=0.0)
    net = swapped.net
    wanted = {name: p for name, p in net.named_parameters() if name in touched}
    if not wanted:
        raise ValueError("heal: what was put in has no weights that could be trained: leave heal out")
    before = {name: p.detach().clone() for name, p in wanted.items()}
    kept = {name: p.requires_grad for name, p in net.named_parameters()}
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in wanted)
    losses: list[float] = []
    try:
        optimizers = build_optimizers(net, spec)
        for step, batch in enumerate(itertools.islice(_endless(original, rows), steps)):
            watch("healing", step, steps)
            set_rate(optimizers, spec, step, step / steps)
            losses.append(_step(original, swapped, batch, list(wanted.values()), optimizers, spec.clip))
    except BaseException:
        with torch.no_grad():
            for name, parameter in wanted.items():
                parameter.copy_(before[name])
        raise
    finally:
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(kept[name])
            parameter.grad = None
    return losses


def loss_of(told: Seen, mine: Seen) -> Tensor:
    """What is minimised: of predictions and of states, both zero where the two models are one."""
    layers = [(a, b) for stack, each in told.layers.items() for a, b in zip(each, mine.layers[stack], strict=True)]
    apart = torch.stack([1 - F.cosine_similarity(a.float(), b.float(), dim=-1).mean() for a, b in layers]).mean()
    if len(told.asked) == 0:
        return apart
    parts = zip(told.logits(), mine.logits(), strict=True)
    return apart + torch.stack([divergence(b, a, 1.0) for a, b in parts]).sum() / len(told.asked)


def _step(
    original: Loaded,
    swapped: Loaded,
    batch: Batch,
    parameters: list[torch.nn.Parameter],
    optimizers: list[torch.optim.Optimizer],
    clip: float,
) -> float:
    with torch.no_grad():
        told = read(original, batch)
    loss = loss_of(told, read(swapped, batch))
    if not bool(loss.isfinite()):
        raise ValueError(f"heal: the loss is {float(loss)}: take a smaller rate, or fewer new layers at once")
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def _endless(model: Loaded, rows: Tensor) -> Iterator[Batch]:
    """Rows in an order of their own each time through, hidden tokens drawn anew."""
    for epoch in itertools.count():
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(epoch))
        yield from batches(model, rows[order], seed=epoch, tokens=BATCH)
