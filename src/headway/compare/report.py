"""The comparison page: results in, one self-contained HTML file out, readable offline and without script.

Wording and figures are computed here, shapes in figures.py, layout in templates/report.html.j2.
A figure that is missing or not finite is shown as an en dash and takes no part in any ranking.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from headway.compare.figures import (
    COLOURS,
    DASH,
    MARKERS,
    BarChart,
    HeatMap,
    LineChart,
    bar_chart,
    compact,
    finite_points,
    heat_map,
    line_chart,
    listed,
    number,
    whole_text,
)
from headway.store import write_text

try:
    import jinja2  # an extra, missed when this module is imported: before hours of training, not behind them
except ModuleNotFoundError:
    raise ValueError("the report needs the package jinja2: pip install 'headway[report]'") from None

FIXED_VECTOR = "rnn"  # the family whose decoder sees the input only through one vector
FIXED_VECTOR_TWIN = "rnn_attention"  # the same network with attention: the fairest reference for it
SAMPLE_ROWS = 40
ALIGNED_WORDS = 6
COUNTED = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

Model = Mapping[str, Any]


def write_report(results: Mapping[str, Any], path: Path) -> None:
    """Write the page for `results` (the contents of results.json) to `path`, whole or not at all."""
    write_page(render(results), path)


def write_page(text: str, path: Path) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # "replace": a lone surrogate in somebody's data must not cost them the whole page.
    write_text(path, text.encode("utf-8", errors="replace").decode("utf-8"))


def render(results: Mapping[str, Any]) -> str:
    """The page as text."""
    return filled("report.html.j2", page(results))


def filled(template: str, values: Mapping[str, Any]) -> str:
    """One of `templates/` with its values, every string of them escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)


