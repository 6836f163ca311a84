"""What the terminal shows: live progress of each model, and a table of what each reached and cost."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from headway import machine
from headway.train.loop import Status

if TYPE_CHECKING:
    from headway.compare.cost import Event
    from headway.use.stream import Progress as Rows

console = Console()


class _Left(ProgressColumn):
    """Time left by the budget's own clock, not by the bar's."""

    def render(self, task: Task) -> Text:
        left = task.fields["left"]
        if task.finished:
            return Text("done", "green")
        return Text("-:--" if not math.isfinite(left) else f"{int(left) // 60}:{int(left) % 60:02d} left", "cyan")


class _Memory(ProgressColumn):
    """The most memory held so far."""

    def __init__(self) -> None:
        super().__init__()
        self.most = machine.Peak()

    def render(self, task: Task) -> Text:
        return Text(f"{self.most.bytes / 2**20:,.0f} MiB")


class Live:
    """A bar a model: loss, tokens a second, share of the machine's peak, memory, time left. Lines go above the bars."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description}", table_column=None),
            BarColumn(bar_width=24 if console.width >= 100 else 8),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[speed]:,.0f} tokens/s"),
            TextColumn("{task.fields[share]}"),
            _Memory(),
            _Left(),
            console=console,
            refresh_per_second=4,
        )
        self.tasks: dict[str, Any] = {}
        self.peak: float | None = None

    def __enter__(self) -> Live:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def note(self, line: str) -> None:
        """A line above the bars."""
        self.progress.console.print(line, style="dim", highlight=False, markup=False)

    def watch(self, name: str, status: Status) -> None:
        """One step of the model `name`."""
        if name not in self.tasks:
            self.tasks[name] = self.progress.add_task(name, total=1.0, loss=math.nan, speed=0, share="", left=math.inf)
        self.progress.update(
            self.tasks[name],
            share=self._share(status),
            completed=status.fraction,
            loss=status.loss,
            speed=status.tokens_per_second,
            left=status.seconds_left,
        )

    def _share(self, status: Status) -> str:
        """Of what this machine can do: its products in the model's precision, measured at the first step."""
        if not console.is_terminal or not status.flops_per_second:
            return ""
        if self.peak is None:
            dtype = torch.bfloat16 if status.bf16 else torch.float32
            self.peak = machine.gemm_peak(machine.device(), dtype, rounds=3)
        return f"{status.flops_per_second / self.peak:.0%} of peak"


class RowsLive:
    """One bar over the rows of a file, the time left by the work done so far; it shows with the first rows."""

    def __init__(self, title: str) -> None:
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[count]}"),
            _Left(),
            console=Console(stderr=True),  # what is printed at the end is for a pipe
            refresh_per_second=4,
        )
        self.task = self.progress.add_task(title, total=1.0, count="", left=math.inf)

    def __enter__(self) -> RowsLive:
        return self

    def __exit__(self, *error: object) -> None:
        if self.progress.live.is_started:
            self.progress.stop()

    def watch(self, now: Rows) -> None:
        """So far it is."""
        self.progress.start()  # with the first rows, so that a mistake of the user's shows no bar
        count = f"{now.rows:,} of {now.total:,}"
        self.progress.update(self.task, completed=now.share, count=count, left=now.left)


# column, its heading in two lines, how to show it, whether less is better (None: no best)
_COLUMNS = (
    ("parameters", "params", lambda v: f"{v / 1e6:.2f}M", None),
    ("train_tokens_per_second", "train\ntok/s", lambda v: f"{v:,.0f}", False),
    ("valid_loss", "valid\nloss", lambda v: f"{v:.3f}", True),
    ("per", "PER", lambda v: f"{v:.1%}", True),
    ("wer", "WER", lambda v: f"{v:.1%}", True),
    ("decode_words_per_second", "decode\nword/s", lambda v: f"{v:,.0f}", False),
    ("peak_memory_bytes", "memory\nMiB", lambda v: f"{v / 2**20:,.0f}", True),
)


def summary(results: Sequence[dict[str, Any]], phonemes: bool) -> None:
    """What each model reached and cost; for error rates, a second table by length of the input."""
    if "per" not in results[0]:
        (_figures if len(results) <= WIDE else _figures_by_model)(results)
        return
    best = {key: _best([r[key] for r in results], less) for key, _, _, less in _COLUMNS}
    rows = [[_marked(show(r[key]), i == best[key]) for key, _, show, _ in _COLUMNS] for i, r in enumerate(results)]
    names = {} if phonemes else {"PER": "token\nerrors", "WER": "wrong\nanswers"}
    _print("model", [names.get(heading, heading) for _, heading, _, _ in _COLUMNS], results, rows)
    parts = range(len(results[0]["by_length"]))
    least = [_best([r["by_length"][part]["per"] for r in results], True) for part in parts]
    rows = [
        [_marked(f"{r['by_length'][part]['per']:.1%}", i == least[part]) for part in parts]
        for i, r in enumerate(results)
    ]
    _print(
        "PER by length of input" if phonemes else "token errors by length",
        [row["bucket"] for row in results[0]["by_length"]],
        results,
        rows,
    )
    if "wer_baseline" in results[0]:
        plain = results[0]
        rates = f"{plain['per_baseline']:.1%} token errors, {plain['wer_baseline']:.1%} wrong answers"
        console.print(f"plain baseline, {plain['baseline']}: {rates}", style="dim")
    if len(results) > 1:
        console.print("* best in its column", style="dim")


