"""Models: how stacks become an encoder-decoder, a decoder, an encoder. One file each, found by its name in a spec."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from torch import nn

from headway.layers import initialise
from headway.spec import convert, nearest


def names() -> list[str]:
    """The kinds of model there are, by file name."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def reads_pictures(kind: str) -> bool:
    """Whether models of a kind take pixels: their file says `PICTURES = True`."""
    return kind in names() and getattr(importlib.import_module(f"{__name__}.{kind}"), "PICTURES", False)


def parse(spec: dict[str, Any]) -> Any:
    """The typed spec of {"kind": ..., ...}.

    Each file in this folder defines `Spec` and `Model`; its `branches` counts residual branches, for `initialise`.
    """
    kind = spec.get("kind")
    if kind not in names():
        raise ValueError(f"model.kind: no model '{kind}'{nearest(str(kind), names())}")
    fields = {key: value for key, value in spec.items() if key != "kind"}
    return convert(fields, importlib.import_module(f"{__name__}.{kind}").Spec, "model")


def assemble(spec: dict[str, Any]) -> Any:
    """A model from its spec, its weights not yet as `initialise` wants them: for weights that come from elsewhere."""
    parsed = parse(spec)
    return importlib.import_module(f"{__name__}.{spec['kind']}").Model(parsed)


def build(spec: dict[str, Any]) -> nn.Module:
    """A freshly initialised model from its spec alone."""
    model = assemble(spec)
    initialise(model, model.branches)
    return model
