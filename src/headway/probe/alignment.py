"""Alignments: how a decoder's tokens attend to its source, recomputed from what the cross mixers were given.

The model runs with its fast kernel; each cross mixer's inputs are captured by a hook and its map is computed after.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headway.models.seq2seq import Model


@torch.no_grad()
def cross_maps(
    model: Model, source: Int[Tensor, "B S"], target: Int[Tensor, "B T"], valid: Tensor | None = None
) -> list[Float[Tensor, "B H T S"]]:
    """One map a decoder block whose cross mixer forms one, first to last; rows sum to one. Empty without attention."""
    mixers = [block.cross.inner for block in model.decoder.blocks if block.cross is not None]
    mixers = [mixer for mixer in mixers if hasattr(mixer, "map")]
    given: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    handles = [
        mixer.register_forward_pre_hook(
            lambda module, inputs, named, i=i: given.__setitem__(i, (inputs, named)), with_kwargs=True
        )
        for i, mixer in enumerate(mixers)
    ]
    try:
        model(source, target, valid)
    finally:
        for handle in handles:
            handle.remove()
    return [
        mixer.map(inputs[0], mask=named["mask"], pos=named["pos"], context=named["context"])
        for mixer, (inputs, named) in ((mixers[i], given[i]) for i in sorted(given))
    ]
