"""Long-range tasks: ListOps, Pathfinder and real text byte by byte (Long Range Arena, 2011.04006).

At the published size, with a GPU and hours: `python -m headway.compare.published listops attention --device cuda`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from headway.compare import contest, tasks
from headway.compare.claims import FAILS, HOLDS, OPEN, PARTLY, Found, How, Table
from headway.compare.claims._trials import accuracy, hold, pareto, published, settings, table
from headway.compare.contest import Entry, beyond_chance
from headway.compare.trial import Trial
from headway.recipe import OptimizerSpec

SECTION = "F"
TITLE = "Long-range tasks"
SAID = "Efficient mixers keep up with attention on long rows."
METHOD = "Two layers learn ListOps, Pathfinder and which package bytes of source are from, all from the same rows."
SECONDS = (45.0, 1300.0)
SURE = 3.0  # standard errors
RULE = (
    f"A task counts where somebody is {SURE:g} standard errors above chance; it holds where, on every such task, "
    "another mixer is as good as full attention to within the error of both; in part, on some; with no task that "
    "counts, nothing is decided."
)
FEW = ("attention", "performer", "GRU", "convolution of 3")  # and those whose title begins with one of BEGIN
BEGIN = ("attention, window", "linformer")
RATES = OptimizerSpec(lr=2e-3, matrix_lr=0.02, warmup=20, weight_decay=0.01)
Setting = tuple[dict[str, Any], int, dict[str, Any]]  # task, length, what else of a trial


def measure(how: How) -> Found:
    """Quick: some mixers, short rows, some tens of steps. Full: all of them at two lengths, longer ones on a GPU."""
    runs, tables, plots, contests, counted, kept = settings_of(how), [], [], [], [], []
    for i, (task, length, more) in enumerate(runs):
        few = lambda title: not how.quick or title in FEW or title.startswith(BEGIN)
        chosen = contest.contestants(length, heads=2, own=how.mixers, only=few)
        base = Trial(task=task, mixers=({"name": "identity"},), length=length, hidden=128, optimizer=RATES,
                     seed=how.seed, enough=None)  # fmt: skip
        base = msgspec.structs.replace(base, **more)
        entries = hold(how, contest.each(base, chosen), i / len(runs), (i + 1) / len(runs))
        title = f"{task['name']} at {length}"
        tables.append(table(f"{title} (chance {100 * tasks.build(task).chance(length):.1f}%)", entries))
        plots.append(pareto(f"{title}: accuracy against time", entries, "time"))
        contests.append({f"{title}, {name}": entry for name, entry in entries.items()})
        if any(entry.outcome and beyond_chance(entry) >= SURE for entry in entries.values()):
            counted.append(title)
            if near(entries):
                kept.append(title)
    theirs: list[Table | None] = [published(task) for task in {task["name"]: task for task, _, _ in runs}.values()]
    whole = OPEN if not counted else HOLDS if len(kept) == len(counted) else PARTLY if kept else FAILS
    away = [f"{task['name']} at {length}" for task, length, _ in runs if f"{task['name']} at {length}" not in counted]
    return Found(
        verdict=whole,
        because=f"above chance: {', '.join(counted) or 'nobody, anywhere'}; as good as attention: "
        f"{', '.join(kept) or 'nobody'}",
        tables=(*tables, *(one for one in theirs if one is not None)),
        plots=tuple(plots),
        notes=(f"Nobody left chance within this budget: {', '.join(away)}.",) if away else (),
        settings=settings(how, *contests),
    )


def settings_of(how: How) -> list[Setting]:
    """Tasks, lengths and budgets: they differ in size alone."""
    listops, pathfinder, sources = {"name": "listops"}, {"name": "pathfinder"}, {"name": "sources"}
    if how.quick:
        few = {"steps": 60, "rows": 16, "test_rows": 512}
        own = [(task, 128, few) for task in how.tasks]
        return [(listops, 128, few), (pathfinder, 144, few), (sources, 128, few), *own]
    more = {"steps": 100 if how.device == "cpu" else 400, "rows": 32, "test_rows": 1000}
    short, long = ((128, 144, 128), (256, 256, 512)) if how.device == "cpu" else ((512, 256, 512), (2000, 1024, 2048))
    each = [
        (task, n, more)
        for sizes in (short, long)
        for task, n in zip((listops, pathfinder, sources), sizes, strict=True)
    ]
    return each + [(task, n, more) for task in how.tasks for n in (short[0], long[0])]


def near(entries: dict[str, Entry]) -> list[str]:
    """Who is as good as attention, or better, to within the error of both."""
    full, found = entries["attention"], []
    assert full.outcome is not None
    for name, entry in entries.items():
        if name != "attention" and entry.outcome is not None:
            n = entry.trial.length
            error = 100 * (full.outcome.error(n) ** 2 + entry.outcome.error(n) ** 2) ** 0.5
            if (accuracy(entry) or 0.0) >= (accuracy(full) or 0.0) - error:
                found.append(name)
    return found
