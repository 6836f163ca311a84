"""Commands: those of the command line that have a file of their own, found by themselves.

Each file lists its functions in COMMANDS; the name of a function is that of the command, its docstring the help.
PyTorch loads inside the functions, so that `headway --help` answers at once.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Sequence
from typing import Any


def plug_in(modules: Sequence[str] | None, option: str = "--plugin") -> None:
    """The one way to code from outside: because the user says so on the command line, never because a file does."""
    for module in modules or []:
        if "" not in sys.path:
            sys.path.append("")  # the folder one stands in, behind what is installed
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(
                f"{option} {module}: cannot import it ({error}); run where `import {module}` works"
            ) from None


def found() -> list[Callable[..., Any]]:
    """All commands, by file name."""
    files = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [command for name in files for command in importlib.import_module(f"{__name__}.{name}").COMMANDS]
