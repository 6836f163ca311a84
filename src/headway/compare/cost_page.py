"""The page of `headway cost`: what `compare.cost.measure` returns in, one self-contained HTML file out.

Wording and figures are computed here, layout in templates/cost.html.j2; style and drawings are those of the report.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from headway.compare.cost_subjects import GROUPS
from headway.compare.cost_words import (
    Record,
    common_length,
    growth,
    measured,
    milliseconds,
    missing,
    size,
    times,
    verdict,
)
from headway.compare.figures import (
    COLOURS,
    DASH,
    MARKERS,
    Frame,
    Line,
    LineChart,
    Scale,
    Tick,
    compact,
    listed,
    log_ticks,
)
from headway.compare.report import filled, settings, shown, when, write_page

FULL_COLOUR = 6  # black, or white on dark; dashed where it is bidirectional
OTHER_COLOURS = (0, 1, 2, 3, 4, 5, 7)
FRAME = Frame(left=58.0)
MIB = 2**20

Points = list[tuple[float, float]]


def write_cost_page(results: Mapping[str, Any], path: Path) -> None:
    """Writes the page to `path`, whole or not at all."""
    write_page(render(results), path)


def render(results: Mapping[str, Any]) -> str:
    records, lengths = results["subjects"], results["settings"]["lengths"]
    at = common_length(records)
    return filled(
        "cost.html.j2",
        {
            "created": when(results["created"]),
            "what": what(results),
            "verdict": verdict(records),
            "stopped": results["stopped"],
            "colours": COLOURS,
            "markers": MARKERS,
            "dash": DASH,
            "crossovers": crossovers(records, lengths),
            "ends": (f"{min(lengths):,}", f"{max(lengths):,}"),
            "groups": groups(records),
            "at": f"{at:,}" if at else "",
            "table": table(records, at),
            "lengths": [f"{n:,}" for n in lengths],
            "points": [(r["title"], [cell(r, n) for n in lengths]) for r in records],
            "missing": missing(records),
            "peak": f"{results['gemm_peak_flops'] / 1e9:,.0f}",
            "train": results["settings"]["train"],
            "settings": settings({k: results[k] for k in ("hardware", "versions")}, {}),
            "command": results["command"],
        },
    )


# --- The sentences


def what(results: Mapping[str, Any]) -> str:
    chosen, kernels = results["settings"], sum(r["job"]["kernel"] for r in results["subjects"])
    counted = [
        f"{count} {name}{'' if count == 1 else 's'}"
        for count, name in ((len(results["subjects"]) - kernels, "mixer"), (kernels, "kernel"))
        if count
    ]
    hardware, on = results["hardware"], chosen["device"]
    threads = f"{results['threads']} thread{'' if results['threads'] == 1 else 's'}"
    where = f"{hardware['cpu']} with {threads}" if on == "cpu" else hardware["device"]
    return (
        f"{listed(counted)}, {'forward and backward' if chosen['train'] else 'forward'}, one sequence, "
        f"{chosen['heads']} heads of width {chosen['width'] // chosen['heads']}, fp32, on {where}."
    )


# --- The tables


def crossovers(records: Sequence[Record], lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Where each is faster than full attention, in words and as a band over the lengths, its growth, and how much."""
    full = {r["title"]: r for r in records if r["full"]}
    rows = []
    for record in records:
        row = {"title": record["title"], "growth": growth(record)}
        if found := record["crossover"]:
            row |= {"against": f"against {found['against']}", "words": found["words"], "band": band(found, lengths)}
            row["times"] = times(record, full[found["against"]], found["longest"])
        else:
            row |= {"against": "", "words": "is full attention", "band": None, "times": DASH}
        rows.append(row)
    return rows


def band(found: Mapping[str, Any], lengths: Sequence[int]) -> tuple[float, float] | None:
    """Left edge and width, in percent of the lengths on a logarithmic axis, of where one is faster than another."""
    start, end = found["shortest"], found["longest"]
    match found["kind"]:
        case "from":
            start = found["length"]
        case "until":
            end = found["length"]
        case "never" | "unknown":
            return None
    if min(lengths) == max(lengths):
        return 0.0, 100.0
    scale = Scale(float(min(lengths)), float(max(lengths)), 0.0, 100.0, log=True)
    left, right = scale(float(start)), scale(float(end))
    return left, round(max(right - left, 1.5), 1)


