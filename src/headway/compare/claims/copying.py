"""Copying at fixed and at changing places: what weighing by distance alone can do (Mamba, 2312.00752)."""

from __future__ import annotations

from headway.compare import contest
from headway.compare.claims import FAILS, HOLDS, Found, How
from headway.compare.claims._trials import accuracy, hold, learning, listed, published, settings, table
from headway.compare.contest import GATED, RATES, Entry
from headway.compare.trial import Trial

SECTION = "F"
TITLE = "Copying, and copying selectively"
SAID = "A mixer that weighs by distance alone copies from fixed places, and fails where the places change."
METHOD = (
    "Two layers of width 64 copy eight tokens: from the start of a row, and from places that change from row to row."
)
SECONDS = (30.0, 500.0)
COPIED, BEHIND = 95.0, 10.0  # percent, points
RULE = (
    f"It holds where the full-length convolution copies {COPIED:g}% or more from fixed places, and from changing ones "
    f"stays {BEHIND:g} points or more behind the best mixer that looks at content."
)
CONTENT = ("attention", "linear, delta", "state space", "GRU")


def measure(how: How) -> Found:
    """Both tasks, all contestants in full; trained at one length, tested at twice that too."""
    length = 64
    few = lambda title: not how.quick or title in ("attention", "GRU", GATED)
    chosen = contest.contestants(length, own=how.mixers, only=few)
    kinds = ("copying", "selective_copying")
    found: dict[str, dict[str, Entry]] = {}
    for i, kind in enumerate(kinds):
        base = Trial(
            task={"name": kind},
            mixers=({"name": "identity"},),
            length=length,
            steps=120 if how.quick else 500,
            rows=32,
            every=25,
            tested=(2 * length,),
            optimizer=RATES,
            seed=how.seed,
        )
        found[kind] = hold(how, contest.each(base, chosen), i / 2, (i + 1) / 2)
    fixed = accuracy(found["copying"][GATED]) or 0.0
    moved = accuracy(found["selective_copying"][GATED]) or 0.0
    looking = {name: accuracy(e) or 0.0 for name, e in found["selective_copying"].items() if name in CONTENT}
    best = max(looking, key=lambda name: looking[name])
    theirs = published({"name": "selective_copying"})
    assert theirs is not None
    return Found(
        verdict=HOLDS if fixed >= COPIED and looking[best] - moved >= BEHIND else FAILS,
        because=f"the convolution: {fixed:.1f}% and {moved:.1f}%; {best}, selectively: {looking[best]:.1f}%",
        tables=(*(table(f"{kind} (chance 12.5%)", found[kind]) for kind in kinds), theirs),
        plots=tuple(
            learning(f"Learning {kind.replace('_', ' ')}", sentence, found[kind])
            for kind, sentence in zip(
                kinds,
                (
                    "Where the places are fixed, looking so many tokens back is all it takes.",
                    "Where they change, who cannot look at content stays behind; within this budget nobody is done.",
                ),
                strict=True,
            )
        ),
        notes=(
            f"Refused: {listed(sorted({e.title for each in found.values() for e in each.values() if e.refused}))}.",
        ),
        settings=settings(how, *({f"{kind}, {name}": e for name, e in each.items()} for kind, each in found.items())),
    )
