"""Report: everything that is measured of a swap, in order, as one record."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from headway import machine
from headway.hub import Loaded
from headway.swap import Swapped, swap
from headway.swap.drift import Watch
from headway.swap.reading import texts_of

MEASURED = 8_192  # tokens of held-out text that drift is measured on at most, or one row
HELD_OUT = 0.2  # of the text: it is measured on, and never healed on


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What `headway swap` was asked for. length: tokens of the rows that drift is measured on, besides those of the
    context (default: the original's longest, at most 1,024). lengths: of which time and memory are measured."""

    mixer: str
    layers: str | None = None
    context: int | None = None
    data: Path | None = None
    field: str = "text"
    heal: int = 0
    lr: float = 1e-3
    length: int | None = None
    lengths: tuple[int, ...] = ()
    seconds: float = 2.0


def report(
    model: str | Loaded, wishes: Wishes, watch: Watch = lambda what, done, total: None, name: str = "MODEL"
) -> tuple[Swapped, Any]:
    """The swapped model, healed where that was asked for, and what was measured: `exactness`, `weights`, `drift` (one a
    length; `after` where it was healed), `pays`. `name`: what a loaded model is called in the command to repeat it."""
    watch("reading the model", 0, 1)
    done = swap(model, wishes.mixer, wishes.layers, context=wishes.context)
    record: dict[str, Any] = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(model if isinstance(model, str) else name, wishes),
        "hardware": machine.hardware(),
        "versions": machine.versions(),
        "threads": torch.get_num_threads(),
        "parameters": {"original": done.original.parameters, "swapped": done.model.parameters},
        "layers": [place._asdict() for place in done.places],
        "exactness": msgspec.to_builtins(done.exactness),
        "weights": msgspec.to_builtins(done.weights),
    }
    record["drift"] = _drifts(done, wishes, watch, record)
    if done.model.kind != "vision":
        record["pays"] = done.pays(wishes.lengths or None, seconds=wishes.seconds, watch=watch)
    return done, record


def _drifts(done: Swapped, wishes: Wishes, watch: Watch, record: dict[str, Any]) -> list[dict[str, Any]]:
    """Drift at each length, before and after healing at the last."""
    every = _rows(done, wishes)
    found = [{"before": msgspec.to_builtins(done.drift(held, watch))} for _, held in every]
    if wishes.heal and not every:
        raise ValueError("swap: pictures to heal on are missing: name a folder of them with --data")
    if wishes.heal:
        train = every[-1][0]
        if train is None or not len(train):
            raise ValueError("swap: the text is too short to heal on: beside what is measured it fills no row; give "
                             "more with --data, or a smaller --length")  # fmt: skip
        losses = done.heal(train, wishes.heal, lr=wishes.lr, watch=watch)
        record["heal"] = {"steps": wishes.heal, "lr": wishes.lr, "first_loss": losses[0], "last_loss": losses[-1]}
        for one, (_, held) in zip(found, every, strict=True):
            one["after"] = msgspec.to_builtins(done.drift(held, watch))
    return found


def _rows(done: Swapped, wishes: Wishes) -> list[tuple[Tensor | None, Tensor]]:
    """What is healed on and what is measured on, at each length; shortest first."""
    if done.model.kind == "vision":
        return [_pictures(done, wishes.data)] if wishes.data is not None else []
    text = "\n\n".join(texts_of(wishes.data, wishes.field))
    cut = int(len(text) * (1 - HELD_OUT))
    found: list[tuple[Tensor | None, Tensor]] = []
    for length in _lengths(done, wishes):
        held = done.rows([text[cut:]], length)
        try:
            train = done.rows([text[:cut]], length)
        except ValueError:  # too little to heal on, which is no fault where nobody asked for it
            train = None
        found.append((train, held[: max(1, MEASURED // length)]))
    return found


def _lengths(done: Swapped, wishes: Wishes) -> list[int]:
    longest = done.original.max_tokens
    if wishes.length is not None and longest is not None and wishes.length > longest:
        raise ValueError(
            f"--length {wishes.length}: beyond the {longest} tokens of this model; name fewer, or --context"
        )
    usual = min(longest or 1024, 1024) if wishes.context is None else min(_own(done, wishes.context), 1024)
    return sorted({wishes.length or usual, *([wishes.context] if wishes.context else [])})


def _own(done: Swapped, context: int) -> int:
    """How many positions the original had before they were repeated."""
    told = [name for name in done.weights.copied if "repeated to" in name]
    return int(told[0].partition("(")[2].split()[0]) if told else context


def _pictures(done: Swapped, folder: Path | None) -> tuple[Tensor | None, Tensor]:
    from headway.use.passes import pictures
    from headway.use.rows import Pictures

    paths: Sequence[Path] = Pictures(folder or Path(), "").paths
    if len(paths) < 2:
        raise ValueError(f"{folder}: holds {len(paths)} pictures; give two or more")
    pixels = torch.cat([part for _, part in pictures(done.original, list(paths), "swap")])
    cut = max(1, int(len(pixels) * (1 - HELD_OUT)))
    return pixels[:cut], pixels[cut:]


def _command(model: str, wishes: Wishes) -> str:
    words = ["headway", "swap", model, "--mixer", wishes.mixer]
    for name in ("layers", "context", "data", "field", "heal", "lr", "length", "seconds"):
        if (value := getattr(wishes, name)) != getattr(Wishes, name):
            words += [f"--{name}", str(value)]
    if wishes.lengths:
        words += ["--lengths", ",".join(map(str, wishes.lengths))]
    return shlex.join(words)
