"""Chart geometry for the comparison page: numbers in, coordinates out.

The template draws these as inline SVG, so colours follow the reader's light or dark setting and no script is needed.
Colours are the Okabe-Ito palette (Okabe and Ito 2008, "Color Universal Design"); each model also has its own marker.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DASH = "\N{EN DASH}"  # a figure that is missing
COLOURS = 8  # the template defines --m0 to --m7; further models reuse them with a dashed line
MARKERS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",  # circle
    "M-3.6 -3.6h7.2v7.2h-7.2z",  # square
    "M0 -4.8L4.6 3.6H-4.6z",  # triangle
    "M0 -5.2L5.2 0L0 5.2L-5.2 0z",  # diamond
    "M0 4.8L4.6 -3.6H-4.6z",  # triangle, point down
    "M-1.6 -5h3.2v3.4h3.4v3.2h-3.4v3.4h-3.2v-3.4h-3.4v-3.2h3.4z",  # plus
    "M0 -5.2L1.5 -1.6L5 -1.6L2.2 0.8L3.2 4.6L0 2.4L-3.2 4.6L-2.2 0.8L-5 -1.6L-1.5 -1.6z",  # star
    "M-5 -2L0 -5L5 -2V2L0 5L-5 2z",  # hexagon
)
CURVE_POINTS = 200  # more than a 480-unit plot can show


def number(value: Any) -> float | None:
    """The value as a finite float, or None: results may hold null, NaN or nothing at all."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def compact(value: float) -> str:
    """12345 as "12.3 k", 2500000 as "2.5 M"; three figures, thin of trailing noughts."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= size:
            scaled = value / (1e3 if unit == " k" else size)
            return f"{scaled:.4g}{unit}" if abs(scaled) >= 1000 else f"{scaled:.3g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Scale:
    """Maps low..high onto start..end, by the logarithm where `log` is set."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (
            (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)


@dataclass(frozen=True)
class Frame:
    """The plot's box inside a drawing of `width` by `height`."""

    width: float = 480.0
    height: float = 300.0
    left: float = 48.0
    right: float = 466.0
    top: float = 16.0
    bottom: float = 246.0


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values (1, 2, 2.5 or 5 times a power of ten) that cover low..high, about `count` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten that lie within low..high, and values between where those are fewer than four."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    coarse, fine = ([m * 10.0**p for p in powers for m in steps] for steps in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)))
    kept = [value for value in coarse if low <= value <= high]
    return kept if len(kept) > 3 else [value for value in fine if low <= value <= high]


@dataclass(frozen=True)
class Line:
    model: int
    name: str
    points: str  # the `points` of an SVG polyline
    marks: list[tuple[float, float]]  # where the marker is drawn; the last is the end of the line


@dataclass(frozen=True)
class LineChart:
    frame: Frame
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    x_label: str
    label: str
    log: bool
    lines: list[Line]


def thin(points: list[tuple[float, float]], limit: int) -> list[tuple[float, float]]:
    """At most `limit` points, evenly taken, the last always among them."""
    stride = math.ceil(len(points) / limit)
    return points[::-1][::stride][::-1]


def line_chart(
    series: Sequence[tuple[int, str, list[tuple[float, float]]]], x_label: str, label: str
) -> LineChart | None:
    """Lines of (model, name, points) in one plot; None when no series has a point."""
    series = [(model, name, thin(sorted(points), CURVE_POINTS)) for model, name, points in series if points]
    if not series:
        return None
    frame, everything = Frame(), [point for _, _, points in series for point in points]
    xs, ys = [x for x, _ in everything], [y for _, y in everything]
    x_values = ticks(0.0, max(xs) if max(xs) > 0 else 1.0)
    # A loss that falls many times over hides the end, which is what is compared, unless the axis is logarithmic.
    log = min(ys) > 0 and max(ys) / min(ys) > 3
    if log:
        low, high = min(ys) * 0.92, max(ys) * 1.04
        y_values = log_ticks(low, high)
    else:
        spread = max(ys) - min(ys) or abs(max(ys)) or 1.0
        y_values = ticks(min(ys) - 0.05 * spread, max(ys) + 0.05 * spread)
        low, high = y_values[0], y_values[-1]
    x = Scale(x_values[0], max(x_values[-2], max(xs)), frame.left, frame.right)
    y = Scale(low, high, frame.bottom, frame.top, log)
    lines = []
    for model, name, points in series:
        placed = [(x(a), y(b)) for a, b in points]
        lines.append(Line(model, name, " ".join(f"{a},{b}" for a, b in placed), thin(placed, 8)))
    x_ticks = [Tick(x(v), compact(v)) for v in x_values if v <= x.high]
    return LineChart(frame, x_ticks, [Tick(y(v), f"{v:.3g}") for v in y_values], x_label, label, log, lines)


@dataclass(frozen=True)
class Bar:
    model: int
    title: str
    x: float
    y: float
    width: float
    height: float
    text: str  # the value above the bar; "" where there is no room


@dataclass(frozen=True)
class BarGroup:
    middle: float
    label: list[str]  # lines of text
    bars: list[Bar]


@dataclass(frozen=True)
class BarChart:
    frame: Frame
    y_ticks: list[Tick]
    groups: list[BarGroup]
    label: str
    shapes: bool  # whether a bar is wide enough to stand over its model's marker


