"""Transfer: published tensors into a network and back, by rules that hold in both directions.

A rule is (ours, theirs, transpose, shape): cat(theirs, each transposed if so) = cat(ours), along the first dimension.
Where one side has several names, the other has one, which is divided evenly; `ours` is empty for tensors that a file
may hold and no network needs. `shape`: of one published tensor whose numbers, in order, are one of ours in its shape.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from headway.header import shown
from headway.layers import initialise
from headway.rounding import Rounded
from headway.store import shapes_of
from headway.weights import Streamed, rowed


class Rule(NamedTuple):
    """What `ours` are called in a published file. Any object with the first three attributes, or a tuple, is one."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    transpose: bool = False
    shape: tuple[int, ...] | None = None


class blank(TorchFunctionMode):
    """`with blank(): net = build()` puts parameters on the meta device, where they cost nothing.

    Unlike under `torch.device("meta")`, tables that a constructor computes (the angles of rotary positions) are real.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        if getattr(func, "__module__", "") == "torch.nn.init":  # drawing nothing would import PyTorch's compiler: 3 s
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


class _Part(NamedTuple):
    """Rows `begin` to `end` of a published tensor (columns, if it is transposed) go to one of ours from row `to` on.

    Where it is `flat`, all its numbers do, in their order, and rows mean nothing."""

    ours: str
    begin: int
    end: int
    to: int
    transpose: bool
    flat: bool = False


def fill(
    net: nn.Module,
    weights: Mapping[str, Tensor],
    rules: Iterable[Any],
    *,
    dtype: torch.dtype,
    allow_fresh: Collection[str] = frozenset(),
    where: str | Path,
    device: str | torch.device = "cpu",
    rounded: Mapping[str, Rounded] | None = None,
) -> list[str]:
    """Gives every parameter and buffer of `net` its published values, in `dtype`; returns the names that got none.

    Tables that no file holds (the angles of rotary positions) keep their dtype, and come along to `device`.

    Strict: what is missing, unexpected or misshapen is a ValueError before anything is read, and `net` is as it was.
    Only names that match a pattern of `allow_fresh` may be missing; they are initialised. Tensors that `net` ties are
    read once, and must be equal where `weights` hold several of them. `where` is named in errors. `rounded`: by name,
    what takes the place of a parameter and rounds its values as they are read.
    """
    own = net.state_dict(keep_vars=True)
    shapes = shapes_of(weights)
    rules = [_rule(rule) for rule in rules]
    chosen = [rule for rule in rules if any(name in shapes for name in rule.theirs)]
    fresh = _lacking(own, chosen, allow_fresh)
    _check(net, own, shapes, rules, chosen, fresh, where)
    _check_kinds(own, getattr(weights, "dtypes", {}), chosen, where)
    reads, repeats = _plan(own, shapes, chosen)
    instead = _instead(own, rounded or {}, reads, repeats, fresh)
    targets = _materialise(net, own, fresh, dtype, device, instead)
    if fresh:
        _initialise(net, fresh, where)
    with torch.no_grad():
        for part, at, theirs in _pairs(weights, reads):
            if isinstance(ours := targets[part.ours], Rounded):
                ours.receive(*at, theirs)
            else:
                _place(ours, part, at).copy_(theirs)
        for part, at, theirs in _pairs(weights, repeats):
            if isinstance(ours := targets[part.ours], Rounded):
                same = ours.equals(at[0], theirs)
            else:
                ours = _place(ours, part, at)
                same = torch.equal(ours, theirs.to(ours))
            if not same:
                raise ValueError(f"{where}: {part.ours} is tied to another tensor here, and the two differ in the file")
    return fresh


def published(net: nn.Module, rules: Iterable[Any]) -> Mapping[str, Tensor]:
    """The network's tensors under their published names, each made when it is asked for; a tied one appears once."""
    own = net.state_dict(keep_vars=True)
    found: dict[str, tuple[Rule, int]] = {}
    told: set[int] = set()
    named: set[str] = set()
    for rule in map(_rule, rules):
        lost = [name for name in rule.ours if name not in own]
        if lost:
            raise ValueError(f"a rule for {rule.theirs[0]} names {lost[0]}, and the network has no such tensor")
        named.update(rule.ours)
        if all(id(own[name]) in told for name in rule.ours):
            continue
        told.update(id(own[name]) for name in rule.ours)
        rows = sum(len(own[name]) for name in rule.ours if own[name].ndim)
        if rows % len(rule.theirs):
            raise ValueError(f"{rule.ours[0]}: {rows} rows are not divided evenly among {len(rule.theirs)} tensors")
        found.update((name, (rule, i)) for i, name in enumerate(rule.theirs))
    unsaid = [name for name, tensor in own.items() if name not in named and id(tensor) not in told]
    if unsaid:
        raise ValueError(f"{len(unsaid)} tensors have no published name; first: {unsaid[0]}")
    return _Published(own, found)


