"""embed, fill, classify, answer, save: what one does with a model that is there."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from headway.hub import Loaded

Model = Annotated[str, typer.Argument(help="A model's folder, a weights file, or a hub id (owner/name).")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]
Truncate = Annotated[bool, typer.Option("--truncate", help="Cut what is longer than the model takes.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Quantize = Annotated[str | None, typer.Option(help="int8: faster and smaller, nearly as good.")]
File = Annotated[
    Path | None, typer.Option("--file", "-f", help="A file of inputs, one a line; or a table, or a folder.")
]
Field = Annotated[str, typer.Option(help="The column or key of a table (.csv .tsv .jsonl .parquet) with the text.")]
Images = Annotated[bool, typer.Option("--images", help="The file lists pictures (a model with two towers).")]


def embed(
    model: Model,
    file: Annotated[Path, typer.Argument(help="Texts, one a line; .csv .tsv .jsonl .parquet; pictures: a folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A .npy or .parquet file.")],
    field: Field = "text",
    images: Images = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a stopped run was.")] = False,
    pooling: Annotated[str | None, typer.Option(help="mean, first, last (default: as the checkpoint says).")] = None,
    normalize: Annotated[
        bool | None, typer.Option("--normalize/--raw", help="Scale to length one (default: as the checkpoint says).")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Put the checkpoint's prefix for it before texts (query); or a tower's name.")
    ] = None,
    truncate: Truncate = False,
    batch_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens a batch.")] = None,
    dtype: Dtype = "float32",
    quantize: Quantize = None,
) -> None:
    """Write a vector for each text or picture of a file, which may be larger than memory."""
    from headway.display import RowsLive
    from headway.use.stream import embed_file

    loaded = _load(model, dtype)
    again = shlex.join(["headway", "embed", model, str(file), "-o", str(out), *_given(locals()), "--resume"])
    try:
        with RowsLive(file.name) as live:
            rows, width = embed_file(
                loaded, file, out, field=field, images=images, resume=resume, watch=live.watch,
                pooling=pooling, normalize=normalize, task=task, truncate=truncate, batch_tokens=batch_tokens,
                quantize=quantize,
            )  # fmt: skip
    except KeyboardInterrupt:
        typer.echo(f"\nStopped, and nothing is lost. Go on with: {again}", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"{rows:,} vectors of {width}: {out}")


def fill(
    model: Model,
    texts: Annotated[list[str], typer.Argument(help="Texts with gaps, as in: Paris is the [MASK] of France.")],
    top: Annotated[int, typer.Option(min=1, help="Fillings of each gap.")] = 5,
    as_json: Json = False,
    dtype: Dtype = "float32",
    quantize: Quantize = None,
) -> None:
    """Say which words fill the gaps of a text, and how likely each is."""
    loaded = _load(model, dtype, quantize)
    for text in texts:
        gaps = loaded.fill(text, top=top)
        if as_json:
            typer.echo(_line({"text": text, "gaps": [[one._asdict() for one in gap] for gap in gaps]}))
            continue
        for number, gap in enumerate(gaps, 1):
            for one in gap:
                where = f"gap {number}\t" if len(gaps) > 1 else ""
                typer.echo(f"{where}{one.probability:.1%}\t{one.token}\t{one.text}")


def classify(
    model: Model,
    inputs: Annotated[list[str] | None, typer.Argument(help="Texts, or paths of pictures.")] = None,
    labels: Annotated[
        str | None, typer.Option(metavar="A,B", help="Labels of yours (a model with two towers).")
    ] = None,
    template: Annotated[str, typer.Option(help="The text that a label of yours is put into.")] = "a photo of a {}",
    file: File = None,
    field: Field = "text",
    top: Annotated[int | None, typer.Option(min=1, help="Labels to show of each (default: the likeliest).")] = None,
    truncate: Truncate = False,
    as_json: Json = False,
    dtype: Dtype = "float32",
    quantize: Quantize = None,
) -> None:
    """Say what texts or pictures are, or what the words of texts are, and how likely. A tab parts a pair of texts."""
    from headway.models import reads_pictures
    from headway.use.rows import Pictures, Source, Texts, chunks

    if bool(inputs) == (file is not None):
        raise ValueError("classify: give texts (or paths of pictures), or --file FILE: one of them")
    loaded = _load(model, dtype, quantize)
    pictured = loaded.kind == "dual" or reads_pictures(loaded.kind)
    given: Iterator[list[Any]]
    if file is not None:
        source: Source = Pictures(file, field) if pictured else Texts(file, field)
        given = chunks(source)
    else:
        given = iter([[Path(one) if pictured else one for one in inputs or []]])
    names = None if labels is None else [label.strip() for label in labels.split(",")]
    empty = True
    for part in given:
        empty = False
        if not pictured and any("\t" in one for one in part):
            part = [tuple(one.split("\t", 1)) for one in part]
        results = loaded.classify(part, names, top=top, template=template, truncate=truncate)
        for one, found in zip(part, results, strict=True):
            shown = " ".join(one) if isinstance(one, tuple) else str(one)
            typer.echo(_classified(shown, found, as_json, top or 1))
    if empty:
        raise ValueError(f"{file}: nothing to classify, it has no rows")


def answer(
    model: Model,
    question: Annotated[str, typer.Option("--question", "-q", help="What is asked.")],
    context: Annotated[str, typer.Option("--context", "-c", help="A text file, or the text itself.")],
    top: Annotated[int, typer.Option(min=1, help="Answers to show.")] = 1,
    stride: Annotated[int, typer.Option(min=0, help="Tokens that the windows of a long text share.")] = 128,
    max_answer: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 30,
    as_json: Json = False,
    dtype: Dtype = "float32",
    quantize: Quantize = None,
) -> None:
    """Find the words of a text that answer a question."""
    loaded = _load(model, dtype, quantize)
    found = loaded.answer(question, _text(context), top=top, stride=stride, max_answer=max_answer)
    for one in (found, *found.others):
        if as_json:
            record = {key: value for key, value in one._asdict().items() if key != "others"}
            typer.echo(_line(record))
        else:
            typer.echo(f"{one.score:.1%}\t{' '.join(one.text.split())}\tcharacters {one.start} to {one.end}")
    if not as_json:
        typer.echo(f"{found.no_answer_probability:.1%}\tno answer")


def save(
    model: Model,
    folder: Annotated[Path, typer.Argument(help="Where the model goes; a folder that is there is replaced.")],
    format: Annotated[str, typer.Option(help="headway, or transformers.")] = "headway",
    dtype: Dtype = "float32",
) -> None:
    """Write a model as a folder of Headway's own, or as one that transformers loads."""
    if format not in ("headway", "transformers"):
        raise ValueError(f"save: --format is headway or transformers, not {format}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: is there already and not empty: remove it, or name another folder")
    _load(model, dtype).save(folder, format=format)  # type: ignore[arg-type]
    typer.echo(f"Saved: {folder}")


