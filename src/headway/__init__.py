"""Headway: the Transformer family, and what competes with it, in one small, fast, readable PyTorch library.

Names load when they are first used, so that `import headway` and `headway --help` cost next to nothing.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headway.adapt import adapt as adapt
    from headway.attend import attend as attend
    from headway.compare import compare as compare
    from headway.hub import load as load
    from headway.mask import Mask as Mask
    from headway.probe.look import look as look
    from headway.swap import swap as swap
    from headway.train import train as train

    from . import testing as testing

__version__ = "0.1.0"
__all__ = ["Mask", "__version__", "adapt", "attend", "compare", "load", "look", "swap", "testing", "train"]

_HOME = {
    "Mask": "mask",
    "adapt": "adapt",
    "attend": "attend",
    "compare": "compare",
    "load": "hub",
    "look": "probe.look",
    "swap": "swap",
    "testing": None,
    "train": "train",
}


class _Package(ModuleType):
    """`headway.train` is the function although `headway/train/` is also a folder: importing a submodule binds its
    name on the package, and for public names that binding is left out."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and _HOME.get(name)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'headway' has no attribute '{name}'")
    home = _HOME[name]
    module = importlib.import_module(f"headway.{home or name}")
    value = getattr(module, name) if home else module
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


sys.modules[__name__].__class__ = _Package
