"""Recall: attention against a gated convolution as long as the sequence, of the same width (Zoology, 2312.04927)."""

from __future__ import annotations

from headway.compare import contest
from headway.compare.claims import FAILS, HOLDS, PARTLY, Found, How, Table
from headway.compare.claims._trials import by_seed, hold, learning, published, settings
from headway.compare.contest import GATED, RATES
from headway.compare.trial import Trial

SECTION = "F"
TITLE = "Recall: attention and the gated convolution"
SAID = "Attention recalls at width 64 whatever the length; a gated convolution needs a width as large as the sequence."
METHOD = (
    "MQAR: two layers of width 64 learn to give back the values of keys; the same steps, rows and optimizer for both."
)
SECONDS = (25.0, 800.0)
SOLVED, SHORT = 99.0, 90.0  # percent
RULE = (
    f"It holds where attention answers {SOLVED:g}% or more and the convolution {SHORT:g}% or less, at every length and "
    "for every seed; up to a length where that is so of the shorter ones."
)
QUICK = {64: 4, 128: 8}  # pairs by length, as published
FULL = {64: 4, 128: 8, 256: 16}


def measure(how: How) -> Found:
    """Both mixers at each length, with several seeds; in full also at greater widths."""
    pairs, seeds, widths = (QUICK, 1, (64,)) if how.quick else (FULL, 3, (64, 256))
    wanted = {}
    for length, many in pairs.items():
        for name in ("attention", GATED):
            mixers = contest.contestants(length)[name]
            for width in widths if name == GATED else widths[:1]:
                for seed in range(how.seed, how.seed + (seeds if length > 64 else max(2, seeds))):
                    wanted[f"{name}, width {width}, {length} tokens, seed {seed}"] = Trial(
                        task={"name": "mqar", "pairs": many, "symbols": 8 if how.quick else 64},
                        mixers=mixers,
                        length=length,
                        width=width,
                        steps=200 if how.quick else 600,
                        rows=32,
                        every=20,
                        optimizer=RATES,
                        seed=seed,
                    )
    entries = hold(how, wanted)
    found = by_seed(entries)
    rows = tuple((key, round(sum(seen) / len(seen), 1)) for key, seen in found.items())
    spread = {f"{i},1": (round(min(seen), 1), round(max(seen), 1)) for i, seen in enumerate(found.values())}
    held = [n for n in pairs if min(found[f"attention, width 64, {n} tokens"]) >= SOLVED
            and max(found[f"{GATED}, width 64, {n} tokens"]) <= SHORT]  # fmt: skip
    verdict = HOLDS if len(held) == len(pairs) else PARTLY if held and held == list(pairs)[: len(held)] else FAILS
    theirs = published({"name": "mqar"})
    assert theirs is not None
    return Found(
        verdict=verdict,
        because="; ".join(f"{name} {mean:g}%" for name, mean in rows),
        tables=(Table(title="Accuracy", columns=("", "accuracy, %"), rows=rows, spread=spread), theirs),
        plots=(
            learning(
                "Learning to recall",
                "Attention finds out within some tens of steps how to look up a key; the convolution stays behind.",
                {title: e for title, e in entries.items() if title.endswith(f"seed {how.seed}")},
            ),
        ),
        notes=("Ours has a small vocabulary, so that training takes seconds, and blanks between the questions.",),
        settings=settings(how, entries),
    )
