"""look: what a model attends to, as a page to look at and figures to work with."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headway.commands.use import Dtype, Model

if TYPE_CHECKING:
    from headway.hub import Loaded
    from headway.probe.record import Record

PAGE = Path("look.html")
LONGEST_TITLE = 160


def look(
    model: Model,
    text: Annotated[str | None, typer.Argument(help="What it reads (of a model of pictures: leave it out).")] = None,
    second: Annotated[
        str | None, typer.Option("--with", help="The other text of a pair, or what an encoder-decoder writes.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="The picture that it sees.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help=f"The page (default: {PAGE}, unless --json is given).")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write summaries and largest weights.")] = None,
    dtype: Dtype = "float32",
) -> None:
    """Show what every head of a model looks at, on one page that works anywhere."""
    from headway.compare.cost import check_writable
    from headway.hub import load

    page = out or (None if json_file else PAGE)
    for file in (page, json_file):
        check_writable(file)
    if page and page == json_file:
        raise ValueError(f"-o and --json both name {page}: name two files")
    if page:
        from headway.probe.page import write_page  # jinja2 is an extra: better missed before the model runs
    loaded = load(model, dtype=dtype)
    record = _record(loaded, model, text, second, image)
    _tell(record)
    if page:
        write_page(record, page)
        typer.echo(f"Page: {page}")
    if json_file:
        from headway.probe.record import figures
        from headway.store import write_text

        write_text(json_file, _json(figures(record)))
        typer.echo(f"Figures: {json_file}")


COMMANDS = [look]


def _json(told: dict[str, Any]) -> str:
    try:
        return json.dumps(told, separators=(",", ":"), allow_nan=False)
    except ValueError:
        raise ValueError(
            "look: some figures are no numbers, and JSON has no word for them: try --dtype float32"
        ) from None


def _record(loaded: Loaded, name: str, text: str | None, second: str | None, image: Path | None) -> Record:
    from headway.probe.look import look as run
    from headway.probe.show import record_of

    pictured = loaded.kind == "vision"
    if text is None and not pictured:
        raise ValueError('look: nothing to look at: give a text, as in: headway look MODEL "The cat sat on the mat"')
    if pictured and (image is None or text is not None):
        raise ValueError("look: this model reads pictures alone: give --image FILE and no text")
    given: dict[str, Any] = {} if pictured or image is None else {"image": image}
    found = run(loaded, image if pictured else text, second, **given)
    title = image.name if image and text is None else str(text)
    title = title if len(title) <= LONGEST_TITLE else f"{title[: LONGEST_TITLE - 1]}…"
    return record_of(found, title, _short(name))


def _short(name: str) -> str:
    """The last part of a path that says something."""
    parts = [part for part in Path(name).parts if part not in ("model", "/", ".")]
    return parts[-1] if parts else name


def _tell(record: Record) -> None:
    """One line a pattern: how many heads have it, and the clearest."""
    heads = [(head, place, i) for place in record.places for i, head in _numbered(record, place)]
    counts = Counter(head.pattern for head, _, _ in heads if head.pattern)
    for pattern, count in counts.most_common():
        best, place, i = max((one for one in heads if one[0].pattern == pattern), key=lambda one: one[0].score or 0.0)
        stack = f"{place.stack} " if len({one.stack for one in record.places}) > 1 else ""
        where = f"{stack}layer {place.layer} head {i}" + (" (cross)" if place.slot == "cross" else "")
        typer.echo(f"{pattern}\t{count} head{'' if count == 1 else 's'}\tclearest: {where}, {best.score:.2f}")


def _numbered(record: Record, place: Any) -> list[tuple[int, Any]]:
    start = sum(one.heads for one in record.places[: record.places.index(place)])
    return list(enumerate(record.heads[start : start + place.heads]))
