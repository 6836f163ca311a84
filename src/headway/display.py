"""What the terminal shows: live progress of each model, and a table of what each reached and cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from headway.train.loop import Status

console = Console()


class _Left(ProgressColumn):
    """Time left by the budget's own clock, not by the bar's."""

    def render(self, task: Task) -> Text:
        left = task.fields["left"]
        if task.finished:
            return Text("done", "green")
        return Text("-:--" if not math.isfinite(left) else f"{int(left) // 60}:{int(left) % 60:02d} left", "cyan")


class Live:
    """A bar a model: loss, tokens a second, time left. Lines of text go above the bars."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description}", table_column=None),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[speed]:,.0f} tokens/s"),
            _Left(),
            console=console,
            refresh_per_second=4,
        )
        self.tasks: dict[str, Any] = {}

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
            self.tasks[name] = self.progress.add_task(name, total=1.0, loss=math.nan, speed=0.0, left=math.inf)
        self.progress.update(
            self.tasks[name],
            completed=status.fraction,
            loss=status.loss,
            speed=status.tokens_per_second,
            left=status.seconds_left,
        )


# column, how to show it, whether less is better (None: no best)
_COLUMNS = (
    ("parameters", "parameters", lambda v: f"{v / 1e6:.2f}M", None),
    ("train_tokens_per_second", "train tok/s", lambda v: f"{v:,.0f}", False),
    ("valid_loss", "valid loss", lambda v: f"{v:.3f}", True),
    ("per", "PER", lambda v: f"{v:.1%}", True),
    ("wer", "WER", lambda v: f"{v:.1%}", True),
    ("decode_words_per_second", "words/s", lambda v: f"{v:,.0f}", False),
    ("peak_memory_bytes", "memory", lambda v: f"{v / 2**20:,.0f} MiB", True),
)


def summary(results: Sequence[dict[str, Any]]) -> None:
    """Two tables: what each model reached and cost, and its token error rate by length of the input."""
    console.print()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", no_wrap=True)
    for _, head, _, _ in _COLUMNS:
        table.add_column(head, justify="right", no_wrap=True)
    best = {key: _best([r[key] for r in results], less) for key, _, _, less in _COLUMNS}
    for i, result in enumerate(results):
        cells = (_marked(show(result[key]), i == best[key]) for key, _, show, _ in _COLUMNS)
        table.add_row(result["title"], *cells)
    console.print(table)
    _by_length(results)
    if len(results) > 1:
        console.print("* best in its column", style="dim")


def _by_length(results: Sequence[dict[str, Any]]) -> None:
    buckets = [row["bucket"] for row in results[0]["by_length"]]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("PER by length of the input", no_wrap=True)
    for bucket in buckets:
        table.add_column(bucket, justify="right")
    best = [_best([r["by_length"][i]["per"] for r in results], True) for i in range(len(buckets))]
    for row, result in enumerate(results):
        cells = (_marked(f"{found['per']:.1%}", row == best[i]) for i, found in enumerate(result["by_length"]))
        table.add_row(result["title"], *cells)
    console.print(table)


def _best(values: Sequence[float], less: bool | None) -> int | None:
    if less is None or len(values) < 2:
        return None
    return min(range(len(values)), key=lambda i: values[i] if less else -values[i])


def _marked(text: str, is_best: bool) -> Text:
    return Text(f"{text} *", "bold green") if is_best else Text(f"{text}  ")
