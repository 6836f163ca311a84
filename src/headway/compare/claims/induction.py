"""Induction beyond the trained length: does what was learned on short rows carry over (2209.11895, 2312.00752)?"""

from __future__ import annotations

from headway.compare import contest
from headway.compare.claims import FAILS, HOLDS, OPEN, Found, How, Line, Plot
from headway.compare.claims._trials import accuracy, hold, listed, published, settings, table
from headway.compare.contest import RATES
from headway.compare.trial import Trial

SECTION = "F"
TITLE = "Induction, and rows longer than those learned from"
SAID = "Attention with rotary positions learns induction, and loses it on longer rows; a recurrence keeps it."
METHOD = "Two layers of width 64 learn induction on short rows, and are asked on rows two and four times as long."
SECONDS = (8.0, 600.0)
LEARNED, LOST = 80.0, 15.0  # percent, points
RULE = (
    f"It holds where attention learned it ({LEARNED:g}% or more) and loses {LOST:g} points or more at four times the "
    f"length, and a recurrence that learned it loses fewer; it is not decided where one of the two did not learn it."
)
RECURRENT = ("GRU", "LSTM", "linear, retention", "linear, gated", "linear, delta", "state space")


def measure(how: How) -> Found:
    """Attention and the GRU; in full all that can."""
    length = 32 if how.quick else 128
    tested = (2 * length, 4 * length)
    few = lambda title: not how.quick or title in ("attention", "GRU")
    chosen = contest.contestants(length, own=how.mixers, only=few)
    base = Trial(
        task={"name": "induction"},
        mixers=({"name": "identity"},),
        length=length,
        steps=400 if how.quick else 600,
        rows=64,
        tested=tested,
        test_rows=256,
        optimizer=RATES,
        seed=how.seed,
    )
    entries = hold(how, contest.each(base, chosen))
    lost = {
        name: (accuracy(entry) or 0.0) - (accuracy(entry, tested[-1]) or 0.0)
        for name, entry in entries.items()
        if entry.outcome is not None and (accuracy(entry) or 0.0) >= LEARNED
    }
    kept = [name for name in RECURRENT if name in lost and lost[name] < lost.get("attention", 0.0)]
    decided = "attention" in lost and any(name in lost for name in RECURRENT)
    holds = decided and lost["attention"] >= LOST and kept
    lines = tuple(
        Line(name=name, points=tuple((float(n), 100 * right) for n, right in sorted(entry.outcome.accuracy.items())))
        for name, entry in entries.items()
        if entry.outcome is not None
    )
    theirs = published({"name": "induction"})
    assert theirs is not None
    return Found(
        verdict=HOLDS if holds else FAILS if decided else OPEN,
        because="; ".join(f"{name} loses {points:.1f} points" for name, points in lost.items()) or "nobody learned it",
        tables=(table(f"Trained at {length} (chance 6.7%)", entries), theirs),
        plots=(
            Plot(
                title="Asked at greater lengths",
                sentence="A level line carries over; a falling one has learned the length along with the task.",
                x="tokens in a row",
                y="accuracy, %",
                lines=lines,
                log_x=True,
            ),
        ),
        notes=(f"Refused: {listed([name for name, entry in entries.items() if entry.refused])}.",),
        settings=settings(how, entries),
    )
