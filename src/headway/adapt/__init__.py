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
from torch import nn

from headway.adapt import _targets
from headway.adapt._base import (
    Adaptation,
    Adapter,
    Record,
    adaptation_of,
    adapted,
    known_of,
    network_of,
    plain,
    put,
    refuse_merged,
    state,
    take,
)
from headway.adapt._files import attach, save
from headway.adapt._frozen import speed_up
from headway.adapt._hash import base_hash
from headway.adapt._int8 import round_base
from headway.adapt._merge import Merged, fold, merge, unmerge
from headway.spec import convert, nearest

__all__ = ["Adapter", "Merged", "adapt", "attach", "bare", "fold", "merge", "methods", "remove", "save", "state",
           "unmerge", "use"]  # fmt: skip
M = TypeVar("M")


def methods() -> list[str]:
    """The methods there are, by file name."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def _adapt(
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
    net = plain(model)
    kind = find_method(method)
    how = _options(kind, method, options)
    known = adaptation_of(net) or Adaptation()
    _check(net, known, name, heads, quantize)
    given = kind.targets(how) if targets is None else (targets,) if isinstance(targets, str) else tuple(targets)
    patterns = _targets.meant(net, given, kind.fits) if targets is None else given
    find = lambda: _targets.find(net, patterns, kind.fits, who=method) if patterns else []
    made = _made(net, kind, find(), how)
    if not made and not heads:
        raise ValueError(f"adapt: {method} trains nothing but new heads, and none is named: heads=('classify',)")
    if quantize and known.quantize is None:
        known.base = base_hash(net)  # of the weights before they are rounded, which it shall fit, too
        round_base(net, apart=[f"heads.{head}" for head in heads])
        made = _made(net, kind, find(), how)
        known.quantize = quantize
    net.requires_grad_(False)
    net.adaptation = known
    known.source = known.source or getattr(model, "origin", "")
    for place, adapter in made:
        put(place.module, known, name, place.part, adapter, place.name)
    speed_up(net)
    for head in heads:
        net.heads[head].requires_grad_(True)
    known.records[name] = Record(method=method, targets=tuple(patterns), options=how, heads=tuple(heads))
    known.choose({name: 1.0})
    return model


def use(
    model: Any, names: str | Sequence[str] | Mapping[str, float] = (), *, rows: Sequence[str | None] | None = None
) -> None:
    """Says which adapters act from now on: one, several added up, or weighted ({name: weight}); none where empty.

    rows: one adapter (or None) for each row of the batches that follow, all of which then have so many rows.
    """
    known = known_of(model)
    given: dict[str, float]
    given = {names: 1.0} if isinstance(names, str) else dict(names) if isinstance(names, Mapping) else {}
    given = given or dict.fromkeys(names, 1.0)
    if rows is not None and given:
        raise ValueError("use: give names for all rows, or rows=, one name for each; not both")
    for name in {*given, *(row for row in rows or () if row is not None)}:
        if name not in known.records:
            raise ValueError(f"this model has no adapter '{name}'{nearest(name, known.records)}")
    refuse_merged(known, "before others can act")
    _check_rows(network_of(model), set(rows or ()))
    _check_alone(network_of(model), given)
    known.choose(given, None if rows is None else tuple(rows))


@contextmanager
def by_row(model: Any, rows: Sequence[str | None] | None, inputs: Any) -> Iterator[None]:
    """Inside the block, each of the inputs has the adapter that `rows` names for it (None: none), in whatever
    batches they come; without `rows`, those act that do."""
    if rows is None:
        yield
        return
    known = known_of(model)
    if len(rows) != len(inputs):
        raise ValueError(f"rows: {len(rows)} adapters are named for {len(inputs)} inputs: name one, or None, for each")
    was = known.weights
    use(model, rows=rows)
    known.inputs = known.rows
    try:
        yield
    finally:
        known.inputs = None
        known.choose(was)


@contextmanager
def bare(model: Any) -> Iterator[None]:
    """No adapter acts inside the block: the model is what it was before, to the bit; new heads stay as they are."""
    known = known_of(model)
    refuse_merged(known, "to have the bare model")
    known.off += 1
    try:
        yield
    finally:
        known.off -= 1


def remove(model: Any, name: str) -> None:
    """Takes an adapter away for good."""
    known = known_of(model)
    if name not in known.records:
        raise ValueError(f"this model has no adapter '{name}'{nearest(name, known.records)}")
    refuse_merged(known, "before removing one")
    for _, module in adapted(network_of(model)):
        take(module, name)
    del known.records[name]
    if not known.records and known.quantize is None:
        del network_of(model).adaptation
    rows = None if known.rows is None else tuple(None if row == name else row for row in known.rows)
    known.choose({one: amount for one, amount in known.weights.items() if one != name}, rows)


def find_method(method: str) -> type[Adapter]:
    """The class of a method."""
    if method not in methods():
        raise ValueError(f"adapt: no method '{method}'{nearest(method, methods())}")
    return importlib.import_module(f"{__name__}.{method}").Method


def _made(net: nn.Module, kind: type[Adapter], found: list[_targets.Place], how: dict[str, Any]) -> list[Any]:
    """The adapters of a method, each with its place."""
    made = [(place, kind(place.module, place.outputs, **how)) for place in found]  # type: ignore[call-arg]
    return [*made, *kind.beside(net, found, how)]


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
    if hasattr(nn.ModuleDict(), name):
        raise ValueError(f"adapt: PyTorch has a use of its own for the name '{name}': give the adapter another name=")
    if name in known.records:
        raise ValueError(f"this model has an adapter '{name}' already: give the new one another name=, or remove that")
    if quantize not in (None, "int8"):
        raise ValueError(f"adapt: quantize is int8 or nothing, not {quantize!r}")
    if quantize and known.records and known.quantize is None:
        raise ValueError("adapt: quantize= rounds a base that no adapter stands on yet; remove the others first")
    refuse_merged(known, "before adding one")
    there = list(getattr(net, "heads", {}))
    for head in heads:
        if head not in there:
            raise ValueError(f"adapt: this model has no head '{head}'{nearest(head, there) if there else ''}")
        if any(head in record.heads for record in known.records.values()):
            raise ValueError(f"adapt: the head '{head}' trains with another adapter already, whose it would no longer "
                             "be: give each a head of its own, or remove that adapter")  # fmt: skip


def _check_rows(net: nn.Module, names: set[str | None]) -> None:
    """Some methods act on all rows of a batch alike."""
    for _, module in adapted(net):
        for name in names & set(module.adapters):
            for adapter in module.adapters[str(name)].values():  # type: ignore[operator]
                if not adapter.BY_ROW:
                    method = type(adapter).__module__.rpartition(".")[2]
                    raise ValueError(f"use: {method} adapters act on whole batches, so rows= cannot choose '{name}'; "
                                     "answer its rows in a batch of their own")  # fmt: skip


def _check_alone(net: nn.Module, weights: Mapping[str, float]) -> None:
    """Some methods act whole, and no two of them at one place."""
    for _, module in adapted(net):
        names = [name for name in weights if name in module.adapters]
        alone = {name for name in names for adapter in module.adapters[name].values() if adapter.ALONE}  # type: ignore[operator]
        for name in alone:
            if weights[name] != 1 or len(names) > 1:
                method = type(next(iter(module.adapters[name].values()))).__module__.rpartition(".")[2]  # type: ignore[operator]
                raise ValueError(f"use: {method} adapters act alone and whole, and '{name}' would act with weight "
                                 f"{weights[name]:g} beside {len(names) - 1} others: choose one")  # fmt: skip


class Adapt:
    """`headway.adapt` itself: called, it gives a model an adapter; what else is done with adapters stands
    beside, as `headway.adapt.use`."""

    __call__ = staticmethod(_adapt)
    attach, save = staticmethod(attach), staticmethod(save)
    bare, use, remove = staticmethod(bare), staticmethod(use), staticmethod(remove)
    merge, unmerge, fold = staticmethod(merge), staticmethod(unmerge), staticmethod(fold)
    methods, state, adaptation_of = staticmethod(methods), staticmethod(state), staticmethod(adaptation_of)


adapt = Adapt()