class _Published(Mapping[str, Tensor]):
    def __init__(self, own: dict[str, Tensor], found: dict[str, tuple[Rule, int]]) -> None:
        self._own, self._found = own, found

    def __getitem__(self, name: str) -> Tensor:
        rule, part = self._found[name]
        ours = [self._own[name].detach() for name in rule.ours]
        whole = ours[0] if len(ours) == 1 else torch.cat(ours)
        if rule.shape is not None:
            return whole.reshape(rule.shape)
        whole = whole if len(rule.theirs) == 1 else whole.chunk(len(rule.theirs))[part]
        return _column(whole).T if rule.transpose else whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def _rule(given: Any) -> Rule:
    rule = Rule(*given) if isinstance(given, tuple) else Rule(given.ours, given.theirs, given.transpose,
                                                              getattr(given, "shape", None))  # fmt: skip
    if not rule.theirs or min(len(rule.ours), len(rule.theirs)) > 1:
        raise ValueError(f"a rule has one name on at least one side, not {rule.ours} for {rule.theirs}")
    if rule.shape is not None and (rule.transpose or max(len(rule.ours), len(rule.theirs)) > 1):
        raise ValueError(f"a rule with a shape is of one tensor, not transposed: {rule.ours} for {rule.theirs}")
    return rule


def _lacking(own: dict[str, Tensor], chosen: list[Rule], allow_fresh: Collection[str]) -> list[str]:
    """What no rule gives a value, of the names that may go without."""
    given = {id(own[name]) for rule in chosen for name in rule.ours if name in own}
    without = [name for name, tensor in own.items() if id(tensor) not in given]
    return [name for name in without if any(fnmatchcase(name, pattern) for pattern in allow_fresh)]


