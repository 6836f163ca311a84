"""Commands: those of the command line that have a file of their own, found by themselves.

Each file lists its functions in COMMANDS; the name of a function is that of the command, its docstring the help.
PyTorch loads inside the functions, so that `headway --help` answers at once.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any


def found() -> list[Callable[..., Any]]:
    """All commands, by file name."""
    files = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [command for name in files for command in importlib.import_module(f"{__name__}.{name}").COMMANDS]
