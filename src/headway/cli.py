"""The command line: parses, calls the library, prints. A user's mistake is one line, never a traceback.

PyTorch loads inside the commands, so that `headway --help` answers at once.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headway import commands

if TYPE_CHECKING:
    from headway.hub import Loaded

app = typer.Typer(
    help="Train, compare and use sequence models. Start with: headway demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set any key of the recipe.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run (default: runs/NAME).")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run that is there.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Remove the run that is there and start anew.")]
Plugin = Annotated[list[str] | None, typer.Option("--plugin", metavar="MODULE", help="Import a mixer of your own.")]


@app.command()
def demo(out: Out = None, resume: Resume = False, overwrite: Overwrite = False, set: Set = None) -> None:
    """Train four kinds of model to pronounce English, 45 seconds each, and show what each reached and cost."""
    _compare("demo", out, resume, overwrite, set, _command("demo", None, set, out))


@app.command()
def compare(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a built-in one.")],
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    set: Set = None,
    plugin: Plugin = None,
) -> None:
    """Train every model of a recipe under one equal budget; write results.json, report.html and the models."""
    commands.plug_in(plugin)
    _compare(recipe, out, resume, overwrite, set, _command("compare", recipe, set, out, plugin))


@app.command()
def train(
    recipe: Annotated[str | None, typer.Argument(help="A recipe file, or the name of a built-in one.")] = None,
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    set: Set = None,
    plugin: Plugin = None,
) -> None:
    """Train one model from a recipe."""
    if recipe is None:
        _explain_training()
        return
    commands.plug_in(plugin)
    import headway
    from headway.display import summary
    from headway.recipe import read

    chosen = read(recipe, set or [])
    folder = out or Path("runs") / chosen.name
    again = _command("train", recipe, set, out, plugin)
    result = _watched(headway.train, recipe, out, resume, overwrite, set, again)
    if _silent():
        return
    summary([result], chosen.data.source == "cmudict")
    how = result.get("use", 'run {} "TEXT"').replace('"TEXT"', _example(chosen.data.source))
    typer.echo(f"\nUse it: headway {how.replace('{}', str(folder))}")


@app.command()
def run(
    model: Annotated[Path, typer.Argument(help="The folder of a trained model.")],
    words: Annotated[list[str] | None, typer.Argument(help="What to answer; else --file or standard input.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="A text file, one input a line.")] = None,
    beams: Annotated[int, typer.Option(min=1, help="Beginnings that beam search keeps; 1 is greedy.")] = 1,
    plugin: Plugin = None,
) -> None:
    """Use a trained model: one answer a line, as they come. Several inputs are told apart by a tab."""
    commands.plug_in(plugin)
    from headway.hub import load

    loaded = load(model)
    if words:
        _warn_of_unknown(loaded, words)
        for word, found in zip(words, loaded.generate(words, beams=beams), strict=True):
            typer.echo(found.text if len(words) == 1 else f"{word}\t{found.text}")
        return
    if file is None and sys.stdin.isatty():
        raise ValueError("nothing to answer: give words, --file FILE, or pipe lines into standard input")
    for lines in _lines(file):
        _warn_of_unknown(loaded, lines)
        for word, answer in zip(lines, loaded.generate(lines, beams=beams), strict=True):
            typer.echo(f"{word}\t{answer.text}")
        sys.stdout.flush()


@app.command()
def cost(
    mixers: Annotated[
        str,
        typer.Option(metavar="A,B", help="What to measure, as in longformer:window=256,kernel:sdpa (default: all)."),
    ] = "",
    lengths: Annotated[str, typer.Option(help="FIRST..LAST doubles; A,B,C lists.")] = "512..65536",
    width: Annotated[int, typer.Option(min=1, help="Width of a token.")] = 512,
    heads: Annotated[int, typer.Option(min=1, help="Heads, where a mixer has heads.")] = 8,
    train: Annotated[bool, typer.Option("--train", help="Forward and backward instead of forward.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda (default: a GPU where there is one).")] = None,
    seconds: Annotated[float, typer.Option(help="Seconds that a point may take; longer lengths are skipped.")] = 5.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to a file.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with plots and tables.")] = None,
    plugin: Plugin = None,
) -> None:
    """Measure time and memory of every mixer and kernel by length here, and from where each beats full attention."""
    commands.plug_in(plugin)
    from headway.compare.cost import check_writable, measure, save
    from headway.compare.cost_subjects import entries_of, lengths_of
    from headway.display import CostLive, cost_summary

    chosen, tokens = entries_of(mixers), lengths_of(lengths)
    for file in (json_file, html):
        check_writable(file)
    if json_file and json_file == html:
        raise ValueError(f"--json and --html both name {html}: name two files")
    if html:
        from headway.compare.cost_page import write_cost_page  # jinja2 is an extra: better missed before measuring
    with CostLive() as live:
        results = measure(
            chosen, lengths=tokens, width=width, heads=heads, train=train, device=device, seconds=seconds,
            watch=live.watch,
        )  # fmt: skip
    cost_summary(results)
    if json_file:
        save(results, json_file)
        typer.echo(f"Figures: {json_file}")
    if html:
        write_cost_page(results, html)
        typer.echo(f"Page: {html}")
    if results["stopped"]:
        typer.echo("Stopped before the end: what had been measured is above.", err=True)
        raise typer.Exit(130)


def _compare(recipe: str, out: Path | None, resume: bool, overwrite: bool, set: list[str] | None, again: str) -> None:
    import headway
    from headway.compare import best
    from headway.display import summary
    from headway.recipe import read

    folder = out or Path("runs") / read(recipe, set or []).name
    results = _watched(headway.compare, recipe, out, resume, overwrite, set, again)
    summary(results["models"], results["data"]["source"] == "cmudict")
    winner, metric = best(results), results["metric"]["name"].replace("_", " ")
    what = "Fewest errors" if metric == "wer" else f"Best by {metric}"
    typer.echo(f"\n{what}: {winner['title']}. Report: {folder / 'report.html'}  Figures: {folder / 'results.json'}")
    how = winner.get("use", 'run {} "TEXT"').replace('"TEXT"', _example(results["data"]["source"]))
    typer.echo(f"Use it: headway {how.replace('{}', str(folder / winner['name']))}")


def _watched(
    action: Callable[..., dict[str, Any]],
    recipe: str,
    out: Path | None,
    resume: bool,
    overwrite: bool,
    set: list[str] | None,
    again: str,
) -> dict[str, Any]:
    """Runs `headway.train` or `headway.compare` under live bars; `again` is the command that resumes it."""
    from headway.display import Live

    chosen = {"out": out, "overrides": set or [], "resume": resume, "overwrite": overwrite}
    if _silent():
        return action(recipe, **chosen)
    with Live() as live, _resumable(again):
        return action(recipe, **chosen, watch=live.watch, note=live.note)


def _silent() -> bool:
    """Whether this is one of several processes that torchrun started, and not the one that speaks for them."""
    return os.environ.get("RANK", "0") != "0"


@contextmanager
def _resumable(again: str) -> Iterator[None]:
    """Says how to go on when somebody stops a run."""
    from headway.train import Interrupted

    try:
        yield
    except (Interrupted, KeyboardInterrupt) as stop:
        typer.echo(f"\nStopped, and nothing is lost. Go on with: {again} --resume", err=True)
        raise typer.Exit(0 if isinstance(stop, Interrupted) and stop.terminated else 130) from None


def _command(
    name: str, recipe: str | None, set: list[str] | None, out: Path | None, plugin: list[str] | None = None
) -> str:
    """The command line that was given, to be given again."""
    words = ["headway", name, *([recipe] if recipe else [])]
    words += [word for assignment in set or [] for word in ("--set", assignment)]
    words += [word for module in plugin or [] for word in ("--plugin", module)]
    return shlex.join([*words, *(["--out", str(out)] if out else [])])


def _lines(file: Path | None) -> Iterator[list[str]]:
    """Lines that are there already, together: a slow pipe is answered line by line, a file in large batches."""
    name, number, rest = str(file or "standard input"), 0, b""
    with file.open("rb") if file else nullcontext(sys.stdin.buffer) as stream:
        while chunk := stream.read1(1 << 15):  # type: ignore[union-attr]
            *whole, rest = (rest + chunk).split(b"\n")
            yield [line for line in (_decoded(raw, name, number + i + 1) for i, raw in enumerate(whole)) if line]
            number += len(whole)
    if last := _decoded(rest, name, number + 1):
        yield [last]


def _decoded(raw: bytes, name: str, number: int) -> str:
    try:
        return raw.decode("utf-8").strip("\ufeff \t\r")  # the mark that Excel writes, and Windows' line ends
    except UnicodeDecodeError:
        raise ValueError(f"{name}:{number}: not UTF-8; convert it, for example with iconv") from None


def _warn_of_unknown(loaded: Loaded, texts: list[str]) -> None:
    for text in texts:
        if unknown := loaded.unknown(text):
            typer.echo(f"headway: '{text}' has {', '.join(map(repr, unknown))}, which the model never saw", err=True)


def _explain_training() -> None:
    from headway.recipe import built_in, read

    typer.echo("headway train RECIPE trains one model from a recipe: a YAML file, or one of these built-in ones:\n")
    for name, line in built_in().items():
        command = "compare" if read(name).models else "train"
        typer.echo(f"  {command:7} {name:10} {line}")
    typer.echo(
        "\nAny key can be set: headway train pronounce --set budget.tokens=2000000 --set optimizer.lr=1e-3\n"
        "Your own data: copy a recipe (docs/recipes.md) and set data.source to a file, a glob or a folder of tables, "
        "texts or pictures."
    )


def _example(source: str) -> str:
    return {"cmudict": "headway", "documentation": '"The"', "library": '"def main("'}.get(source, '"TEXT"')


for command in commands.found():
    app.command()(command)


def main() -> None:
    """The entry point: a user's mistake ends in one line and exit status 1, Ctrl-C in 130."""
    try:
        app()
    except SystemExit as end:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # threads that PyTorch keeps for other ranks can abort an exit
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code if isinstance(end.code, int) else 0 if end.code is None else 1)
        raise
    except ValueError as error:
        if not _silent() or type(error).__name__ == "OfRank":
            typer.echo(f"headway: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("headway: stopped", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:  # no right to read or write there, a full disk
        typer.echo(f"headway: {error.filename or 'cannot go on'}: {error.strerror}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