def _check(
    net: nn.Module,
    own: dict[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    rules: list[Rule],
    chosen: list[Rule],
    fresh: list[str],
    where: str | Path,
) -> None:
    """Refuses names and shapes that are not the network's."""
    unmade = [name for name, buffer in net.named_buffers() if buffer.is_meta and name not in own]
    if unmade:
        raise ValueError(
            f"{where}: {unmade[0]} is in no file and was not computed: build the network in `with blank()`"
        )
    given = {id(own[name]) for rule in chosen for name in rule.ours if name in own} | {id(own[name]) for name in fresh}
    theirs = {name: rule.theirs[0] for rule in reversed(rules) for name in rule.ours}
    missing = [theirs.get(name, name) for name, tensor in own.items() if id(tensor) not in given]
    missing += [name for rule in chosen for name in rule.theirs if rule.ours and name not in shapes]
    known = {name for rule in chosen for name in rule.theirs}
    extra = [name for name in shapes if name not in known]
    wrong = [fault for rule in chosen for fault in _misfit(rule, own, shapes)]
    if missing or extra or wrong:
        first = (missing + [shown(name) for name in extra] + wrong)[0]
        raise ValueError(
            f"{where}: its tensors are not this model's ({len(missing)} missing, {len(extra)} unexpected, "
            f"{len(wrong)} of another shape; first: {first}): config and weights must come together"
        )


def _check_kinds(
    own: dict[str, Tensor], stored: Mapping[str, torch.dtype], chosen: list[Rule], where: str | Path
) -> None:
    for rule in chosen:
        for theirs in rule.theirs:
            for ours in rule.ours:
                if theirs in stored and stored[theirs].is_floating_point != own[ours].is_floating_point():
                    raise ValueError(
                        f"{where}: {theirs} is stored as {stored[theirs]}, and {ours} is {own[ours].dtype}"
                    )


def _misfit(rule: Rule, own: dict[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is wrong with the shapes of a rule: nothing, or one line. Missing names are told elsewhere."""
    foreign = [f"{rule.theirs[0]} is for {name}, which the network lacks" for name in rule.ours if name not in own]
    if foreign or not rule.ours or not all(name in shapes for name in rule.theirs):
        return foreign
    ours, theirs = [tuple(own[name].shape) for name in rule.ours], [shapes[name] for name in rule.theirs]
    if rule.transpose:
        theirs = [shape[::-1] if len(shape) == 2 else () for shape in theirs]
        ours = [(*shape, 1) if len(shape) == 1 else shape for shape in ours]
    if rule.shape is not None:
        fits = theirs[0] == rule.shape and prod(theirs[0]) == prod(ours[0])
    elif len(ours) == len(theirs) == 1:
        fits = ours == theirs
    else:  # no single numbers; the same rows in all, and those of `theirs` divided evenly so that they can be written
        fits = all(ours) and all(theirs) and sum(s[0] for s in ours) == sum(s[0] for s in theirs)
        fits = fits and len({s[1:] for s in ours + theirs}) == len(set(theirs)) == 1
    return [] if fits else [f"{rule.theirs[0]} is {shapes[rule.theirs[0]]} for {rule.ours[0]} {ours[0]}"]


def _instead(
    own: dict[str, Tensor],
    rounded: Mapping[str, Rounded],
    reads: dict[str, list[_Part]],
    repeats: dict[str, list[_Part]],
    fresh: list[str],
) -> dict[int, Rounded]:
    """What takes the place of which parameter: of one that is read, and read again to be compared, in rows, or is read
    once. None where some are initialised, which would touch the others."""
    told = {id(own[part.ours]) for parts in repeats.values() for part in parts if part.flat or part.transpose}
    told |= {id(own[part.ours]) for parts in reads.values() for part in parts if part.flat}
    return {} if fresh else {id(own[name]): one for name, one in rounded.items() if id(own[name]) not in told}


def _materialise(
    net: nn.Module,
    own: dict[str, Tensor],
    fresh: list[str],
    dtype: torch.dtype,
    device: str | torch.device,
    instead: dict[int, Rounded],
) -> dict[str, Tensor]:
    """New tensors in the place of the old, those that were one still one; by every name. Pages are taken when written.

    What is fresh and has values keeps them; what has none is not-a-number until it is initialised.
    """
    made: dict[int, Tensor] = {**instead}
    for name, old in own.items():
        kind = dtype if old.is_floating_point() else old.dtype
        if id(old) not in made:
            if name in fresh and not old.is_meta:
                new = old.detach().to(device, kind, copy=True)
            else:
                new = torch.empty(old.shape, dtype=kind, device=device)
                if name in fresh and old.is_floating_point():
                    new.fill_(torch.nan)
            made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        path, _, leaf = name.rpartition(".")
        setattr(net.get_submodule(path), leaf, made[id(old)])  # recurrent modules watch this, to keep their lists
    for name, table in list(net.named_buffers()):
        if name not in own:
            path, _, leaf = name.rpartition(".")
            setattr(net.get_submodule(path), leaf, table.to(device))
    return {name: instead.get(id(old), made[id(old)].detach()) for name, old in own.items()}


def _initialise(net: nn.Module, fresh: list[str], where: str | Path) -> None:
    """Runs before anything is read, so that what it does to other tensors does not last."""
    own = net.state_dict(keep_vars=True)
    initialise(net, getattr(net, "branches", 1))
    for name in fresh:
        module = net.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.reset_parameters()
        if own[name].is_floating_point() and bool(own[name].isnan().any()):
            raise ValueError(f"{where}: {name} is missing, and there is no rule to initialise it by")


def _plan(
    own: dict[str, Tensor], shapes: Mapping[str, tuple[int, ...]], chosen: list[Rule]
) -> tuple[dict[str, list[_Part]], dict[str, list[_Part]]]:
    """Which part of each published tensor goes where: what is read first, and what is then only compared."""
    reads: dict[str, list[_Part]] = {}
    repeats: dict[str, list[_Part]] = {}
    told: set[int] = set()
    for rule in chosen:
        length = [(shapes[name][-1:] if rule.transpose else shapes[name][:1] or (1,))[0] for name in rule.theirs]
        their_ends = list(accumulate(length))
        our_ends = list(accumulate(own[name].shape[0] if own[name].ndim else 1 for name in rule.ours))
        for ours, our_begin, our_end in zip(rule.ours, [0, *our_ends], our_ends, strict=False):
            into = repeats if id(own[ours]) in told else reads
            if rule.shape is not None:
                into.setdefault(rule.theirs[0], []).append(_Part(ours, 0, our_end, 0, False, flat=True))
                continue
            for theirs, begin, end in zip(rule.theirs, [0, *their_ends], their_ends, strict=False):
                low, high = max(begin, our_begin), min(end, our_end)
                if low < high:
                    part = _Part(ours, low - begin, high - begin, low - our_begin, rule.transpose)
                    into.setdefault(theirs, []).append(part)
        told.update(id(own[name]) for name in rule.ours)
    return reads, repeats


def _pairs(
    weights: Mapping[str, Tensor], plan: dict[str, list[_Part]]
) -> Iterator[tuple[_Part, tuple[slice, slice], Tensor]]:
    """(part, rows and columns among ours, what belongs there), a run of rows at a time."""
    for name, start, rows in _stream(weights, plan):
        for part in plan[name]:
            if part.flat:
                size = rows[0].numel()
                yield part, (slice(start * size, (start + len(rows)) * size), slice(None)), rows.reshape(-1)
            elif part.transpose:
                at = slice(part.to, part.to + part.end - part.begin), slice(start, start + len(rows))
                yield part, at, rows[:, part.begin : part.end].T
            else:
                low, high = max(part.begin, start), min(part.end, start + len(rows))
                if low < high:
                    shift = part.to - part.begin
                    yield part, (slice(low + shift, high + shift), slice(None)), rows[low - start : high - start]


def _place(ours: Tensor, part: _Part, at: tuple[slice, slice]) -> Tensor:
    """The place among ours that `_pairs` names."""
    ours = rowed(ours)
    if part.flat:
        return ours.view(-1)[at[0]]
    return _column(ours)[at] if part.transpose else ours[at[0]]


def _column(tensor: Tensor) -> Tensor:
    """A vector as a matrix of one column, so that its transpose is one row."""
    return tensor[:, None] if tensor.ndim == 1 else tensor


def _stream(weights: Mapping[str, Tensor], names: Iterable[str]) -> Iterator[tuple[str, int, Tensor]]:
    """Runs of rows where the source has them, else whole tensors."""
    if isinstance(weights, Streamed):
        yield from weights.stream(names)
    else:
        yield from ((name, 0, rowed(weights[name])) for name in names)
