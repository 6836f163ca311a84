"""Alignments: how a decoder's tokens attend to its source, block by block, while the model runs its fast kernel."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headway.models.seq2seq import Model
from headway.probe.capture import capture


@torch.no_grad()
def cross_maps(
    model: Model, source: Int[Tensor, "B S"], target: Int[Tensor, "B T"], valid: Tensor | None = None
) -> list[Float[Tensor, "B H T S"]]:
    """One map a decoder block whose cross mixer forms one, first to last; rows sum to one. Empty without attention."""
    _, seen = capture(model, lambda: model(source, target, valid))
    return [one.glance().rows(slice(None)) for one in seen if one.place.slot == "cross" and one.place.has_maps]