def bar_chart(groups: Sequence[tuple[str, list[float | None]]], names: Sequence[str], label: str) -> BarChart | None:
    """Grouped bars of shares (0.12 is 12%): one group a bucket, one bar a model; None when nothing has a value."""
    values = [value for _, row in groups for value in row if value is not None]
    if not values:
        return None
    frame = Frame(left=54.0, bottom=230.0)
    highest = max(*values, 0.01)
    top = ticks(0.0, min(highest * 1.04, 1.0) if highest <= 1 else highest, 4)
    y = Scale(0.0, top[-1], frame.bottom, frame.top)
    slot = (frame.right - frame.left) / len(groups)
    width = slot * 0.86 / len(names)
    drawn = []
    for i, (bucket, row) in enumerate(groups):
        start = frame.left + slot * (i + 0.07)
        bars = []
        for model, (name, value) in enumerate(zip(names, row, strict=True)):
            at = y(value) if value is not None else frame.bottom
            shown = DASH if value is None else f"{value * 100:.1f}"
            title = f"{name}, {bucket}: {shown}{'' if value is None else '%'}"
            gap = min(3.0, width * 0.12)
            x, height = round(start + model * width + gap / 2, 1), round(frame.bottom - at, 1)
            bars.append(Bar(model, title, x, at, round(width - gap, 1), height, shown if width >= 24 else ""))
        drawn.append(BarGroup(round(frame.left + slot * (i + 0.5), 1), split_label(bucket), bars))
    return BarChart(frame, [Tick(y(v), f"{v * 100:.3g}%") for v in top], drawn, label, width >= 10)


def split_label(text: str) -> list[str]:
    """A bucket's name, "short (1-6)", as the two lines beneath its group, each cut to what fits."""
    head, bracket, rest = text.partition(" (")
    return [clip(part, 14) for part in ([head, "(" + rest] if bracket else [text])]


def clip(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


@dataclass(frozen=True)
class Cell:
    x: float
    y: float
    width: float
    height: float
    opacity: float
    title: str


@dataclass(frozen=True)
class HeatMap:
    model: int
    name: str
    label: str
    width: float
    height: float
    left: float
    top: float
    columns: list[Tick]
    rows: list[Tick]
    cells: list[Cell]


def visible(token: str) -> str:
    """A token as an axis label: white space shown, long tokens cut."""
    return clip(token, 12) if token.strip() else "␣"


def heat_map(model: int, name: str, alignment: Mapping[str, Any]) -> HeatMap | None:
    """Attention of each output token (a row) over the input tokens (columns); None when there is nothing to draw."""
    columns = [str(token) for token in alignment.get("input") or []]
    outputs = [str(token) for token in alignment.get("output") or []]
    weights = [[number(w) or 0.0 for w in row][: len(columns)] for row in alignment.get("weights") or []][
        : len(outputs)
    ]
    if not columns or not weights:
        return None
    tall, top = 24.0 if len(columns) <= 12 else 18.0, 26.0  # 18 lets three maps of a long word stand in one row
    widths = [tall if len(visible(token)) == 1 else 8.0 * len(visible(token)) + 8.0 for token in columns]
    left = 8.0 * max(len(visible(token)) for token in outputs) + 12.0
    edges = [round(left + sum(widths[:c]), 1) for c in range(len(columns) + 1)]
    cells = [
        Cell(
            edges[c],
            round(top + r * tall, 1),
            widths[c] - 1.5,
            tall - 1.5,
            round(min(max(weight, 0.0), 1.0), 3),
            f"{outputs[r]} from {columns[c]}: {weight * 100:.0f}%",
        )
        for r, row in enumerate(weights)
        for c, weight in enumerate(row)
    ]
    spoken = ", ".join(f"{outputs[r]} from {columns[row.index(max(row))]}" for r, row in enumerate(weights) if row)
    return HeatMap(
        model=model,
        name=name,
        label=f"Attention of {name} on {whole_text(alignment)}; most weight: {spoken}",
        width=edges[-1] + 2,
        height=round(top + len(weights) * tall + 2, 1),
        left=left,
        top=top,
        columns=[Tick(edges[c] + widths[c] / 2, visible(token)) for c, token in enumerate(columns)],
        rows=[
            Tick(round(top + (r + 0.5) * tall, 1), visible(token)) for r, token in enumerate(outputs[: len(weights)])
        ],
        cells=cells,
    )


def whole_text(alignment: Mapping[str, Any]) -> str:
    """The input of an alignment: its own `text`, else its tokens without the "end" that closes input and output."""
    if alignment.get("text") is not None:
        return str(alignment["text"])
    tokens, outputs = ([str(token) for token in alignment.get(side) or []] for side in ("input", "output"))
    return "".join(tokens[:-1] if tokens[-1:] == outputs[-1:] == ["end"] else tokens)


def finite_points(curve: Iterable[Mapping[str, Any]], x: str, y: str) -> list[tuple[float, float]]:
    """The (x, y) of those records that have both as finite numbers."""
    pairs = ((number(record.get(x)), number(record.get(y))) for record in curve)
    return [(a, b) for a, b in pairs if a is not None and b is not None]
