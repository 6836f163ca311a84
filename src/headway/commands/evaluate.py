"""evaluate: what a model does that is only prompted: options are scored, or a pattern finds what it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headway.commands.use import Dtype, Quantize

if TYPE_CHECKING:
    from headway.compare.evaluate import Question


def evaluate(
    model: Annotated[str, typer.Argument(help="A model's folder, a weights or GGUF file, or a hub id (owner/name).")],
    task: Annotated[str, typer.Option(help="A task's YAML file, or the name of a built-in one (packages).")],
    set: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set any key of it.")] = None,
    show: Annotated[int, typer.Option(min=0, help="Print so many prompts exactly as they are sent.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Prompts that go together.")] = 8,
    quantize: Quantize = None,
    dtype: Dtype = "float32",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write figures and answers to a file.")] = None,
) -> None:
    """Measure what a model does when it is only prompted, with no example or a few: accuracy beside guessing."""
    from headway.compare.cost import check_writable
    from headway.compare.evaluate import evaluate as measure
    from headway.compare.evaluate import read_task
    from headway.hub import load

    read = read_task(task, set or [])  # a mistake costs no loading
    check_writable(json_file)
    shown = 0

    def tell(text: str, question: Question) -> None:
        nonlocal shown
        shown += 1
        if shown <= show:
            typer.echo(f"--- prompt {shown}, {len(question.ids)} tokens\n{text}\n--- right: {question.right!r}")
            if question.options:
                typer.echo(f"--- options: {', '.join(map(repr, question.options))}")

    with _live() as watch:
        found = measure(load(model, dtype=dtype, quantize=quantize), read, batch=batch, show=tell, watch=watch)
    how = f"{read.shots} shots, {'chat' if read.chat else 'plain'}, {read.score}"
    typer.echo(f"{read.title or read.name} ({how})")
    typer.echo(f"accuracy   {found.accuracy:.1%} (standard error {found.error:.1%}, {found.rows} held-out rows)")
    if found.chance:
        typer.echo(f"guessing   {found.chance:.1%}")
    typer.echo(f"commonest  {found.commonest:.1%}, the commonest answer of the training rows")
    typer.echo(f"prompts    {found.prompt_tokens:.0f} tokens on average")
    if found.unmatched:
        typer.echo(f"unmatched  {found.unmatched} answers in which the pattern found nothing")
    if json_file:
        _save(json_file, {"model": model, "task": read, **found._asdict()})
        typer.echo(f"Figures: {json_file}")


@contextmanager
def _live() -> Iterator[Callable[[int, int], None]]:
    """A bar of the questions that are answered, on a terminal, from the first on: prompts are shown before."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    bar = progress.add_task("questions", total=None)

    def watch(done: int, total: int) -> None:
        progress.start()
        progress.update(bar, completed=done, total=total)

    try:
        yield watch
    finally:
        progress.stop()


def _save(path: Path, record: dict[str, object]) -> None:
    import msgspec

    from headway.store import write_text

    write_text(path, msgspec.json.format(msgspec.json.encode(record), indent=1).decode())


COMMANDS = [evaluate]
