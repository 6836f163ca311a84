"""Efficient mixers: what each of them reaches and what it costs, under one budget (MQAR, 2312.04927)."""

from __future__ import annotations

from typing import Any

from headway.compare import contest, tasks
from headway.compare.claims import FAILS, HOLDS, PARTLY, Found, How, Table
from headway.compare.claims._trials import hold, listed, pareto, published, settings, table
from headway.compare.contest import RATES, Entry
from headway.compare.trial import Trial

SECTION = "F"
TITLE = "Efficient attention: quality against cost"
SAID = "Efficient mixers are nearly as good as attention, and cheaper."
METHOD = (
    "Every mixer, two layers of width 64, learns MQAR from the same rows at two lengths; your own mixers and tasks too."
)
SECONDS = (80.0, 1100.0)
NEAR = 1.0  # points
LEARNED = 3.0  # standard errors above chance
RULE = (
    f"It holds at a length where a mixer other than full attention comes within {NEAR:g} point of it and takes less "
    "time a token in training, on this machine, and attention learned anything at all; it holds in part where that "
    "is so at some of the lengths."
)


def measure(how: How) -> Found:
    """Every contestant, length by length; then the user's own tasks."""
    sizes = {64: 4, 128: 8} if how.quick else {64: 4, 128: 8, 256: 16}
    runs: list[tuple[str, dict[str, Any], int]] = [
        (f"MQAR at {n}", {"name": "mqar", "pairs": pairs, "symbols": 8 if how.quick else 64}, n)
        for n, pairs in sizes.items()
    ]
    runs += [(f"{task['name']} at {n}", task, n) for task in how.tasks for n in list(sizes)[:2]]
    tables, plots, contests, held = [], [], [], []
    for i, (title, task, length) in enumerate(runs):
        base = Trial(
            task=task,
            mixers=({"name": "identity"},),
            length=length,
            steps=100 if how.quick else 300,
            rows=16 if how.quick else 32,
            every=20,
            test_rows=256,
            optimizer=RATES,
            seed=how.seed,
        )
        entries = hold(how, contest.each(base, contest.contestants(length, own=how.mixers)), i / len(runs),
                       (i + 1) / len(runs))  # fmt: skip
        chance = 100 * tasks.build(task).chance(length)
        tables.append(table(f"{title} (chance {chance:.3g}%)", entries))
        plots += [pareto(f"{title}: accuracy against {cost}", entries, cost) for cost in ("time", "state")]
        contests.append({f"{title}, {name}": entry for name, entry in entries.items()})
        if i < len(sizes) and (ahead := cheaper(entries)):
            held.append((length, ahead))
    theirs: list[Table | None] = [published({"name": "mqar"})]
    refused = sorted({e.title for each in contests for e in each.values() if e.refused})
    return Found(
        verdict=HOLDS if len(held) == len(sizes) else PARTLY if held else FAILS,
        because="; ".join(f"at {n}: {listed(names)}" for n, names in held) or "no mixer is as near for less",
        tables=(*tables, *(one for one in theirs if one is not None)),
        plots=tuple(plots),
        notes=(f"Refused, as they see what is to come or cannot read rows this way: {listed(refused)}.",),
        settings=settings(how, *contests),
    )


def cheaper(entries: dict[str, Entry]) -> list[str]:
    """Contestants within NEAR points of full attention that take less time a token."""
    full = entries["attention"].outcome
    assert full is not None
    length = entries["attention"].trial.length
    if contest.beyond_chance(entries["attention"]) < LEARNED:
        return []  # what is as near to nothing is no proof
    return [
        name
        for name, entry in entries.items()
        if name != "attention" and entry.outcome is not None
        and 100 * (full.accuracy[length] - entry.outcome.accuracy[length]) <= NEAR
        and entry.outcome.tokens_per_second > full.tokens_per_second
    ]  # fmt: skip
