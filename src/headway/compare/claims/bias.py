"""Inductive bias: how few examples do attention, a recurrence and a convolution need, on tasks built for each?"""

from __future__ import annotations

from typing import Any

from headway.compare import tasks
from headway.compare.claims import FAILS, HOLDS, PARTLY, Found, How, Line, Plot, Row, Table
from headway.compare.claims._trials import hold, settings
from headway.compare.contest import RATES, Entry
from headway.compare.trial import Trial

SECTION = "A"
TITLE = "Inductive bias: what each learns from few examples"
SAID = (
    "A convolution is biased to near patterns wherever they stand, a recurrence to order in time, attention to neither."
)
METHOD = (
    "Accuracy held out as examples shrink: shifted patterns, counting over time, and looking up what went with a key."
)
RULE = (
    "A task is won by the mixer it was built for where, with the fewest examples that anybody learned from, none is "
    "better by two standard errors or more. It holds where all three are won, in part where some are."
)
SECONDS = (25.0, 400.0)
MIXERS: dict[str, dict[str, Any]] = {
    "attention": {"name": "attention", "heads": 1},
    "recurrence": {"name": "rnn", "cell": "gru"},
    "convolution": {"name": "conv"},
}
TASKS: dict[str, tuple[dict[str, Any], str]] = {
    "shifted patterns": ({"name": "motif"}, "convolution"),
    "counting over time": ({"name": "counting"}, "recurrence"),
    "looking up": ({"name": "mqar", "pairs": 4, "symbols": 8}, "attention"),
}
SURE = 2.0


def measure(how: How) -> Found:
    """Every mixer on every task, with fewer and more examples."""
    sizes, steps = ((128, 1024), 100) if how.quick else ((64, 256, 1024, 4096), 500)
    wanted = {
        f"{task}, {name}, {size} examples": Trial(
            task=named,
            mixers=(mixer,),
            length=32,
            steps=steps,
            rows=64,
            every=steps // 4,
            examples=size,
            test_rows=512,
            enough=None,
            optimizer=RATES,
            seed=how.seed,
        )
        for task, (named, _) in TASKS.items()
        for name, mixer in MIXERS.items()
        for size in sizes
    }
    entries = hold(how, wanted)
    of = lambda task, name, size: entries[f"{task}, {name}, {size} examples"]
    won = [task for task, (_, own) in TASKS.items() if (size := decisive(entries, task, sizes)) is not None
           and wins({n: of(task, n, size) for n in MIXERS}, own)]  # fmt: skip
    rows: tuple[Row, ...] = tuple(
        (task, name, *(round(percent(of(task, name, size)), 1) for size in sizes)) for task in TASKS for name in MIXERS
    )
    columns = ("task", "mixer", *(f"accuracy with {size} examples, %" for size in sizes))
    return Found(
        verdict=HOLDS if len(won) == len(TASKS) else PARTLY if won else FAILS,
        because="; ".join(f"{task}: {own} {'wins' if task in won else 'does not win'}"
                          for task, (_, own) in TASKS.items()),
        tables=(Table(title="Accuracy held out", columns=columns, rows=rows),),
        plots=tuple(
            Plot(
                title=task.capitalize(),
                sentence=f"Built for {own}: the further left a line rises, the fewer examples it takes.",
                x="examples",
                y="accuracy, %",
                lines=tuple(
                    Line(name=name, points=tuple((float(size), percent(of(task, name, size))) for size in sizes))
                    for name in MIXERS
                ),
                log_x=True,
            )
            for task, (_, own) in TASKS.items()
        ),
        settings=settings(how, entries),
    )  # fmt: skip


def percent(entry: Entry) -> float:
    assert entry.outcome is not None
    return 100 * entry.outcome.accuracy[entry.trial.length]


def decisive(entries: dict[str, Entry], task: str, sizes: tuple[int, ...]) -> int | None:
    """The fewest examples with which anybody learned half of the way from chance to all right; None: nobody did."""
    for size in sizes:
        asked = [entries[f"{task}, {name}, {size} examples"] for name in MIXERS]
        chance = 100 * tasks.build(TASKS[task][0]).chance(asked[0].trial.length)
        if max(map(percent, asked)) >= (chance + 100) / 2:
            return size
    return None


def wins(entries: dict[str, Entry], own: str) -> bool:
    """Whether none of the others is better by more than the error."""
    best = entries[own].outcome
    assert best is not None
    for entry in entries.values():
        other, n = entry.outcome, entry.trial.length
        assert other is not None
        if other.accuracy[n] - best.accuracy[n] > SURE * (other.error(n) ** 2 + best.error(n) ** 2) ** 0.5:
            return False
    return True