WIDE = 3  # models that stand side by side in a terminal
# what is shown of a model that is measured otherwise than by error rates, above its own metrics
_COST = {
    "parameters": lambda v: f"{v:,}",
    "steps": lambda v: f"{v:,}",
    "seconds": lambda v: f"{v:,.0f} s of training",
    "train_tokens_per_second": lambda v: f"{v:,.0f} a second",
    "peak_memory_bytes": lambda v: f"{v / 2**20:,.0f} MiB",
    "valid_loss": lambda v: f"{v:.4f}",
}


def _figures(results: Sequence[dict[str, Any]]) -> None:
    """One line a figure, one column a model."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("", overflow="fold")
    for result in results:
        table.add_column(result["title"], justify="right", overflow="fold")
    for name, show in _COST.items():
        table.add_row(name.replace("_", " ").removesuffix(" bytes"), *(show(result[name]) for result in results))
    for name in results[0]["metrics"]:
        shown = [result.get(name) for result in results]
        if all(isinstance(value, int | float) for value in shown):
            table.add_row(name.replace("_", " "), *(f"{value:,.4g}" for value in shown))
    console.print(table)


def _figures_by_model(results: Sequence[dict[str, Any]]) -> None:
    """One line a model, for more of them than stand side by side: its size, its loss, and its own metrics."""
    numbers = [name for name in results[0]["metrics"] if all(isinstance(r.get(name), int | float) for r in results)]
    names = ["parameters", "valid_loss", *(name for name in numbers if not name.startswith("test_"))]
    rows = [[Text(f"{result[name]:,}" if name == "parameters" else f"{result[name]:.4g}") for name in names]
            for result in results]  # fmt: skip
    _print("model", [name.replace("_", "\n") for name in names], results, rows)


def _print(title: str, headings: Sequence[str], results: Sequence[dict[str, Any]], rows: list[list[Text]]) -> None:
    """One row a model or mixer; narrow enough for a terminal of 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    table.add_column(title, vertical="bottom", overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True, vertical="bottom")
    for result, cells in zip(results, rows, strict=True):
        table.add_row(result["title"], *cells)
    console.print(table)


def _best(values: Sequence[int | float], less: bool | None) -> int | None:
    if less is None or len(values) < 2:
        return None
    return min(range(len(values)), key=lambda i: values[i] if less else -values[i])


def _marked(text: str, is_best: bool) -> Text:
    return Text(f"{text}*", "bold green") if is_best else Text(f"{text} ")


# --- headway cost


class CostLive:
    """One bar over all points: what is being measured, and the time left by what was measured so far."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[left]}", style="cyan"),
            console=console,
            refresh_per_second=4,
            transient=True,
        )
        self.task = self.progress.add_task("", total=None, count="", left="")

    def __enter__(self) -> CostLive:
        return self

    def __exit__(self, *error: object) -> None:
        if self.progress.live.is_started:
            self.progress.stop()

    def watch(self, event: Event) -> None:
        left = f"{'at most' if event.bound else 'about'} {int(event.left) // 60}:{int(event.left) % 60:02d} left"
        what = f"{event.title} at {event.length:,}"
        self.progress.start()  # with the first event, so that a mistake of the user's shows no bar
        count = f"{event.done} of {event.total}"
        self.progress.update(
            self.task, description=what, completed=event.done, total=event.total, count=count, left=left
        )


def plan_table(plan: dict[str, Any]) -> None:
    """Whether it fits, how long it takes, and what makes up either."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column(f"{plan['gpus']} x {plan['gpu']}, {plan['parallel']}", overflow="fold")
    table.add_column("on each", justify="right")
    for part, size in plan["memory"].items():
        table.add_row(part, f"{size / 2**30:,.2f} GiB")
    total, capacity = sum(plan["memory"].values()), plan["capacity"]
    table.add_row("in all", f"{total / 2**30:,.2f} of {capacity / 2**30:,.0f} GiB")
    table.add_row("parameters", f"{plan['parameters'] / 1e6:,.2f}M")
    table.add_row("a step, all GPUs", f"{plan['tokens_per_step']:,} tokens, {plan['flops_per_step'] / 1e12:,.3g} TFLOP")
    reached = f"computing, if {plan['share']:.0%} of the peak is reached"
    table.add_row(reached, f"{1e3 * plan['compute_seconds']:,.2f} ms")
    sent = f"{plan['bytes_exchanged'] / 2**20:,.0f} MiB, {1e3 * plan['exchange_seconds']:,.2f} ms"
    table.add_row("exchanging", sent)
    table.add_row("a step in all", f"{1e3 * plan['step_seconds']:,.2f} ms, {plan['bubble']:.0%} of it waiting")
    table.add_row("tokens a second", f"{plan['tokens_per_second']:,.0f}")
    table.add_row("the budget", f"{plan['steps']:,} steps, {_hours(plan['seconds'])}")
    console.print(table)
    if plan["fits"]:
        console.print("It fits. Small models and short batches reach less of the peak than is assumed (--share).")
    else:
        console.print("It does NOT fit: lower batch_tokens, or set activation_checkpointing=true or parallel=fsdp.")


