"""verify: proves that a run's files are as they were written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def verify(run: Annotated[Path, typer.Argument(help="The folder of a run, or of a model.")]) -> None:
    """Prove every checkpoint and model of a run by its SHA-256 sums, one line each; exit status 1 where one fails."""
    from headway.train.proof import prove

    failed = 0
    for path, size, fault in prove(run):
        failed += fault is not None
        typer.echo(f"DAMAGED\t{fault}" if fault else f"whole\t{path}\t{size:,} bytes")
    if failed:
        raise typer.Exit(1)


COMMANDS = [verify]
