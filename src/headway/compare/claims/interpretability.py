"""Interpretability: whether a trained layer's map shows what its answers were taken from (1902.10186, 1908.04626)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from headway.compare import tasks
from headway.compare.claims import FAILS, HOLDS, PARTLY, Found, How, Table
from headway.compare.claims._layers import Named
from headway.compare.contest import RATES
from headway.compare.trial import Trial, logits_of, train
from headway.probe.capture import capture

SECTION = "B"
TITLE = "Weights that can be read"
SAID = "Attention's weights show what an answer was taken from; a convolution's, the same for every input, cannot."
METHOD = (
    "Two layers learn MQAR, where the place of each answer is known: how often the last layer's most weight lies on "
    "it, and how often the answer changes when the token there does, or another one."
)
RULE = (
    "It holds where attention's most weight is on the right place for 80% of questions or more, changing the token "
    "there changes 80% of answers and another value 20% at most, and the convolution's is on it for 20% at most; in "
    "part where only the convolution's part fails."
)
SECONDS = (10.0, 100.0)
LENGTH, PAIRS, SYMBOLS = 64, 4, 16
KINDS: dict[str, Named] = {
    "attention": {"name": "attention", "heads": 1},
    "gated convolution": {"name": "conv", "kernel": LENGTH, "depthwise": True, "decay": True},
}


def measure(how: How) -> Found:
    """Trains one of each and asks both the same questions."""
    steps, found = (150 if how.quick else 1500), {}
    for i, (title, named) in enumerate(KINDS.items()):
        told = lambda share, i=i, title=title: how.tell(title, (i + share) / len(KINDS))
        found[title] = readings(named, steps, how, told)
    read, plain = found["attention"], found["gated convolution"]
    faithful = read[1] >= 80 and read[2] >= 80 and read[3] <= 20
    names = ("answers right", "most weight on the place of the answer", "answers changed with the token there",
             "answers changed with another value")  # fmt: skip
    return Found(
        verdict=(HOLDS if plain[1] <= 20 else PARTLY) if faithful else FAILS,
        because=f"Attention's most weight is on the answer's place for {read[1]:.0f}% of questions, the convolution's "
        f"for {plain[1]:.0f}%. Changing the token there changes {read[2]:.0f}% of attention's answers, another "
        f"{read[3]:.0f}%.",
        tables=(
            Table(
                title="Held-out questions, %",
                columns=("", *names),
                rows=tuple((title, *(round(value, 1) for value in some)) for title, some in found.items()),
            ),
        ),
        notes=("One task, whose answer stands in one place. Where answers are sums of many tokens, maps tell less.",),
        settings={"length": LENGTH, "pairs": PAIRS, "symbols": SYMBOLS, "steps": steps, "rows": 32, "seed": how.seed},
    )


def readings(named: Named, steps: int, how: How, told: Any) -> tuple[float, float, float, float]:
    """Percent of questions: right, with most weight on the answer's place, changed by it, changed by another value."""
    one = Trial(
        task={"name": "mqar", "pairs": PAIRS, "symbols": SYMBOLS},
        mixers=(named,),
        length=LENGTH,
        steps=steps,
        rows=32,
        every=steps,
        enough=None,
        optimizer=RATES,
        seed=how.seed,
    )
    net, _ = train(one, how.device, lambda done, of: told(done / of))
    asked_of = tasks.build(one.task).batch(np.random.default_rng([how.seed, 1]), 128, LENGTH)
    with torch.no_grad():
        return asked(net, asked_of.to(torch.device(how.device)))


def asked(net: Any, batch: tasks.Batch) -> tuple[float, float, float, float]:
    """The four figures of one batch, in percent."""
    row, at = batch.counts.nonzero().unbind(1)
    keys, values = batch.ids[:, 0 : 2 * PAIRS : 2], batch.ids[:, 1 : 2 * PAIRS : 2]
    pair = (keys[row] == batch.ids[row, at][:, None]).int().argmax(1)
    place, beside = 2 * pair + 1, 2 * ((pair + 1) % PAIRS) + 1
    _, seen = capture(net, lambda: net(batch.ids, None))
    looked = map_of(seen[-1])[row, at].argmax(-1)
    answers = logits_of(net, batch).argmax(-1)
    other = 1 + SYMBOLS + (values[row, pair] - SYMBOLS) % SYMBOLS  # the next value, round in a circle
    changes = []
    for where in (place, beside):
        changed = batch.ids[row].clone()
        changed[torch.arange(len(row)), where] = other
        lone = torch.zeros_like(changed, dtype=torch.bool)
        lone[torch.arange(len(row)), at] = True
        changes.append(logits_of(net, tasks.Batch(changed, changed, lone)).argmax(-1) != answers)
    shares = (answers == batch.targets[batch.counts], looked == place, *changes)
    right, on_place, by_place, by_other = (100 * float(share.double().mean()) for share in shares)
    return right, on_place, by_place, by_other


def map_of(seen: Any) -> Tensor:
    """The map of a captured layer, averaged over heads: what it weighs by, or what it does as one."""
    if seen.place.has_maps:
        return seen.glance().rows(slice(None)).mean(1)
    return seen.mixer.implied(seen.x, mask=seen.mask, pos=seen.pos).map.mean(1)