def _hours(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def cost_summary(results: dict[str, Any]) -> None:
    """Milliseconds by length as a table and as plots, growth and figures at one length, what is missing and why."""
    from headway.compare.cost_words import missing, verdict

    records = [r for r in results["subjects"] if any("seconds" in p for p in r["points"])]
    keys = dict(zip((r["title"] for r in records), string.ascii_letters + "?" * len(records), strict=False))
    if records:
        _print_by_length(records, keys, results["settings"]["lengths"])
        for kernel in (False, True):
            if some := [r for r in records if r["job"]["kernel"] == kernel]:
                _print_plot(some, keys, results["settings"]["lengths"])
                console.print()
        _print_beside_full(records, keys)
    for title, where, reason in missing(results["subjects"]):
        console.print(f"{title}, {where} tokens, {reason}", style="dim", highlight=False, markup=False)
    console.print(f"\n{verdict(results['subjects'])}", highlight=False, markup=False)


def _print_by_length(records: list[dict[str, Any]], keys: dict[str, str], lengths: Sequence[int]) -> None:
    from headway.compare.cost_words import DASH, measured, milliseconds

    rows = []
    for record in records:
        points = measured(record)
        rows.append(
            [Text(milliseconds(points[n]["seconds"]["median"]) if n in points else DASH) for n in sorted(lengths)]
        )
    titled = [{"title": Text(f"{keys[r['title']]} {r['title']}")} for r in records]
    _print("milliseconds at", [f"{n:,}" for n in sorted(lengths)], titled, rows)


def _print_beside_full(records: list[dict[str, Any]], keys: dict[str, str]) -> None:
    from headway.compare.cost_words import DASH, common_length, growth, measured, size
    from headway.compare.figures import compact

    length = common_length(records)
    rows = []
    for record in records:
        point = measured(record).get(length or 0)
        figures = [DASH] * 3
        if point:
            extra, share = point["peak_extra_bytes"], point["share_of_peak"]
            figures = [
                compact(point["tokens_per_second"]),
                DASH if extra is None else size(extra),
                f"{share:.0%}" if share else DASH,
            ]
        faster = record["crossover"]["words"] if record["crossover"] else "(full attention)"
        rows.append([Text(text) for text in (growth(record), faster, *figures)])
    titled = [{"title": Text(f"{keys[r['title']]} {r['title']}")} for r in records]
    headings = ("growth", "faster than\nfull attention", "tokens/s", "extra\nmemory", "of\npeak")
    _print(f"at {length:,} tokens", headings, titled, rows)
    console.print("growth: b of time ~ length^b, fitted to the upper half of the lengths", style="dim")


def _print_plot(records: list[dict[str, Any]], keys: dict[str, str], lengths: Sequence[int], rows: int = 18) -> None:
    """Time by length, both logarithmic; each mixer is its letter, and those that are equal stand side by side."""
    from headway.compare.cost_words import measured

    points = [
        (keys[r["title"]], n, math.log10(1000 * p["seconds"]["median"]))
        for r in records
        for n, p in measured(r).items()
    ]
    low, high = min(t for _, _, t in points), max(t for _, _, t in points)
    place = lambda t: round((t - low) / (high - low or 1.0) * (rows - 1))
    cells: dict[tuple[int, int], str] = {}
    for key, n, t in points:
        cells[place(t), n] = cells.get((place(t), n), "") + key
    width = max(6, (console.width - 12) // len(lengths))
    powers = {place(p): f"{10.0**p:,g} ms" for p in range(math.ceil(low), math.floor(high) + 1)}
    for row in reversed(range(rows)):
        shown = [cells.get((row, n), "") for n in lengths]
        shown = [cell if len(cell) < width else f"{cell[: width - 2]}+" for cell in shown]
        line = f"{powers.get(row, ''):>10} |" + "".join(f"{cell:>{width}}" for cell in shown)
        console.print(line.rstrip(), highlight=False, markup=False, soft_wrap=True)
    axis = "".join(f"{n:>{width},}" for n in lengths)
    console.print(f"{'tokens':>10} |{axis}", highlight=False, markup=False, soft_wrap=True)
