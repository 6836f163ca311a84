"""Merge: the adapters in use become part of the weights, W' = W + s B A, and leave again without a trace.

The weights that stood there before are kept as they are, so that `unmerge` puts back the very same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headway.adapt import _int8
from headway.adapt._base import Adaptation, Adapted, Adapter, adapted, known_of, plain, take
from headway.adapt._hash import base_hash
from headway.joint import linear_of
from headway.rounding import round_weight

TABLES = (nn.Embedding, _int8.RoundedEmbedding)


class Merged(NamedTuple):
    """How many modules hold their adapters, and |W' as it is stored - W'| / |W'| over all of them: what rounding to
    their dtype, or to 8 bits, has cost."""

    modules: int
    error: float


@torch.no_grad()
def merge(model: Any) -> Merged:
    """Puts the adapters in use into the weights, with the amounts that `use` gave them: nothing is left to compute.

    Weights in 8 bits are rounded anew, and the error tells what that costs. `unmerge` undoes it, to the bit.
    """
    net, known = plain(model), known_of(model)
    if known.merged:
        raise ValueError("adapters are merged already: headway.adapt.unmerge(model) first")
    acting = _mergeable(net, known)
    known.base = known.base or base_hash(net)
    apart = whole = 0.0
    known.merged = True
    try:
        for module, found in acting:
            exact, stored = _put_in(module, found)
            apart += float((stored - exact).square().sum())
            whole += float(exact.square().sum())
    except BaseException:  # out of memory, or stopped: all of them or none
        unmerge(model)
        raise
    return Merged(len(acting), (apart / whole) ** 0.5 if whole else 0.0)


def _mergeable(net: nn.Module, known: Adaptation) -> list[tuple[Any, list[tuple[Adapter, float]]]]:
    """The modules with adapters in use, once all of these can be merged."""
    if known.rows is not None:
        raise ValueError(
            "merge: each row has an adapter of its own, and weights are one for all; use(model, name) first"
        )
    acting = [(module, found) for _, module in adapted(net) if (found := _acting(module))]
    for _, found in acting:
        for adapter, amount in found:
            if type(adapter).merge is Adapter.merge:
                adapter.merge(torch.empty(0), None, amount)  # which says why it cannot be done
    return acting


def unmerge(model: Any) -> None:
    """Takes the adapters out of the weights again, which are then what they were, to the bit."""
    net, known = plain(model), known_of(model)
    if not known.merged:
        raise ValueError("unmerge: no adapters are merged into this model's weights")
    for _, module in adapted(net):
        for name, tensor in vars(module).pop("kept", {}).items():
            setattr(module, name, tensor)
    known.merged = False


@torch.no_grad()
def fold(model: Any) -> Any:
    """Merges for good and forgets all adapters: an ordinary model again, to save, export or quantize.

    An 8-bit base becomes one of floating-point weights, so that merging rounds nothing.
    """
    net, known = plain(model), known_of(model)
    _mergeable(net, known)
    if known.merged:
        unmerge(model)
    tables = {id(_stored(m)): name for name, m in net.named_modules() if isinstance(m, TABLES)}
    for name, module in adapted(net):
        if _acting(module) and (shared := tables.get(id(_stored(module)))):
            raise ValueError(f"fold: {name} shares its weight with {shared}, and would not any more; merge it instead")
    _unround(net)
    merge(model)
    for _, module in adapted(net):
        vars(module).pop("kept", None)
        for name in list(module.adapters):
            take(module, name)
    del net.adaptation
    net.requires_grad_(True)
    return model


def _stored(module: Any) -> Any:
    """What a module's weight is kept in."""
    return module.rounded if hasattr(module, "rounded") else getattr(module, "weight", None)


def _acting(module: Adapted) -> list[tuple[Adapter, float]]:
    """The adapters of a module that are in use, in the order in which they act."""
    weights, held = module.adaptation.weights, module.adapters
    return [(one, amount) for name, amount in weights.items() if name in held for one in held[name].values()]  # type: ignore[operator]


def _put_in(module: Any, acting: list[tuple[Adapter, float]]) -> tuple[Tensor, Tensor]:
    """A module's weight with its adapters, exactly and as it is now stored, both in fp32; what was is kept."""
    exact, bias = _int8.weight_of(module).float(), module.bias
    for adapter, amount in acting:
        exact, bias = adapter.merge(exact, bias, amount)
    fixed = lambda t: nn.Parameter(t, requires_grad=False)
    module.kept = {"bias": module.bias}
    if bias is not module.bias:
        module.bias = fixed(bias)
    if isinstance(module, _int8.RoundedLinear):
        module.kept |= {"rounded": module.rounded, "scales": module.scales}
        device, mix = module.rounded.device, len(module.mixing)
        module.rounded, module.scales = (t.to(device) for t in round_weight(exact.cpu(), mix))
    else:
        module.kept["weight"] = module.weight
        module.weight = fixed(exact.to(module.weight.dtype))
    return exact, _int8.weight_of(module).float()


def _unround(net: nn.Module) -> None:
    """Linears and embeddings of floating-point weights in the place of those in 8 bits; shared ones once."""
    made: dict[int, nn.Parameter] = {}
    for module in list(net.modules()):
        for name, child in list(module._modules.items()):
            if not isinstance(child, _int8.RoundedLinear | _int8.RoundedEmbedding):
                continue
            weight = made.setdefault(id(child.rounded), nn.Parameter(_int8.weight_of(child)))
            if isinstance(child, _int8.RoundedLinear):
                plain: nn.Module = linear_of(weight, child.bias)
            else:
                plain = nn.Embedding(weight.shape[0], weight.shape[1], _weight=weight)
            _int8.move_adapters(child, plain)
            module._modules[name] = plain.train(child.training)
