"""Best use: where attention, recurrence and convolution each win, read off figures that other claims measure too."""

from __future__ import annotations

import torch

from headway.compare.claims import FAILS, HOLDS, PARTLY, Found, How, Row, Table, bias
from headway.compare.claims._layers import Named, caller, causal, drawn, layer, seconds

SECTION = "A"
TITLE = "What each is best used for"
SAID = (
    "Attention is for looking things up, recurrence for keeping count over time, convolution for cheap local patterns."
)
METHOD = (
    "Accuracy on the three tasks of the claim on bias, with most examples; a layer's time forward at 1,024 tokens of "
    "width 64, and what it remembers of such a stream."
)
RULE = (
    "It holds where attention is best at looking up, recurrence at counting and convolution at shifted patterns, "
    "each to within 1 point, and the convolution takes least time; in part where some of the four are so."
)
SECONDS = bias.SECONDS
LENGTH, WIDTH, CLOSE = 1024, 64, 1.0


def measure(how: How) -> Found:
    """The winners of each column; trainings are those of `bias`, and kept for it."""
    table = bias.measure(how).tables[0]
    accuracy = {(str(row[0]), str(row[1])): float(row[-1] or 0.0) for row in table.rows}
    times = {name: forward(named, how) for name, named in bias.MIXERS.items()}
    states = {name: layer(named, WIDTH).cost(LENGTH).state_bytes for name, named in bias.MIXERS.items()}
    most = {task: max(accuracy[task, name] for name in bias.MIXERS) for task in bias.TASKS}
    best = {task: [n for n in bias.MIXERS if accuracy[task, n] >= most[task] - CLOSE] for task in bias.TASKS}
    right = [own in best[task] for task, (_, own) in bias.TASKS.items()]
    quickest = min(times, key=lambda name: times[name][0])
    smallest = min(states, key=lambda name: states[name])
    right.append(quickest == "convolution")
    wins = "; ".join(f"{task}: {' and '.join(names)} ({most[task]:.0f}%)" for task, names in best.items())
    rows: tuple[Row, ...] = tuple(
        (name, *(accuracy[task, name] for task in bias.TASKS), 1e3 * times[name][0], states[name] / 1000)
        for name in bias.MIXERS
    )
    return Found(
        verdict=HOLDS if all(right) else PARTLY if any(right) else FAILS,
        because=f"Best at {wins}. The least time at {LENGTH:,} tokens: {quickest}; the least to remember: {smallest}.",
        tables=(
            Table(
                title="Who wins what",
                columns=("", *(f"{task}, %" for task in bias.TASKS), "ms forward", "state of a stream, kB"),
                rows=rows,
                spread={f"{r},4": (1e3 * found[1], 1e3 * found[2]) for r, found in enumerate(times.values())},
            ),
        ),
        notes=(
            "The tasks are small and built to need one ability each: what a whole model is best for needs several.",
        ),
        settings={"length": LENGTH, "width": WIDTH, "trainings": "those of the claim on bias", "seed": how.seed},
    )


def forward(named: Named, how: How) -> tuple[float, float, float]:
    net, x = layer(named, WIDTH).to(how.device), drawn(1, LENGTH, WIDTH).to(how.device)
    call = caller(net, causal(named, WIDTH))
    with torch.no_grad():
        return seconds(lambda: call(x), 0.3, how.device)
