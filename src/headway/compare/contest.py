"""Contest: many mixers, one task, one budget: who reaches what, at what cost; and whom nobody beats in both.

Every contestant has the same width, depth, positions, optimizer and number of rows. What a mixer cannot do is a row
that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import msgspec
import torch

from headway.compare import tasks, trial
from headway.compare.trial import Outcome, Trial
from headway.recipe import OptimizerSpec
from headway.spec import Strict

Mixers = tuple[dict[str, Any], ...]  # of the layers, in turn
# By it, attention learns MQAR of eight symbols in some sixty steps of 32 rows; a rate that falls from the start, in 120
RATES = OptimizerSpec(lr=1e-2, matrix_lr=0.02, betas=(0.9, 0.95), warmup=10, weight_decay=0.0, schedule="wsd")


class Entry(Strict, frozen=True):
    """One contestant's trial and its outcome, or why there is none."""

    title: str
    trial: Trial
    outcome: Outcome | None = None
    refused: str | None = None


def contestants(
    length: int,
    heads: int = 1,
    own: Sequence[dict[str, Any] | str] = (),
    only: Callable[[str], bool] = lambda title: True,
) -> dict[str, Mixers]:
    """Headway's mixers by title, for rows of `length` tokens, `only` some of them, then the user's own; windows, ranks
    and kernels are a share of the length."""
    quarter = max(1, length // 4)
    few: dict[str, dict[str, Any]] = {
        "attention": {"name": "attention", "heads": heads},
        f"attention, window {quarter}": {"name": "attention", "heads": heads, "window": [quarter, 0]},
        f"longformer ±{quarter}": {"name": "longformer", "heads": heads, "window": quarter},
        f"linformer, rank {quarter}": {"name": "linformer", "heads": heads, "rank": quarter, "length": length},
        "performer": {"name": "performer", "heads": heads},
        **{
            f"linear, {kind}": {"name": "linear", "kind": kind, "heads": heads}
            for kind in ("plain", "retention", "gated", "delta")
        },
        "state space": {"name": "ssm", "state_size": 64},
        "LSTM": {"name": "rnn"},
        "GRU": {"name": "rnn", "cell": "gru"},
        "convolution of 3": {"name": "conv"},
        GATED: {"name": "conv", "kernel": length, "depthwise": True, "decay": True},
        "average": {"name": "average"},
        "Fourier": {"name": "fourier"},
        "no mixing": {"name": "identity"},
    }
    titled = [({"name": one} if isinstance(one, str) else one) for one in own]
    return {**{title: (one,) for title, one in few.items() if only(title)}, **{title_of(one): (one,) for one in titled}}


def title_of(own: Mapping[str, Any]) -> str:
    """What a mixer of the user's is called in tables: never as one of ours."""
    return "yours: " + ":".join([own["name"], *(f"{key}={value}" for key, value in own.items() if key != "name")])


GATED = "gated convolution, full length"


def hold(
    wanted: Mapping[str, Trial],
    device: torch.device | str = "cpu",
    tell: Callable[[str, float], None] = lambda line, share: None,
    memory: MutableMapping[str, Any] | None = None,
) -> dict[str, Entry]:
    """Every trial in turn, by title; `tell` hears what is running and what share of all tokens is done. What `memory`
    holds from an earlier run (the trial as JSON: the entry) is not run again."""
    sizes = {title: one.steps * one.rows * one.length for title, one in wanted.items()}
    whole, before, entries = sum(sizes.values()), 0, {}
    memory = {} if memory is None else memory
    for title, one in wanted.items():
        heard = lambda done, of, t=title, b=before: tell(t, (b + sizes[t] * done / of) / whole)
        key = f"{device} {msgspec.json.encode(one).decode()}"
        if key not in memory:
            memory[key] = msgspec.to_builtins(_held(title, one, device, heard), str_keys=True)
        entries[title] = msgspec.structs.replace(msgspec.convert(memory[key], Entry, strict=False), title=title)
        before += sizes[title]
    return entries


def _held(title: str, one: Trial, device: torch.device | str, tell: trial.Tell) -> Entry:
    try:
        return Entry(title=title, trial=one, outcome=trial.run(one, device, tell))
    except ValueError as error:
        return Entry(title=title, trial=one, refused=" ".join(str(error).split()))


def each(base: Trial, mixers: Mapping[str, Mixers], **changed: Any) -> dict[str, Trial]:
    """The same trial for every contestant."""
    return {title: msgspec.structs.replace(base, mixers=one, **changed) for title, one in mixers.items()}


def frontier(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Titles of the (cost, quality) points that no other beats: none is as good for less, or better for as much."""
    kept, best = [], float("-inf")
    for title, (_, quality) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if quality > best:
            kept.append(title)
            best = quality
    return kept


def beyond_chance(entry: Entry, length: int | None = None) -> float:
    """How many standard errors an accuracy stands above chance."""
    assert entry.outcome is not None
    at = length or entry.trial.length
    chance = tasks.build(entry.trial.task).chance(at)
    return (entry.outcome.accuracy[at] - chance) / entry.outcome.error(at)