COMMANDS = [embed, fill, classify, answer, save]


def _load(source: str, dtype: str, quantize: str | None = None) -> Loaded:
    from headway.hub import load

    return load(source, dtype=dtype, quantize=quantize)


def _given(options: dict[str, Any]) -> list[str]:
    """The options of `embed` that were given, to be given again."""
    words = []
    for name, default in {
        "field": "text",
        "pooling": None,
        "task": None,
        "batch_tokens": None,
        "dtype": "float32",
        "quantize": None,
    }.items():
        if options[name] != default:
            words += [f"--{name.replace('_', '-')}", str(options[name])]
    words += [f"--{name}" for name in ("images", "truncate") if options[name]]
    if options["normalize"] is not None:
        words.append("--normalize" if options["normalize"] else "--raw")
    return words


def _classified(name: str, found: Any, as_json: bool, top: int) -> str:
    """One line: of a text or picture as a whole, or of its words."""
    shown_as = name if as_json else " ".join(name.split())  # a tab or a newline of its own would break the line
    if isinstance(found, list):
        if as_json:
            return _line({"input": name, "spans": [span._asdict() for span in found]})
        return "\t".join(
            [shown_as, *(f"{span.label} {' '.join(span.text.split())} {span.probability:.1%}" for span in found)]
        )
    if as_json:
        return _line({"input": name, **found._asdict()})
    shown = list(found.probabilities.items())[:top]
    return "\t".join([shown_as, *(f"{label}\t{p:.1%}" for label, p in shown)])


def _text(given: str) -> str:
    """What a file holds, where it names one, else the words themselves; one word with a file's ending is a slip."""
    try:
        is_file, is_folder = Path(given).is_file(), bool(given) and Path(given).is_dir()
    except (OSError, ValueError):  # too long for a name
        is_file = is_folder = False
    if is_folder or (not is_file and re.fullmatch(r"\S+\.[a-z]{1,4}|[.~]{0,2}/\S+", given)):
        raise ValueError(
            f"{given}: {'a folder' if is_folder else 'no such file'}; give a text file, or the text itself"
        )
    if not is_file:
        return given
    try:
        return Path(given).read_text("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{given}: not UTF-8; convert it, for example with iconv") from None


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False)
