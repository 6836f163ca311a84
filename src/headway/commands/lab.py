"""headway lab: what is commonly said of architectures, measured here: one page and one JSON file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headway.commands import plug_in

if TYPE_CHECKING:
    from headway.compare.lab import Watch

MARKS = {"holds": "✓", "partly": "◐", "fails": "✗", "open": "○"}


def lab(
    quick: Annotated[bool, typer.Option("--quick/--full", help="Ten minutes on two cores, or two hours.")] = True,
    only: Annotated[list[str] | None, typer.Option(metavar="NAME", help="A claim; again for more of them.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda (default: a GPU where there is one).")] = None,
    mixer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE[:KEY=VALUE]", help="A mixer of your own joins the tables that have a place for it."
        ),
    ] = None,
    task: Annotated[list[str] | None, typer.Option(metavar="MODULE[:KEY=VALUE]", help="A task of your own.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of lab.html and lab.json.")] = Path("lab"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run in that folder stood.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of everything drawn.")] = 0,
    claims: Annotated[bool, typer.Option("--claims", help="List the claims, and measure nothing.")] = False,
) -> None:
    """Measure what is said of Transformers, RNNs and CNNs on this machine, and write a page of it."""
    from headway.compare.claims import find, names
    from headway.compare.lab import lab as measured

    if claims:
        for name in names():
            typer.echo(f"{find(name).SECTION}  {name:28} {find(name).TITLE}")
        return
    own = [[_named(option, text) for text in texts or []] for option, texts in (("--mixer", mixer), ("--task", task))]
    with _live() as watch:
        results = measured(only, quick, device, *own, out=out, seed=seed, resume=resume, watch=watch)
    _tell(results)
    typer.echo(f"\nFigures: {out / 'lab.json'}\nPage: {out / 'lab.html'}")
    if results["stopped"]:
        typer.echo("Stopped before the end: go on by the same command with --resume.", err=True)
        raise typer.Exit(130)


COMMANDS = [lab]


def _named(option: str, text: str) -> dict[str, Any]:
    """`my.module:key=value` as {"name": ..., key: value}; a module is imported because the user names it here."""
    from headway.spec import named

    found = named(text, f"{option} {text}", "MODULE:KEY=VALUE, as in my.mixer:heads=4")
    if "." in found["name"]:
        plug_in([found["name"]], option)
    return found


@contextmanager
def _live() -> Iterator[Watch]:
    """One bar over all claims."""
    from rich.progress import BarColumn, Progress, TextColumn

    from headway.display import console

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[count]}"),
               TextColumn("{task.fields[left]}", style="cyan"))  # fmt: skip
    progress = Progress(*columns, console=console, refresh_per_second=4, transient=True)
    bar = progress.add_task("", total=1.0, count="", left="")

    def watch(event: Any) -> None:
        progress.start()  # with the first event, so that a mistake of the user's shows no bar
        minutes, seconds = divmod(int(event.left), 60)
        left = f"{'perhaps' if event.bound else 'about'} {minutes}:{seconds:02d} left"
        what = f"{event.title}: {event.what}" if event.what else event.title
        what = what if len(what) <= 40 else what[:39] + "…"
        count = f"{event.number} of {event.total}"
        progress.update(bar, description=what, completed=event.share, count=count, left=left)

    try:
        yield watch
    finally:
        if progress.live.is_started:
            progress.stop()


def _tell(results: dict[str, Any]) -> None:
    """One line a claim, and the sentence that counts."""
    from headway.compare.lab.page import KINDS, verdict

    for claim in results["claims"]:
        mark = MARKS[KINDS.get(claim["verdict"], "open")]
        typer.echo(f"{mark} {claim['section']}  {claim['title']}: {claim['failed'] or claim['because']}")
    typer.echo(f"\n{verdict(results['claims'])}")
