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
    """Two tables: what each model reached and cost, and its token error rate by length of the input."""
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
    if len(results) > 1:
        console.print("* best in its column", style="dim")


def _print(title: str, headings: Sequence[str], results: Sequence[dict[str, Any]], rows: list[list[Text]]) -> None:
    """One row a model; narrow enough for a terminal of 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    table.add_column(title, vertical="bottom")
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
