"""Heads: one against many of the same width together (1706.03762, section 3.2.2)."""

from __future__ import annotations

from typing import Any

from headway.compare.claims import FAILS, HOLDS, PARTLY, Found, How, Table
from headway.compare.claims._trials import by_seed, hold, learning, settings
from headway.compare.contest import RATES
from headway.compare.trial import Trial

SECTION = "E"
TITLE = "Many heads rather than one"
SAID = "Several narrow heads learn more than a single wide one, at the same width and cost."
METHOD = (
    "One head or up to 8, of width 64 together, two layers, learn real text byte by byte and MQAR, with some seeds."
)
MORE = 1.0  # points
RULE = (
    f"A task is won by several heads where the best number of them beats one head by {MORE:g} point or more, and with "
    "every seed. It holds where both tasks are won, in part where one is."
)
SECONDS = (45.0, 300.0)
QUICK, FULL = (1, 4, 8), (1, 2, 4, 8)


def measure(how: How) -> Found:
    """Accuracy by number of heads, on each task."""
    counts, seeds = (QUICK, 2) if how.quick else (FULL, 4)
    tasks: dict[str, tuple[dict[str, Any], int, int]] = {
        "text": ({"name": "prose"}, 100, 2000),
        "MQAR": ({"name": "mqar", "pairs": 4, "symbols": 16}, 100, 1000),
    }
    wanted = {
        f"{task}, {heads} head{'s' if heads > 1 else ''}, seed {how.seed + k}": Trial(
            task=named,
            mixers=({"name": "attention", "heads": heads},),
            hidden=128 if task == "text" else None,
            length=64,
            steps=quick if how.quick else full,
            rows=32,
            every=20,
            test_rows=256,
            optimizer=RATES,
            seed=how.seed + k,
        )
        for task, (named, quick, full) in tasks.items() for heads in counts for k in range(seeds)
    }  # fmt: skip
    entries = hold(how, wanted)
    found = by_seed(entries)
    mean = {title: sum(some) / len(some) for title, some in found.items()}
    better, said = [], []
    for task in tasks:
        several = {title: some for title, some in found.items() if title.startswith(task) and "1 head" not in title}
        title = max(several, key=lambda t: mean[t])
        one = found[f"{task}, 1 head"]
        ahead = mean[title] - mean[f"{task}, 1 head"]
        if all(b > a for a, b in zip(one, several[title], strict=True)) and ahead >= MORE:
            better.append(task)
        said.append(f"{title} reach {mean[title]:.1f}%, one head {mean[f'{task}, 1 head']:.1f}%")
    return Found(
        verdict=HOLDS if len(better) == len(tasks) else PARTLY if better else FAILS,
        because="; ".join(said) + ".",
        tables=(
            Table(
                title=f"Accuracy with {seeds} seeds, %",
                columns=("", "accuracy"),
                rows=tuple((title, round(value, 1)) for title, value in mean.items()),
                spread={f"{i},1": (round(min(some), 1), round(max(some), 1)) for i, some in enumerate(found.values())},
            ),
        ),
        plots=tuple(
            learning(
                f"Learning, {task}",
                "Each line is a number of heads; the higher one learned more from the same rows.",
                {t: e for t, e in entries.items() if t.startswith(task) and t.endswith(f"seed {how.seed}")},
            )
            for task in tasks
        ),
        settings=settings(how, entries),
    )