def table(records: Sequence[Record], length: int | None) -> list[dict[str, Any]]:
    """The figures at one length."""
    show: dict[str, Callable[[float], str]] = {
        "tokens_per_second": compact,
        "peak_extra_bytes": size,
        "share_of_peak": lambda v: f"{v:.0%}" if v else DASH,
        "state_bytes": size,
        "activation_bytes": size,
    }
    rows = []
    for record in records:
        point = measured(record).get(length or 0, {})
        cells = [shown(point.get(key), how) for key, how in show.items()]
        rows.append({"title": record["title"], "full": record["full"], "cells": [spread(point), *cells]})
    return rows


def spread(point: Mapping[str, Any]) -> tuple[str, str]:
    """Milliseconds: the median, and least to most."""
    if "seconds" not in point:
        return DASH, ""
    low, middle, high = (milliseconds(point["seconds"][key]) for key in ("min", "median", "max"))
    return middle, f"{low} to {high}"


def cell(record: Record, length: int) -> tuple[str, str]:
    point = measured(record).get(length)
    if point is None:
        return DASH, ""
    return milliseconds(point["seconds"]["median"]), shown(point["peak_extra_bytes"], size)


# --- The figures


def groups(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Each group's lines of time and memory beside those of full attention; all groups on the same scales."""
    held = {r["title"]: curves(r) for r in records}
    drawn = []
    for group in GROUPS:
        members = [r for r in records if r["group"] == group]
        kinds = {(r["job"]["kernel"], r["job"]["causal"]) for r in members}
        full = [r for r in records if r["full"] and (r["job"]["kernel"], r["job"]["causal"]) in kinds]
        others = [r for r in members if not r["full"]]
        lines = [(FULL_COLOUR + (0 if r["job"]["causal"] else COLOURS), r["title"]) for r in full]
        lines += [(colour(i), r["title"]) for i, r in enumerate(others)]
        lines = [line for line in lines if held[line[1]][0]]
        if not any(held[r["title"]][0] for r in members):
            continue
        charts = [
            log_chart([(model, title, held[title][i]) for model, title in lines],
                      [points for both in held.values() for points in both[i]], f"{name}, {group}")
            for i, name in enumerate(("Milliseconds by length", "Extra mebibytes by length"))
        ]  # fmt: skip
        drawn.append({"title": group, "legend": lines, "time": charts[0], "memory": charts[1]})
    return drawn


def colour(place: int) -> int:
    """The colour and marker of a group's line; those beyond the colours there are begin again, dashed."""
    again, slot = divmod(place, len(OTHER_COLOURS))
    return OTHER_COLOURS[slot] + (COLOURS if again else 0)


def curves(record: Record) -> tuple[Points, Points]:
    """(length, milliseconds) and (length, mebibytes); what adds no memory at all has no place on a logarithmic axis."""
    points = sorted(measured(record).items())
    return (
        [(float(n), 1000 * p["seconds"]["median"]) for n, p in points],
        [(float(n), p["peak_extra_bytes"] / MIB) for n, p in points if p["peak_extra_bytes"]],
    )


def log_chart(series: Sequence[tuple[int, str, Points]], everything: Points, label: str) -> LineChart | None:
    """Lines in a plot whose axes are both logarithmic and hold `everything`; None when no line has a point."""
    if not any(points for _, _, points in series):
        return None
    xs, ys = sorted({x for x, _ in everything}), [y for _, y in everything]
    x = Scale(xs[0] * 0.9, xs[-1] * 1.1, FRAME.left, FRAME.right, log=True)
    y = Scale(min(ys) * 0.8, max(ys) * 1.25, FRAME.bottom, FRAME.top, log=True)
    lines = []
    for model, name, points in series:
        placed = [(x(a), y(b)) for a, b in points]
        lines.append(Line(model, name, " ".join(f"{a},{b}" for a, b in placed), placed))
    x_ticks = [Tick(x(n), f"{n:,.0f}") for n in xs[:: math.ceil(len(xs) / 4)]]
    y_ticks = [Tick(y(v), f"{v:,.10g}") for v in decades(y.low, y.high)]
    ends = ", ".join(f"{name} ends at {points[-1][1]:.3g}" for _, name, points in series if points)
    return LineChart(FRAME, x_ticks, y_ticks, "tokens", f"{label}: {ends}", True, lines)


def decades(low: float, high: float) -> list[float]:
    """Powers of ten within low..high, or finer steps where those are fewer than three."""
    powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    return [10.0**p for p in powers] if len(powers) > 2 else log_ticks(low, high)
