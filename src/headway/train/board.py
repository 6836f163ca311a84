"""Board: a run's figures for TensorBoard, beside the JSON lines that are always written (`log: tensorboard`).

`tensorboard --logdir runs` shows them. What a killed run wrote after its last checkpoint is hidden when it goes on.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headway.recipe import Recipe


def check_log(recipe: Recipe) -> None:
    """Whether what a recipe logs to is there, before anything is trained."""
    if recipe.log == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("log: tensorboard needs the package tensorboard: pip install 'headway[tensorboard]'")


class Board:
    """Writes below `folder`/tensorboard; the first step that is written is where the run goes on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "tensorboard"
        self._writer: Any = None

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures of a step, by name."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self.folder, purge_step=step)
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """All of it is on the disk."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
