"""Schemes of positions, inside the trained length and beyond it (ALiBi, 2108.12409, figure 1)."""

from __future__ import annotations

from headway.compare.claims import FAILS, HOLDS, PARTLY, Found, How, Line, Plot, Table
from headway.compare.claims._trials import accuracy, hold, settings
from headway.compare.contest import RATES
from headway.compare.trial import Trial
from headway.spec import PositionSpec, convert

SECTION = "E"
TITLE = "Positions inside and beyond the trained length"
SAID = "ALiBi goes on beyond the length it was trained at; learned, sinusoidal and rotary positions do not."
METHOD = (
    "A causal model reads real text, byte by byte, in rows of 64; tested on rows of 64, 128 and 256 that it never saw."
)
LOSS = 2.0  # points
RULE = (
    f"From 64 to 256 tokens ALiBi loses at most {LOSS / 2:g} point of accuracy, and learned, sinusoidal and rotary "
    f"positions each {LOSS:g} or more: then it holds; in part where ALiBi keeps its accuracy and some of the others "
    "lose so much."
)
SECONDS = (45.0, 400.0)
SCHEMES = ("learned", "sinusoidal", "rotary", "alibi", "none")
TRAINED, BEYOND = 64, (128, 256)


def measure(how: How) -> Found:
    """Accuracy by scheme and length."""
    seeds = 1 if how.quick else 3
    wanted = {
        f"{scheme}, seed {how.seed + k}": Trial(
            task={"name": "prose"},
            mixers=({"name": "attention", "heads": 4},),
            hidden=128,
            positions=convert({"name": scheme}, PositionSpec),
            length=TRAINED,
            tested=BEYOND,
            steps=200 if how.quick else 3000,
            rows=32,
            test_rows=128,
            every=50,
            optimizer=RATES,
            seed=how.seed + k,
        )
        for scheme in SCHEMES for k in range(seeds)
    }  # fmt: skip
    entries = hold(how, wanted)
    lengths = (TRAINED, *BEYOND)
    found = {scheme: {n: [accuracy(entries[f"{scheme}, seed {how.seed + k}"], n) or 0.0 for k in range(seeds)]
                      for n in lengths} for scheme in SCHEMES}  # fmt: skip
    mean = {scheme: {n: sum(some) / seeds for n, some in by.items()} for scheme, by in found.items()}
    lost = {scheme: by[TRAINED] - by[BEYOND[-1]] for scheme, by in mean.items()}
    keeps, fall = lost["alibi"] <= LOSS / 2, [s for s in ("learned", "sinusoidal", "rotary") if lost[s] >= LOSS]
    return Found(
        verdict=HOLDS if keeps and len(fall) == 3 else PARTLY if keeps and fall else FAILS,
        because=f"From {TRAINED} to {BEYOND[-1]} tokens: "
        + ", ".join(f"{scheme} {-lost[scheme]:+.1f} points" for scheme in SCHEMES)
        + f"; inside, accuracy is {min(mean[s][TRAINED] for s in SCHEMES):.1f} to "
            f"{max(mean[s][TRAINED] for s in SCHEMES):.1f}%.",
        tables=(
            Table(
                title="The next byte right, %",
                columns=("", *(f"{n} tokens" for n in lengths)),
                rows=tuple((scheme, *(round(by[n], 1) for n in lengths)) for scheme, by in mean.items()),
                spread={f"{r},{c + 1}": (min(by[n]), max(by[n]))
                        for r, by in enumerate(found.values()) for c, n in enumerate(lengths) if seeds > 1},
            ),
        ),
        plots=(
            Plot(
                title="Beyond the trained length",
                sentence=f"All were trained at {TRAINED} tokens; lines that fall do not carry on beyond it.",
                x="tokens a row",
                y="next byte right, %",
                lines=tuple(Line(name=s, points=tuple((float(n), v) for n, v in by.items())) for s, by in mean.items()),
                log_x=True,
            ),
        ),
        notes=("A causal mask tells the order too, so no positions at all is not the same as no order.",),
        settings=settings(how, entries),
    )  # fmt: skip
