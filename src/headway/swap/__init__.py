"""Swap: what mixes the tokens of a pretrained model, replaced; and what that did, told in figures.

`headway.swap("roberta", "longformer:window=256", context=4096)` gives the new model beside the original; `drift`
says how far apart they are on a text, `heal` brings them nearer, `pays` from which length on it is worth it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from headway import hub
from headway.adapt._base import adaptation_of
from headway.hub import Loaded
from headway.mixers import find
from headway.swap.carry import Weights, carried
from headway.swap.change import Change, Exactness, Place, changed, extended
from headway.swap.drift import Drift, Watch
from headway.swap.drift import drift as drifted
from headway.swap.heal import heal as healed
from headway.swap.pays import pays as paying
from headway.swap.reading import rows_of
from headway.swap.words import mixer_of

__all__ = ["Drift", "Exactness", "Swapped", "Weights", "swap"]


class Swapped:
    """`model`: the new one, which is used and saved like any other. `original`: what it is compared with; where a
    context was asked for, with the same repeated positions, so that both read texts of that length.

    exactness: up to which length the two are equal, and why. weights: what was kept, copied, made anew, left behind.
    """

    def __init__(self, model: Loaded, original: Loaded, change: Change, weights: Weights, touched: list[str]) -> None:
        self.model, self.original = model, original
        self.places, self.exactness, self.weights = change.places, change.exactness, weights
        self._touched = touched

    def rows(self, texts: Sequence[str], length: int | None = None) -> Tensor:
        """Texts as rows of `length` tokens (default: the longest both take, at most 1,024), for `drift` and `heal`."""
        return rows_of(self.original, texts, length or min(self.original.max_tokens or 1024, 1024))

    def drift(self, rows: Tensor, watch: Watch = lambda what, done, total: None) -> Drift:
        """How far the two are apart on `rows` (ids; of a model of pictures: pixels)."""
        return drifted(self.original, self.model, rows, watch)

    def heal(
        self, rows: Tensor, steps: int = 200, *, lr: float = 1e-3, watch: Watch = lambda what, done, total: None
    ) -> list[float]:
        """Distils the original into what the swap changed, in place, on `rows`; the loss at each step."""
        equal = self.exactness.tokens
        if rows.ndim == 2 and (equal is None or rows.shape[1] <= equal):
            raise ValueError(f"heal: on {rows.shape[1]} tokens the two models are equal already: give longer rows")
        self.original.unpack()
        self.model.unpack()
        return healed(self.original, self.model, rows, steps, self._touched, lr=lr, watch=watch)

    def pays(
        self, lengths: Sequence[int] | None = None, *, seconds: float = 5.0,
        watch: Watch = lambda what, done, total: None,
    ) -> dict[str, Any]:  # fmt: skip
        """Time and memory of both by length, and the length from which the swap is faster."""
        return paying(self.original, self.model, lengths, seconds=seconds, watch=watch)


def swap(
    model: Loaded | str | Path,
    mixer: str | Mapping[str, Any],
    layers: str | Sequence[int] | None = None,
    *,
    context: int | None = None,
    seed: int = 0,
) -> Swapped:
    """A pretrained model with another `mixer` in its `layers` (all of them by default); the given one stays as it is.

    mixer: "longformer:window=256", "attention:window=256,sinks=4", or {"name": ..., option: value}; one number is a
    window to both sides, or, where the model is causal, to the left. Heads, widths and biases are the model's own.
    layers: numbers, or "0-5,11"; of an encoder-decoder "encoder", "decoder.0-5". context: the longest text from now on;
    learned positions are repeated up to there (2004.05150). seed: of what is made anew.
    """
    loaded = model if isinstance(model, Loaded) else hub.load(model)
    loaded.unpack()
    if (known := adaptation_of(loaded.net)) is not None and known.records:
        raise ValueError("swap: this model has adapters: headway.adapt.fold(model) puts them into its weights before")
    named = mixer_of(mixer) if isinstance(mixer, str) else dict(mixer)
    change = changed(loaded, named, layers, context)
    net, weights, touched = carried(loaded.net, change.spec, change.places, seed)
    original = loaded
    if context is not None and context != loaded.max_tokens:
        spec = extended(loaded, context)
        facts = msgspec.structs.replace(loaded.facts, max_tokens=context)
        original = _beside(loaded, carried(loaded.net, spec, [])[0], spec, facts)
    facts = msgspec.structs.replace(original.facts, globals=_globals(original, change.places))
    return Swapped(_beside(loaded, net, change.spec, facts), original, change, weights, touched)


def _beside(model: Loaded, net: Any, spec: dict[str, Any], facts: Any) -> Loaded:
    return Loaded(net, spec, model.source, model.target, facts=facts, image=model.image)


def _globals(model: Loaded, places: list[Place]) -> dict[str, Any]:
    """Which tokens see and are seen by all in a head's task, where the new mixers are windows (2004.05150, 3.1)."""
    known: dict[str, Any] = dict(model.facts.globals)
    windowed = all(place.after.get("window") is not None or place.after["name"] == "longformer" for place in places)
    if model.kind != "encoder" or not windowed or "globals" not in find(places[0].after["name"]).CAN:
        return known
    heads = model.spec.get("heads", {})
    if "classify" in heads:
        known["classify"] = "first"
    if "spans" in heads and (separator := getattr(model.source, "sep", None)) is not None:
        known["spans"] = separator
    return known
