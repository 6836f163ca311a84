"""Scaling: held-out loss against parameters and tokens, and along the row (2001.08361 of the Transformer)."""

from __future__ import annotations

import math
from typing import Any

from headway.compare import growth
from headway.compare.claims import FAILS, HOLDS, PARTLY, Found, How, Line, Plot, Row, Table, curves
from headway.compare.claims._trials import hold, settings
from headway.compare.contest import Entry
from headway.compare.trial import Trial
from headway.recipe import OptimizerSpec

SECTION = "A"
TITLE = "Scaling with size and data"
SAID = "A Transformer gains most from more parameters and more data; an RNN struggles; a CNN is in between."
METHOD = "Three sizes of each learn to tell the next byte of real text; a power law is fitted to the loss held out."
RULE = (
    "It holds where the loss of the Transformer falls with a greater exponent than the RNN's, by more than twice the "
    "error of the fits, in parameters and in tokens; in part, in one."
)
SECONDS = (25.0, 400.0)
MIXERS: dict[str, dict[str, Any]] = {
    "Transformer": {"name": "attention", "heads": 2},
    "RNN (GRU)": {"name": "rnn", "cell": "gru"},
    "CNN (3 tokens)": {"name": "conv"},
}
LOSS = "bits a byte, held out"
RATES = OptimizerSpec(lr=3e-3, matrix_lr=0.02, warmup=20, weight_decay=0.0, schedule="constant")


def measure(how: How) -> Found:
    """Each of the three at three widths; the looks on the way tell the loss after fewer tokens."""
    widths, steps, rows, length = ((32, 64, 96), 100, 16, 64) if how.quick else ((64, 128, 256), 600, 16, 256)
    wanted = {
        f"{name}, width {width}": Trial(
            task={"name": "prose"},
            mixers=(mixer,),
            length=length,
            width=width,
            hidden=2 * width,
            steps=steps,
            rows=rows,
            every=steps // 4,
            test_rows=128,
            enough=None,
            optimizer=RATES,
            seed=how.seed,
        )
        for name, mixer in MIXERS.items()
        for width in widths
    }
    entries = hold(how, wanted)
    found = {name: [entries[f"{name}, width {width}"] for width in widths] for name in MIXERS}
    by_size = {name: by_parameters(each) for name, each in found.items()}
    by_data = {name: by_tokens(each[-1]) for name, each in found.items()}
    each = {name: (growth.fit(by_size[name]), growth.fit(by_data[name])) for name in MIXERS}
    ahead = [i for i in (0, 1) if steeper(each["Transformer"][i], each["RNN (GRU)"][i])]
    fits = {name: (exponent(size), exponent(data)) for name, (size, data) in each.items()}
    table: tuple[Row, ...] = tuple(
        (name, *(round(bits, 3) for bits in by_size[name].values()), round(fits[name][0], 3), round(fits[name][1], 3))
        for name in MIXERS
    )
    columns = ("", *(f"bits a byte at width {width}" for width in widths), "exponent in parameters", "in tokens")
    return Found(
        verdict=HOLDS if len(ahead) == 2 else PARTLY if ahead else FAILS,
        because="; ".join(f"{name}: {a:.3f} in parameters, {b:.3f} in tokens" for name, (a, b) in fits.items()),
        tables=(Table(title="Held-out loss, and the exponent it falls with", columns=columns, rows=table),),
        plots=(
            curves(
                "Loss against size",
                "Lower is better; a steeper line gains more from size.",
                "parameters",
                LOSS,
                by_size,
            ),
            curves(
                "Loss against data",
                "The largest of each; a steeper line learns more from data.",
                "tokens",
                LOSS,
                by_data,
            ),
            along(found),
        ),
        notes=("Every width had the same tokens; the rate was constant, so that a look on the way is a shorter run.",),
        settings=settings(how, entries),
    )


def by_parameters(entries: list[Entry]) -> dict[int, float]:
    """Bits a byte of each size."""
    return {e.outcome.parameters: e.outcome.loss / math.log(2) for e in entries if e.outcome is not None}


def by_tokens(entry: Entry) -> dict[int, float]:
    """Bits a byte as training goes on."""
    assert entry.outcome is not None
    step = entry.trial.rows * entry.trial.length
    seen = {at * step: loss / math.log(2) for at, _, loss in entry.outcome.curve}
    return {**seen, entry.outcome.steps * step: entry.outcome.loss / math.log(2)}


def steeper(ours: growth.Fit | None, theirs: growth.Fit | None) -> bool:
    """Whether a loss surely falls faster; exponents of losses are below zero."""
    if ours is None or theirs is None:
        return False
    return ours.exponent + 2 * (ours.error or 0.0) < theirs.exponent - 2 * (theirs.error or 0.0)


def exponent(found: growth.Fit | None) -> float:
    """b in loss ~ size^-b."""
    return 0.0 if found is None else -found.exponent


def along(found: dict[str, list[Entry]]) -> Plot:
    """Loss by position, of the largest."""
    lines = []
    for name, each in found.items():
        outcome, length = each[-1].outcome, each[-1].trial.length
        losses = outcome.loss_by_eighth if outcome is not None else ()
        points = tuple(
            ((i + 0.5) * length / 8, loss / math.log(2)) for i, loss in enumerate(losses) if loss is not None
        )
        lines.append(Line(name=name, points=points))
    sentence = "A line that goes on falling to the right makes use of what stands far back."
    return Plot(
        title="Loss along the row", sentence=sentence, x="position", y="bits a byte, held out", lines=tuple(lines)
    )
