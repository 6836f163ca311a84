"""Blends: a window beside full attention, a convolution or a state space before it: does a blend beat its parts?"""

from __future__ import annotations

from headway.compare import contest
from headway.compare.claims import FAILS, HOLDS, PARTLY, Found, How
from headway.compare.claims._trials import hold, learning, settings, table
from headway.compare.contest import RATES, Entry
from headway.compare.trial import Trial

SECTION = "G"
TITLE = "Blends of two mixers"
SAID = "A blend of two mixers beats both of its parts."
METHOD = "Two layers of width 64: both of one kind, or one of each; the same rows of MQAR and of selective copying."
SECONDS = (25.0, 400.0)
SURE = 2.0  # standard errors
RULE = (
    f"A blend beats its parts on a task where its accuracy is {SURE:g} standard errors above that of the better one, "
    "or where it knew enough in fewer steps; it holds where a blend does so on every task, in part on some."
)
PARTS = {
    "window": "attention, window 16",
    "full": "attention",
    "convolution": "convolution of 3",
    "state space": "state space",
}
BLENDS = (("window", "full"), ("convolution", "full"), ("state space", "full"))


def measure(how: How) -> Found:
    """Parts and blends on both tasks."""
    known = contest.contestants(64)
    parts = {name: known[title] for name, title in PARTS.items()}
    chosen = {**parts, **{f"{a} + {b}": (*parts[a], *parts[b]) for a, b in BLENDS}}
    found: dict[str, dict[str, Entry]] = {}
    kinds = {"mqar": {"pairs": 4, "symbols": 8}, "selective_copying": {}}
    for i, (kind, options) in enumerate(kinds.items()):
        base = Trial(
            task={"name": kind, **options},
            mixers=({"name": "identity"},),
            steps=80 if how.quick else 500,
            rows=16 if how.quick else 64,
            every=10,
            optimizer=RATES,
            seed=how.seed,
        )
        found[kind] = hold(how, contest.each(base, chosen), i / 2, (i + 1) / 2)
    won = {f"{a} + {b}": [kind for kind in kinds if beats(found[kind], a, b)] for a, b in BLENDS}
    everywhere = [name for name, where in won.items() if len(where) == len(kinds)]
    somewhere = [name for name, where in won.items() if where]
    return Found(
        verdict=HOLDS if everywhere else PARTLY if somewhere else FAILS,
        because="; ".join(f"{name}: {' and '.join(where) or 'on neither task'}" for name, where in won.items()),
        tables=tuple(table(kind, entries) for kind, entries in found.items()),
        plots=tuple(
            learning(
                f"Learning {kind.replace('_', ' ')}",
                "A line that rises sooner, or higher, than those of both its parts is a blend that pays.",
                entries,
            )
            for kind, entries in found.items()
        ),
        settings=settings(how, *({f"{kind}, {name}": e for name, e in each.items()} for kind, each in found.items())),
    )


def beats(entries: dict[str, Entry], a: str, b: str) -> bool:
    """Whether a blend is better than both of its parts, or as good in fewer steps."""
    blend, parts = entries[f"{a} + {b}"].outcome, [entries[a].outcome, entries[b].outcome]
    assert blend is not None
    n = entries[a].trial.length
    ahead = all(
        part is None or blend.accuracy[n] - part.accuracy[n] >= SURE * (blend.error(n) ** 2 + part.error(n) ** 2) ** 0.5
        for part in parts
    )
    enough = blend.steps < entries[a].trial.steps
    return ahead or (enough and all(part is None or blend.steps < part.steps for part in parts))