def page(results: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the template shows."""
    models, data = results.get("models") or [], results.get("data") or {}
    terms = Terms.of(data)
    names = [title(model) for model in models]
    return {
        "title": results.get("title") or results.get("name") or "Comparison",
        "created": when(results.get("created")),
        "what": what_was_compared(models, data, results.get("budget") or {}, terms),
        "verdict": verdict(models, data, terms),
        "terms": terms,
        "errors": True,
        "names": names,
        "colours": COLOURS,
        "markers": MARKERS,
        "columns": columns(terms),
        "costs": cost_rows(models, columns(terms)),
        "curves": curves(models),
        "lengths": lengths(models, terms),
        "samples": samples(models),
        "alignments": alignments(models),
        "settings": settings(results, data),
        "work": [[title(m), *(shown(m.get(key), compact) for key in ("seconds", "steps", "tokens"))] for m in models],
        "command": results.get("command") or "",
    }


@dataclass(frozen=True)
class Terms:
    """What the two error rates, and the things read and written, are called for this task."""

    error: str
    error_short: str
    whole: str
    whole_short: str
    example: str
    letters: str
    phonemes: str

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Terms:
        if data.get("source") == "cmudict":
            return cls("phoneme error rate", "PER", "word error rate", "WER", "word", "letters", "phonemes")
        return cls("token error rate", "TER", "sequence error rate", "SER", "example", "input tokens", "output tokens")


def title(model: Model) -> str:
    return str(model.get("title") or model.get("name") or "unnamed")


def shown(value: Any, show: Callable[[float], str]) -> str:
    value = number(value)
    return DASH if value is None else show(value)


def percent(value: float) -> str:
    return f"{value * 100:.1f}%"


def megabytes(value: float) -> str:
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:,.0f} MB"


def when(created: Any) -> str:
    try:
        moment = datetime.fromisoformat(str(created))
    except ValueError:
        return str(created or "")
    return f"{moment.day} {moment:%B %Y, %H:%M} {moment.tzname() or ''}".strip()


# --- the two sentences at the top -------------------------------------------------------------------------------------


def budget_words(budget: Mapping[str, Any]) -> str:
    """{"seconds": 50.0} as "50 seconds of training"."""
    words = {"seconds": "{} seconds of training", "steps": "{} training steps", "tokens": "{} training tokens"}
    parts = [words[key].format(f"{value:,.10g}") for key in words if (value := number(budget.get(key))) is not None]
    return listed(parts) if parts else ""


def what_was_compared(models: Sequence[Model], data: Mapping[str, Any], budget: Mapping[str, Any], terms: Terms) -> str:
    """One sentence: what was compared, on what, and under what equal budget."""
    count, allowance = len(models), budget_words(budget)
    who = f"{COUNTED[count].capitalize() if count < len(COUNTED) else count} model{'s were' if count != 1 else ' was'}"
    task = f"to turn each {data.get('input') or 'input'} into its {data.get('target') or 'target'}"
    source = f" ({data['source']})" if data.get("source") else ""
    share = f", {'each with the same' if count != 1 else 'with a'} budget of {allowance}" if allowance else ""
    tested = number(data.get("test"))
    held_out = f", and tested on {tested:,.0f} {terms.example}s held out from training" if tested is not None else ""
    return f"{who} trained {task}{source}{share}{held_out}."


def verdict(models: Sequence[Model], data: Mapping[str, Any], terms: Terms) -> str:
    """One sentence: who has the lowest error, and how the fixed vector falls behind if the figures show it."""
    ranked = sorted((m for m in models if number(m.get("per")) is not None), key=lambda m: m["per"])
    if not ranked:
        return f"No model has a {terms.error}, so there is nothing to rank."
    best, error = ranked[0], percent(ranked[0]["per"])
    if len(ranked) == 1:
        return f"{title(best)} reaches a {terms.error} of {error}{plainly(best)}."
    second, tested = ranked[1], number(data.get("test"))
    lead = f"{title(best)} has the lowest {terms.error}, {error}"
    if (
        tested
        and second["per"] - best["per"] < 2 * (variance(best["per"], tested) + variance(second["per"], tested)) ** 0.5
    ):
        lead += (
            f", though {title(second)} ({percent(second['per'])}) is too close behind to tell apart on this test set"
        )
    else:
        lead += f", against {percent(second['per'])} for {title(second)}, the next best"
    return lead + fixed_vector(models, ranked) + plainly(best) + "."


def plainly(model: Model) -> str:
    """What the plain baseline reaches, or ""."""
    plain = number(model.get("per_baseline"))
    return "" if plain is None else f"; {model.get('baseline', 'the baseline')} reaches {percent(plain)}"


def variance(share: float, count: float) -> float:
    """Sampling variance of a mean of `count` values in 0..1; at most this, whatever their spread."""
    return max(share * (1 - share), 0.0) / count


def fixed_vector(models: Sequence[Model], ranked: Sequence[Model]) -> str:
    """How the gap of the model without attention grows with the input, or "" unless it grows by two standard errors."""
    squeezed = next((m for m in models if m.get("name") == FIXED_VECTOR), None)
    twin = next((m for m in models if m.get("name") == FIXED_VECTOR_TWIN), None)
    rival = twin or next((m for m in ranked if m is not squeezed), None)
    if squeezed is None or rival is None:
        return ""
    rivals = {row.get("bucket"): row for row in rival.get("by_length") or []}
    pairs = [(row, rivals[row.get("bucket")]) for row in squeezed.get("by_length") or [] if row.get("bucket") in rivals]
    pairs = [pair for pair in pairs if all(number(r.get("per")) is not None and number(r.get("words")) for r in pair)]
    if len(pairs) < 2:
        return ""
    first, last = pairs[0], pairs[-1]
    gaps = [mine["per"] - theirs["per"] for mine, theirs in (first, last)]
    noise = 2 * sum(variance(row["per"], float(row["words"])) for pair in (first, last) for row in pair) ** 0.5
    if gaps[1] <= 0 or gaps[1] - gaps[0] <= noise:
        return ""
    start = f"{gaps[0] * 100:.1f} points behind" if gaps[0] >= 0.0005 else "no worse than"
    return (
        f"; the fixed vector of {title(squeezed)} falls behind as inputs grow, from {start} {title(rival)} on"
        f" {first[0]['bucket']} inputs to {gaps[1] * 100:.1f} points behind on {last[0]['bucket']} ones"
    )


# --- the tables -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    key: str
    head: str
    unit: str
    lower: bool
    show: Callable[[float], str]
    bar: bool = False


def columns(terms: Terms) -> list[Column]:
    return [
        Column("parameters", "Parameters", "", True, compact),
        Column("train_tokens_per_second", "Training", "tokens/s", False, compact),
        Column("valid_loss", "Validation loss", "nats/token", True, lambda value: f"{value:.3f}"),
        Column("per", terms.error_short, "", True, percent, bar=True),
        Column("wer", terms.whole_short, "", True, percent, bar=True),
        Column("decode_words_per_second", "Decoding", f"{terms.example}s/s", False, compact),
        Column("peak_memory_bytes", "Peak memory", "", True, megabytes),
    ]


def cost_rows(models: Sequence[Model], chosen: Sequence[Column]) -> list[dict[str, Any]]:
    """One row a model; a cell is best when no other shows a better figure, so equal figures share the mark."""
    rows: list[dict[str, Any]] = [{"name": title(m), "source": m.get("source") or DASH, "cells": []} for m in models]
    for column in chosen:
        values = [number(m.get(column.key)) for m in models]
        known = [value for value in values if value is not None]
        best = column.show((min if column.lower else max)(known)) if len(known) > 1 else None
        for row, value in zip(rows, values, strict=True):
            text = shown(value, column.show)
            share = (
                round(100 * min(max(value / max(known), 0.0), 1.0), 1) if column.bar and value and max(known) > 0 else 0
            )
            row["cells"].append({"text": text, "best": text == best, "bar": column.bar, "share": share})
    return rows


def settings(results: Mapping[str, Any], data: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The groups of the fold-out section, each a list of (name, value)."""
    groups = {
        "Settings": {"budget of each model": budget_words(results.get("budget") or {})},
        "Data": data,
        "Hardware": results.get("hardware") or {},
        "Versions": results.get("versions") or {},
    }
    return [
        (group, [setting(key, value) for key, value in entries.items()]) for group, entries in groups.items() if entries
    ]


def setting(key: str, value: Any) -> tuple[str, str]:
    """("memory_bytes", 8e9) as ("memory", "8.0 GB")."""
    known = number(value)
    if key.endswith("_bytes"):
        return key.removesuffix("_bytes").replace("_", " "), shown(value, megabytes)
    text = f"{known:,.10g}" if known is not None else (DASH if value is None or value == "" else str(value))
    return key.replace("_", " "), text


# --- the figures ------------------------------------------------------------------------------------------------------


def curves(models: Sequence[Model]) -> dict[str, Any]:
    """Learning curves against seconds and against tokens, and who is missing or shown by training loss."""
    drawn: dict[str, list[tuple[int, str, list[tuple[float, float]]]]] = {"seconds": [], "tokens": []}
    missing, by_training = [], []
    for i, model in enumerate(models):
        curve = model.get("curve") or []
        validated = any(number(record.get("valid_loss")) is not None for record in curve)
        points = {x: finite_points(curve, x, "valid_loss" if validated else "loss") for x in drawn}
        for x in drawn:
            drawn[x].append((i, title(model), points[x]))
        if not any(points.values()):
            missing.append(title(model))
        elif not validated:
            by_training.append(title(model))
    loss = "Training loss" if len(by_training) == len(models) - len(missing) else "Validation loss"
    return {
        "seconds": learning_chart(drawn["seconds"], loss, "seconds of training"),
        "tokens": learning_chart(drawn["tokens"], loss, "training tokens read"),
        "missing": listed(missing) if missing else "",
        "by_training": listed(by_training) if by_training and loss == "Validation loss" else "",
        "loss": loss,
    }


def learning_chart(series: list[tuple[int, str, list[tuple[float, float]]]], loss: str, x: str) -> LineChart | None:
    ends = ", ".join(f"{name} ends at {max(points)[1]:.3g}" for _, name, points in series if points)
    return line_chart(series, x, f"{loss} against {x}: {ends}")


def lengths(models: Sequence[Model], terms: Terms) -> dict[str, Any]:
    """Error by length of input: both rates as charts, and as the table that holds the same figures."""
    tables = [{str(row.get("bucket")): row for row in m.get("by_length") or []} for m in models]
    buckets = list(dict.fromkeys(bucket for table in tables for bucket in table))
    charts: list[tuple[str, BarChart]] = []
    for key, name in (("per", terms.error), ("wer", terms.whole)):
        groups = [(b, [number((table.get(b) or {}).get(key)) for table in tables]) for b in buckets]
        ends = f"{name} by input length, {len(models)} models, {', '.join(buckets)}"
        chart = bar_chart(groups, [title(m) for m in models], ends) if buckets else None
        if chart:
            charts.append((name.capitalize(), chart))
    rows = [
        (
            title(m),
            [
                (shown(row.get("per"), percent), shown(row.get("wer"), percent))
                for row in (t.get(b) or {} for b in buckets)
            ],
        )
        for m, t in zip(models, tables, strict=True)
    ]
    sizes = [shown(next((t[b].get("words") for t in tables if b in t), None), lambda v: f"{v:,.0f}") for b in buckets]
    return {"charts": charts, "buckets": list(zip(buckets, sizes, strict=True)), "rows": rows}


def alignments(models: Sequence[Model]) -> dict[str, Any]:
    """Heat maps grouped by input, at most ALIGNED_WORDS inputs, and which models have none."""
    words: dict[str, list[HeatMap]] = {}
    without = []
    for i, model in enumerate(models):
        maps = [(entry, heat_map(i, title(model), entry)) for entry in model.get("alignments") or []]
        for entry, drawn in maps:
            if drawn:
                words.setdefault(whole_text(entry), []).append(drawn)
        if not any(drawn for _, drawn in maps):
            without.append(title(model) + (" (a fixed vector)" if model.get("name") == FIXED_VECTOR else ""))
    return {
        "words": list(words.items())[:ALIGNED_WORDS],
        "without": listed(without) if without else "",
        "count": len(without),
    }


def samples(models: Sequence[Model]) -> dict[str, Any]:
    """One row an input: what was expected and what each model wrote, with the differing tokens marked."""
    tables = [{str(s.get("input")): s for s in m.get("samples") or []} for m in models]
    inputs = list(dict.fromkeys(word for table in tables for word in table))
    rows = []
    for word in inputs[:SAMPLE_ROWS]:
        expected = [str(e) for e in next(t[word] for t in tables if word in t).get("expected") or []]
        cells = [written(table[word], expected) if word in table else None for table in tables]
        rows.append({"input": word, "expected": expected, "cells": cells})
    return {"rows": rows, "hidden": max(len(inputs) - SAMPLE_ROWS, 0)}


def written(sample: Mapping[str, Any], expected: Sequence[str]) -> dict[str, Any]:
    """A prediction as (text, mark) pieces against the nearest expected answer; mark is "", "wrong" or "missing"."""
    text, correct = str(sample.get("predicted") or ""), bool(sample.get("correct"))
    tokens = text.split()
    if correct or not tokens or not expected:
        return {"correct": correct, "pieces": [(text or DASH, "")]}
    matchers = [(SequenceMatcher(None, answer.split(), tokens, autojunk=False), answer.split()) for answer in expected]
    nearest, right = max(matchers, key=lambda pair: pair[0].ratio())
    pieces: list[tuple[str, str]] = []
    for kind, a, b, c, d in nearest.get_opcodes():
        if kind == "delete":
            pieces.append((" ".join(right[a:b]), "missing"))
        else:
            pieces.append((" ".join(tokens[c:d]), "" if kind == "equal" else "wrong"))
    return {"correct": correct, "pieces": pieces}
