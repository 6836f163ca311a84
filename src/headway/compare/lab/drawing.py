"""Drawing: a claim's plot as coordinates, lines or dots, each axis plain or logarithmic; the template draws it as SVG.

A figure that is missing, and zero or less on a logarithmic axis, has no place: its line is drawn without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headway.compare.figures import Frame, Scale, Tick, compact, log_ticks, number, thin, ticks

FRAME = Frame(left=56.0, top=30.0, height=304.0, bottom=252.0)
SHOWN = 200  # points of a line: more than a plot of 480 units can show
LABELLED = 6  # ticks of an axis, at most

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Drawn:
    """One line: its colour's and marker's number, the `points` of an SVG polyline, and where markers stand."""

    model: int
    name: str
    points: str
    marks: Points


@dataclass(frozen=True)
class Picture:
    frame: Frame
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    x_label: str
    y_label: str
    label: str  # what a reader hears who does not see it
    dots: bool
    lines: list[Drawn]


def picture(plot: Mapping[str, Any]) -> Picture | None:
    """None where no line has a point that can be drawn."""
    series = [(line["name"], placed(line["points"], plot["log_x"], plot["log_y"])) for line in plot["lines"]]
    series = [(name, points) for name, points in series if points]
    if not series:
        return None
    xs = sorted({x for _, points in series for x, _ in points})
    ys = sorted({y for _, points in series for _, y in points})
    dots = plot["kind"] == "dots"
    x, x_ticks = axis(xs, plot["log_x"], FRAME.left, FRAME.right, room=0.04 if dots else 0.0)
    y, y_ticks = axis(ys, plot["log_y"], FRAME.bottom, FRAME.top, room=0.04)
    lines = []
    for model, (name, points) in enumerate(series):
        at = [(x(a), y(b)) for a, b in thin(points, SHOWN)]
        joined = "" if dots and len(at) == 1 else " ".join(f"{a},{b}" for a, b in at)
        lines.append(Drawn(model, name, joined, [] if dots and joined else thin(at, 9)))
    return Picture(FRAME, x_ticks, y_ticks, plot["x"], plot["y"], spoken(plot, series), dots, lines)


def placed(points: Sequence[Sequence[Any]], log_x: bool, log_y: bool) -> Points:
    """Those that both axes have a place for, from left to right."""
    pairs = [(number(x), number(y)) for x, y in points]
    return sorted(
        (x, y) for x, y in pairs if x is not None and y is not None and (x > 0 or not log_x) and (y > 0 or not log_y)
    )


def axis(values: Sequence[float], log: bool, start: float, end: float, room: float) -> tuple[Scale, list[Tick]]:
    """The scale of an axis that holds `values`, with `room` (a share of it) at both ends, and its ticks."""
    low, high = values[0], values[-1]
    if log:
        pad = (high / low) ** room if high > low else 1.5
        scale = Scale(low / pad, high * pad, start, end, log=True)
        marked = list(values) if len(values) <= LABELLED else decades(scale.low, scale.high) or [low, high]
    else:
        share = low >= 0 and high <= 1 and high > 0.2  # of a whole: its ends mean something
        spread = high - low or abs(high) or 1.0
        bottom = max(low - room * spread, 0.0) if low >= 0 else low - room * spread
        top = max(high + room * spread, bottom + spread)  # also where all are one value
        marked = ticks(0.0, 1.0) if share else ticks(bottom, top)
        scale = Scale(marked[0], marked[-1], start, end)
    every = math.ceil(len(marked) / LABELLED)
    return scale, [Tick(scale(v), said(v)) for v in marked[::every]]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten within low..high, or finer steps where those are fewer than three."""
    powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    return [10.0**p for p in powers] if len(powers) > 2 else log_ticks(low, high)


def said(value: float) -> str:
    """A tick's label: a number, or a power of ten where it would be long."""
    if value and abs(value) < 1e-3 and math.log10(abs(value)).is_integer():
        return f"10{str(round(math.log10(abs(value)))).translate(RAISED)}"
    return compact(value).replace(" k", "k").replace(" M", "M").replace(" G", "G")


RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def spoken(plot: Mapping[str, Any], series: Sequence[tuple[str, Points]]) -> str:
    ends = "; ".join(
        f"{name} goes from {points[0][1]:.3g} to {points[-1][1]:.3g}"
        if len(points) > 1
        else f"{name} is at {points[0][1]:.3g}"
        for name, points in series
    )
    return f"{plot['title']}, {plot['y']} by {plot['x']}: {ends}"
