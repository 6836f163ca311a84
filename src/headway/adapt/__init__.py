"""Adapt: a trained model learns something new while most of it stays frozen. There is never a second model.

`headway.adapt(model, "lora", rank=8, targets="blocks.*.mixer.{q,v}")` wraps modules in place. A method is one file
here, found by its name. `use` says which adapters act, `bare` lets none: the frozen base is its own reference model.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec
from torch import Tensor, nn

from headway.adapt import _targets
from headway.adapt._base import (
    INSIDE,
    Adaptation,
    Adapter,
    Record,
    adaptation_of,
    adapted,
    put,
    take,
)
from headway.adapt._int8 import round_base
from headway.quantize import is_prepared, restore
from headway.spec import convert, nearest

__all__ = ["Adapter", "adapt", "bare", "methods", "remove", "state", "use"]
M = TypeVar("M")


def methods() -> list[str]:
    """The methods there are, by file name."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def adapt(
    model: M,
    method: str,
    *,
    targets: str | Sequence[str] | None = None,
    name: str = "default",
    heads: Sequence[str] = (),
    quantize: str | None = None,
    **options: Any,
) -> M:
    """Gives a loaded model, or its network, a new adapter, in place, and returns it: the adapter alone acts and trains.

    targets: patterns of module names, as in file names, {a,b} for either; default: the method's own. heads: that train
    with it. quantize: "int8" rounds the frozen weights to 8 bits. options: the method's own. Raises a ValueError
    before anything is changed.
    """
    net = network_of(model)
    kind = find_method(method)
    how = _options(kind, method, options)
    known = adaptation_of(net) or Adaptation()
    _check(net, known, name, heads, quantize)
    patterns = kind.TARGETS if targets is None else (targets,) if isinstance(targets, str) else tuple(targets)
    find = lambda: _targets.find(net, patterns, kind.fits, who=method, strict=targets is not None)
    made = [(place, kind(place.module, place.outputs, **how)) for place in find()]  # type: ignore[call-arg]
    if quantize and known.quantize is None:
        round_base(net)
        made = [(place, kind(place.module, place.outputs, **how)) for place in find()]  # type: ignore[call-arg]
        known.quantize = quantize
    net.requires_grad_(False)
    for place, adapter in made:
        put(place.module, known, name, place.part, adapter)
    for head in heads:
        net.heads[head].requires_grad_(True)
    known.records[name] = Record(method=method, targets=tuple(patterns), options=how, heads=tuple(heads))
    known.weights, known.rows = {name: 1.0}, None
    return model


def use(
    model: Any, names: str | Sequence[str] | Mapping[str, float] = (), *, rows: Sequence[str | None] | None = None
) -> None:
    """Says which adapters act from now on: one, several added up, or weighted ({name: weight}); none where empty.

    rows: one adapter (or None) for each row of the batches that follow, all of which then have so many rows.
    """
    known = _known(model)
    given = {names: 1.0} if isinstance(names, str) else dict(names) if isinstance(names, Mapping) else {}
    given = given or dict.fromkeys(names, 1.0)
    if rows is not None and given:
        raise ValueError("use: give names for all rows, or rows=, one name for each; not both")
    for name in {*given, *(row for row in rows or () if row is not None)}:
        if name not in known.records:
            raise ValueError(f"this model has no adapter '{name}'{nearest(name, known.records)}")
    if known.merged:
        raise ValueError("adapters are merged into the weights: headway.adapt.unmerge(model) before others can act")
    _check_rows(network_of(model), set(rows or ()))
    known.weights, known.rows = given, None if rows is None else tuple(rows)


@contextmanager
def bare(model: Any) -> Iterator[None]:
    """No adapter acts inside the block: the model is what it was before, to the bit; new heads stay as they are."""
    known = _known(model)
    if known.merged:
        raise ValueError("adapters are merged into the weights: headway.adapt.unmerge(model) to have the bare model")
    known.off += 1
    try:
        yield
    finally:
        known.off -= 1


def remove(model: Any, name: str) -> None:
    """Takes an adapter away for good."""
    known = _known(model)
    if name not in known.records:
        raise ValueError(f"this model has no adapter '{name}'{nearest(name, known.records)}")
    for _, module in adapted(network_of(model)):
        take(module, name)
    del known.records[name]
    known.weights.pop(name, None)
    known.rows = None


def state(model: Any, name: str | None = None) -> dict[str, Tensor]:
    """What is an adapter's, by name in the network's `state_dict`: its parameters, and the heads that train with it.

    Default: of all adapters.
    """
    net, known = network_of(model), _known(model)
    names = [name] if name is not None else list(known.records)
    heads = {f"heads.{head}." for one in names for head in known.records[one].heads}
    return {
        key: tensor
        for key, tensor in net.state_dict().items()
        if any(f"{INSIDE}{one}." in key for one in names) or any(key.startswith(head) for head in heads)
    }


def network_of(model: Any) -> Any:
    """The network of a loaded model, or the network itself, with its weights as PyTorch holds them."""
    net = model if isinstance(model, nn.Module) else model.net
    if is_prepared(net):
        restore(net)
    return net


def find_method(method: str) -> type[Adapter]:
    """The class of a method."""
    if method not in methods():
        raise ValueError(f"adapt: no method '{method}'{nearest(method, methods())}")
    return importlib.import_module(f"{__name__}.{method}").Method


def _options(kind: type[Adapter], method: str, given: dict[str, Any]) -> dict[str, Any]:
    """The options of a method, typed and complete."""
    parameters = list(inspect.signature(kind, eval_str=True).parameters.values())[2:]
    known = msgspec.defstruct(
        method, [(p.name, p.annotation, p.default) for p in parameters], forbid_unknown_fields=True, kw_only=True
    )
    return msgspec.structs.asdict(convert(given, known, f"adapt: {method}"))


def _check(net: Any, known: Adaptation, name: str, heads: Sequence[str], quantize: str | None) -> None:
    if not re.fullmatch(r"[\w-]{1,100}", name):
        raise ValueError(f"adapt: an adapter is named with letters, digits, '_' and '-', not {name!r}")
    if name in known.records:
        raise ValueError(f"this model has an adapter '{name}' already: give the new one another name=, or remove that")
    if quantize not in (None, "int8"):
        raise ValueError(f"adapt: quantize is int8 or nothing, not {quantize!r}")
    if quantize and known.records and known.quantize is None:
        raise ValueError("adapt: quantize= rounds a base that no adapter stands on yet; remove the others first")
    if known.merged:
        raise ValueError("adapters are merged into the weights: headway.adapt.unmerge(model) before adding one")
    there = list(getattr(net, "heads", {}))
    for head in heads:
        if head not in there:
            raise ValueError(f"adapt: this model has no head '{head}'{nearest(head, there) if there else ''}")


def _check_rows(net: nn.Module, names: set[str | None]) -> None:
    """Some methods act on all rows of a batch alike."""
    for _, module in adapted(net):
        for name in names & set(module.adapters):
            for adapter in module.adapters[str(name)].values():  # type: ignore[operator]
                if not adapter.BY_ROW:
                    method = type(adapter).__module__.rpartition(".")[2]
                    raise ValueError(f"use: {method} adapters act on whole batches, so rows= cannot choose '{name}'; "
                                     "answer its rows in a batch of their own")  # fmt: skip


def _known(model: Any) -> Adaptation:
    known = adaptation_of(network_of(model))
    if known is None:
        raise ValueError("this model has no adapter: headway.adapt(model, method, ...) gives it one")
    return known
