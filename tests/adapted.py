"""A tiny decoder to adapt, and what it gives: for every test of adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from headway import models
from headway.hub import Loaded

DECODER = {
    "kind": "decoder", "width": 32, "vocab": 50,
    "stack": {"blocks": [{"mixer": {"name": "attention", "heads": 4, "bias": True},
                          "feedforward": {"hidden": 64, "gated": True}}], "repeat": 2},
    "heads": {"lm": {"outputs": 50, "tie": True, "bias": False}, "classify": {"outputs": 3, "pool": "last"}},
}  # fmt: skip
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9]])


def tiny(seed: int = 0) -> Loaded:
    torch.manual_seed(seed)
    return Loaded(models.build(DECODER), DECODER)


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    net = getattr(model, "net", model)
    with torch.no_grad():
        return net.head("lm", net(ids))


def stirred(model: Any, seed: int = 1) -> Any:
    """Every trained number of the model is changed."""
    torch.manual_seed(seed)
    for parameter in model.net.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter.data, std=0.2)
    return model
