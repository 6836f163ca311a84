"""swap: another mixer in a pretrained model, and what that did."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headway.commands import plug_in
from headway.commands.use import Dtype, Model

if TYPE_CHECKING:
    from headway.swap.drift import Watch


def swap(
    model: Model,
    mixer: Annotated[
        str, typer.Option(metavar="NAME:KEY=VALUE,..", help="As in longformer:window=256, attention:window=256,sinks=4")
    ],
    layers: Annotated[str | None, typer.Option(help="As in 0-5,11 or decoder.0-5 (default: all).")] = None,
    context: Annotated[int | None, typer.Option(min=1, help="The longest text from now on, in tokens.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Your text, or a folder of pictures (default: Python's documentation).")
    ] = None,
    field: Annotated[str, typer.Option(help="The column of a table that has the text.")] = "text",
    heal: Annotated[int, typer.Option(min=0, help="Steps of distillation from the original.")] = 0,
    lr: Annotated[float, typer.Option(min=1e-9, help="Its largest rate.")] = 1e-3,
    length: Annotated[int | None, typer.Option(min=4, help="Tokens a row of the text that is compared on.")] = None,
    lengths: Annotated[str, typer.Option(help="What is timed: FIRST..LAST doubles; A,B,C lists.")] = "",
    seconds: Annotated[float, typer.Option(min=0.01, help="That a timed length may take.")] = 2.0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where the new model goes.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to a file.")] = None,
    dtype: Dtype = "float32",
    plugin: Annotated[
        list[str] | None, typer.Option("--plugin", metavar="MODULE", help="Import a mixer of your own.")
    ] = None,
) -> None:
    """Replace what mixes the tokens of a pretrained model, and tell what that did to its answers, time and memory."""
    from headway.compare.cost import check_writable
    from headway.compare.cost_subjects import lengths_of
    from headway.hub import load
    from headway.store import write_text
    from headway.swap.report import Wishes, report

    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: is there already and not empty: remove it, or name another folder")
    check_writable(json_file)
    plug_in(plugin)
    wishes = Wishes(
        mixer=mixer, layers=layers, context=context, data=data, field=field, heal=heal, lr=lr, length=length,
        lengths=tuple(lengths_of(lengths)) if lengths else (), seconds=seconds,
    )  # fmt: skip
    try:
        with _live() as watch:
            watch("reading the model", 0, 1)
            done, record = report(load(model, dtype=dtype), wishes, watch, model)
    except KeyboardInterrupt:
        typer.echo("Stopped, and nothing was written.", err=True)
        raise typer.Exit(130) from None
    _tell(record)
    if json_file is not None:
        write_text(json_file, json.dumps(record, indent=1) + "\n")
        typer.echo(f"Figures: {json_file}")
    if out is not None:
        done.model.save(out)
        typer.echo(f"Saved: {out}")


COMMANDS = [swap]


@contextmanager
def _live() -> Iterator[Watch]:
    """A bar of what is being done; on a terminal alone, and gone at the end."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("")
        yield lambda what, done, total: progress.update(task, description=what, completed=done, total=total)


def _tell(record: dict[str, Any]) -> None:
    layers, exact, sizes = record["layers"], record["exactness"], record["parameters"]
    options = {key: value for key, value in layers[0]["after"].items() if layers[0]["before"].get(key) != value}
    named = options.pop("name", layers[0]["after"]["name"])
    typer.echo(f"mixer\t{named} {' '.join(f'{key}={value}' for key, value in options.items())}".rstrip())
    typer.echo(f"layers\t{len(layers)}; parameters {sizes['original']:,} -> {sizes['swapped']:,}")
    up_to = {None: "of any length", 0: "at no length"}.get(exact["tokens"], f"up to {exact['tokens'] or 0:,} tokens")
    typer.echo(f"equal\t{up_to}: {exact['why']}")
    for what, words in {"kept": "kept", "copied": "copied", "new": "made anew", "left": "without a place"}.items():
        if record["weights"][what]:
            typer.echo(f"weights\t{words}: {', '.join(record['weights'][what])}")
    for drift in record["drift"]:
        for line in _drift_lines(drift):
            typer.echo(line)
    if "pays" in record:
        for line in _pays_lines(record["pays"]):
            typer.echo(line)


def _drift_lines(drift: dict[str, Any]) -> list[str]:
    """A line a figure: before and, where it was healed, after."""
    told = [drift["before"], *([drift["after"]] if "after" in drift else [])]
    first = told[0]
    size = f"{first['rows']} rows of {first['length']:,} tokens" if first["length"] else f"{first['rows']} pictures"
    lines = [f"drift\ton {size}{', before -> after healing' if len(told) > 1 else ''}"]

    def line(name: str, values: list[Any], style: str) -> None:
        if values[0] is not None:
            lines.append(f"drift\t{name}\t{' -> '.join(format(value, style) for value in values)}")

    for stack, layers in first["cosine"].items():
        name = "" if len(first["cosine"]) == 1 else f"{stack} "
        for i in range(len(layers)):
            line(f"cosine behind {name}layer {i}", [one["cosine"][stack][i] for one in told], ".4f")
    line("cosine of the text's vector", [one["vector"] for one in told], ".4f")
    line("KL of predictions, nats", [one["kl"] for one in told], ".4f")
    line("same likeliest answer", [one["agreement"] for one in told], ".1%")
    if metric := first["metric"]:
        name, style = ("perplexity", ".3f") if metric == "perplexity" else ("accuracy at hidden tokens", ".1%")
        was = format(first["original"], style)
        line(f"{name} (the original's {was})", [one["swapped"] for one in told], style)
    return lines


def _pays_lines(pays: dict[str, Any]) -> list[str]:
    lines = ["speed\ttokens\toriginal\tswapped\tfaster by\tmemory\tswapped"]
    for old, new in zip(pays["original"]["points"], pays["swapped"]["points"], strict=True):
        cells = [f"{old['length']:,}", *(_time(point) for point in (old, new))]
        both = "seconds" in old and "seconds" in new
        cells.append(f"{old['seconds']['median'] / new['seconds']['median']:.2f}x" if both else "-")
        lines.append("speed\t" + "\t".join([*cells, *(_memory(point) for point in (old, new))]))
    return [*lines, f"pays\there {pays['crossover']['words']} tokens"]


def _time(point: dict[str, Any]) -> str:
    return f"{1000 * point['seconds']['median']:.1f} ms" if "seconds" in point else point["skipped"]


def _memory(point: dict[str, Any]) -> str:
    extra = point.get("peak_extra_bytes")
    return "-" if extra is None else f"{extra / 2**20:,.1f} MiB"
