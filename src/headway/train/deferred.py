"""Deferred: a model that its ranks cut is never whole on any of them.

Linear maps give their memory back as they are built; then each block is drawn, cut, and its whole freed before the
next one is drawn. The numbers are drawn in one process's order, so that the weights are one process's to the bit. What
stands outside the blocks (embeddings, heads) and what is no linear map (convolutions) is whole until it is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from headway import models
from headway.layers import initialise
from headway.objectives._tools import Tools
from headway.train.network import network
from headway.train.ranks import Parallel, Ranks, alone


def shared(spec: dict[str, Any], tools: Tools, ranks: Ranks, parallel: Parallel, *, half: bool = False) -> nn.Module:
    """A model on this rank's device, fresh or loaded, and what of it is this rank's. `half`: it computes in bf16.

    A model that is loaded is whole in memory anyway, and is cut afterwards.
    """
    if ranks.size == 1:
        return network(spec, tools).to(ranks.device)
    cut = ranks.cutter(parallel, half)
    if parallel == "fsdp" and tools.start is None:
        with hollow():
            model = models.assemble(spec)
        blocks = alone(model)
        draw(model, blocks, lambda block: cut(block.to(ranks.device)))
        model.to(ranks.device)
    else:
        model = network(spec, tools).to(ranks.device)
        for block in alone(model):
            cut(block)
    cut(model)
    return model


@contextmanager
def hollow() -> Iterator[None]:
    """Linear maps that are built inside end up without memory: `initialise` draws all of them anew."""

    def emptied(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        if isinstance(module, nn.Linear):
            for key, p in list(module.named_parameters(recurse=False)):
                setattr(module, key, nn.Parameter(p.to("meta"), p.requires_grad))

    handle = register_module_module_registration_hook(emptied)
    try:
        yield
    finally:
        handle.remove()


def draw(model: nn.Module, blocks: Sequence[nn.Module], cut: Callable[[nn.Module], None]) -> None:
    """Gives a hollow model the weights that `models.build` would give it; each block is cut as soon as it has them."""
    order = list(model.modules())
    place = {id(module): i for i, module in enumerate(order)}
    ends = {max(place[id(inner)] for inner in block.modules()): block for block in blocks}
    filled: dict[int, tuple[Tensor, nn.Parameter]] = {}  # with the key's tensor, so that no id is given twice
    for i, module in enumerate(order):
        _fill(module, filled)
        if not list(module.children()):
            initialise(module, model.branches)  # type: ignore[arg-type]
        if (block := ends.get(i)) is not None:
            own = {id(p) for p in block.parameters()}
            filled = {key: pair for key, pair in filled.items() if id(pair[1]) not in own}
            cut(block)


def _fill(module: nn.Module, filled: dict[int, tuple[Tensor, nn.Parameter]]) -> None:
    """Memory for what has none; what modules share, they go on sharing."""
    for key, p in list(module.named_parameters(recurse=False)):
        if p.is_meta:
            fresh = nn.Parameter(torch.empty_like(p, device="cpu"), p.requires_grad)
            setattr(module, key, filled.setdefault(id(p), (p, fresh))[1])
