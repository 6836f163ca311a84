"""What the claims that train small models share: running a contest, and its rows as tables and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from headway.compare import contest, tasks
from headway.compare.claims import How, Line, Plot, Row, Table
from headway.compare.contest import Entry
from headway.compare.trial import Trial

COLUMNS = ("tokens/s in training", "kept for the way back, kB a row", "state of a stream, kB", "parameters", "remark")
Named = Mapping[str, Entry]


def hold(how: How, wanted: Mapping[str, Trial], begin: float = 0.0, end: float = 1.0) -> dict[str, Entry]:
    """Runs trials as a part, `begin` to `end`, of what a claim does."""
    tell = lambda what, share: how.tell(what, begin + (end - begin) * share)
    return contest.hold(wanted, how.device, tell, how.memory)


def settings(how: How, *contests: Named) -> dict[str, Any]:
    """What makes the same numbers again: every trial, whole."""
    return of_trials(how, {title: entry.trial for each in contests for title, entry in each.items()})


def of_trials(how: How, trials: Mapping[str, Trial]) -> dict[str, Any]:
    """The same of trials, as JSON has them."""
    return {"device": how.device, "trials": msgspec.json.decode(msgspec.json.encode(dict(trials)))}


def accuracy(entry: Entry, length: int | None = None) -> float | None:
    """In percent; None where the mixer refused."""
    if entry.outcome is None:
        return None
    return 100 * entry.outcome.accuracy[length or entry.trial.length]


def by_seed(entries: Named) -> dict[str, list[float]]:
    """Accuracies in percent, of all seeds of what is called "..., seed 0", "..., seed 1"; a refusal counts as none."""
    found: dict[str, list[float]] = {}
    for title, entry in entries.items():
        found.setdefault(title.rpartition(",")[0], []).append(accuracy(entry) or 0.0)
    return found


def table(title: str, entries: Named) -> Table:
    """A row a contestant: accuracy in percent at each length that was tested, speed, memory."""
    lengths = sorted({n for e in entries.values() if e.outcome for n in e.outcome.accuracy})
    rows: list[Row] = []
    spread: dict[str, tuple[float, float]] = {}
    for i, (name, entry) in enumerate(entries.items()):
        found = entry.outcome
        figures: list[float | None] = []
        for j, n in enumerate(lengths, 1):
            if found is None or n not in found.accuracy:
                figures.append(None)
                continue
            right, error = 100 * found.accuracy[n], 196 * found.error(n)
            figures.append(round(right, 1))
            spread[f"{i},{j}"] = (round(max(0.0, right - error), 1), round(min(100.0, right + error), 1))
        rows.append((name, *figures, *costs(entry)))
    columns = ("mixer", *(f"accuracy at {n}, %" for n in lengths), *COLUMNS)
    return Table(title=title, columns=columns, rows=tuple(rows), spread=spread)


def costs(entry: Entry) -> Row:
    """The figures of COLUMNS."""
    found = entry.outcome
    if found is None:
        return None, None, None, None, f"refused: {entry.refused}"
    state = None if found.state_bytes is None else round(found.state_bytes / 1000, 1)
    ended = f"knew enough after {found.steps} steps" if found.steps < entry.trial.steps else ""
    remark = ended if state is not None else "; ".join(part for part in (ended, "no stream") if part)
    return round(found.tokens_per_second), round(found.kept_bytes / 1000), state, found.parameters, remark


def learning(title: str, sentence: str, entries: Named) -> Plot:
    """Held-out accuracy as training goes on."""
    lines = []
    for name, entry in entries.items():
        if entry.outcome is not None:
            end = (float(entry.outcome.steps), 100 * entry.outcome.accuracy[entry.trial.length])
            seen = [(float(step), 100 * right) for step, right, _ in entry.outcome.curve if step < entry.outcome.steps]
            lines.append(Line(name=name, points=(*seen, end)))
    return Plot(title=title, sentence=sentence, x="training steps", y="accuracy, %", lines=tuple(lines))


def pareto(title: str, entries: Named, cost: str) -> Plot:
    """Every contestant's cost and accuracy; the sentence names those whom nobody beats in both.

    cost: "time", microseconds a token in training, or "state", kB that a stream remembers.
    """
    points: dict[str, tuple[float, float]] = {}
    for name, entry in entries.items():
        found = entry.outcome
        if found is None or (cost == "state" and not found.state_bytes) or not found.tokens_per_second:
            continue
        price = 1e6 / found.tokens_per_second if cost == "time" else (found.state_bytes or 0) / 1000
        points[name] = (price, 100 * found.accuracy[entry.trial.length])
    best = contest.frontier(points)
    return Plot(
        title=title,
        sentence=f"Up and to the left is better; nobody beats {', '.join(best)} in both.",
        x="microseconds a token in training" if cost == "time" else "kB that a stream remembers",
        y="accuracy, %",
        lines=tuple(Line(name=name, points=(point,)) for name, point in points.items()),
        kind="dots",
        log_x=True,
    )


def published(named: dict[str, Any]) -> Table | None:
    """What others reached on a task, and how their setting differs."""
    kind = tasks.find(named["name"])
    if not kind.PUBLISHED:
        return None
    rows = tuple((who, figure) for who, figure in kind.PUBLISHED.items())
    return Table(title=f"Published, {named['name']} ({kind.SETUP})", columns=("who", "reached"), rows=rows)


def listed(words: Sequence[str]) -> str:
    """Names in a sentence."""
    return ", ".join(words) if words else "none"
