"""Pays: time and memory of a swapped model beside the original by length, and from which length on it is faster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from headway import machine
from headway.attend import listening
from headway.compare.cost import curve, skipped
from headway.compare.cost_worker import measure, timing
from headway.compare.growth import crossover, fit
from headway.hub import Loaded
from headway.swap.drift import Watch
from headway.swap.reading import ANSWER

SHORTEST, LONGEST = 128, 8192  # tokens, where nothing else is said


def lengths_for(model: Loaded) -> list[int]:
    """Doublings up to the longest text the model takes."""
    longest = min(model.max_tokens or LONGEST, LONGEST)
    return [n for n in (SHORTEST << i for i in range(16)) if n <= longest] or [longest]


def pays(
    original: Loaded,
    swapped: Loaded,
    lengths: Sequence[int] | None = None,
    *,
    seconds: float = 5.0,
    watch: Watch = lambda what, done, total: None,
) -> dict[str, Any]:
    """Both models on one text of each length, forward, as they are used. A point takes `seconds` at most; a length that
    would take more, or more memory than is free, is skipped, and says so.

    `{"original": record, "swapped": record, "crossover": {...}}`, the records as those of `headway cost`.
    """
    models = {"original": original, "swapped": swapped}
    if original.kind == "vision":
        raise ValueError("pays: pictures of one size have one length; there is nothing to measure by length")
    lengths = sorted(lengths or lengths_for(original))
    if original.max_tokens is not None and lengths[-1] > original.max_tokens:
        raise ValueError(f"pays: {lengths[-1]} tokens are beyond the {original.max_tokens} of this model: name shorter "
                         "lengths, or give a larger context")  # fmt: skip
    points: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    for done, length in enumerate(lengths):
        watch("measuring speed", done, len(lengths))
        for name, model in models.items():
            reason = skipped(points[name], length, seconds, machine.free_memory(model.device))
            points[name].append({"length": length, "skipped": reason} if reason else _point(model, length, seconds))
    records: dict[str, Any] = {}
    for name, measured in points.items():
        growth = fit(curve({"points": measured}))
        records[name] = {"points": measured, "fit": None if growth is None else asdict(growth)}
    where = crossover(curve(records["swapped"]), curve(records["original"]))
    return {**records, "crossover": {**asdict(where), "words": str(where)}}


def _point(model: Loaded, length: int, seconds: float) -> dict[str, Any]:
    ids = torch.randint(0, model.vocab or 1, (1, length), generator=torch.Generator().manual_seed(0)).to(model.device)
    model.pack()
    net: Any = model.net

    @torch.inference_mode()
    def run() -> None:
        if model.kind == "seq2seq":
            net.states(ids[:, :ANSWER], net.encode(ids))
        else:
            net(ids)

    with listening() as heard:
        taken, extra = measure(run, model.device, seconds)
    return {**timing(length, taken, extra), "kernels": sorted({one.backend for one in heard})}
