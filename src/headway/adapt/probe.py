"""Linear probe (1610.01644): the model stays as it is, and nothing but the new heads (`heads=`) trains.

It stands at nothing, so that what is saved is the heads alone.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from headway.adapt._base import Adapter


class Method(Adapter):
    """It has no options."""

    def __init__(self, module: Any, outputs: slice | None = None) -> None:
        super().__init__()

    @classmethod
    def fits(cls, module: nn.Module, name: str) -> bool:
        return False
