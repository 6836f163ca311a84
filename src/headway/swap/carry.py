"""Carry: weights from one network into another that has other mixers in some layers.

Queries, keys, values and the way out are taken over by what a mixer calls them; learned positions are repeated beyond
their end, and global tokens begin with the ordinary projections (Longformer, 2004.05150, sections 5 and 3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headway import models
from headway.mixers import Mixer
from headway.mixers.attention import Attention
from headway.mixers.linear import Linear
from headway.spec import Strict
from headway.swap.change import Place
from headway.transfer import Rule, fill

# Which of the attention's maps a mixer's own are, by their name; `enter` is that of linear attention alone
ROLES = {"query": "q", "key": "k", "value": "v", "key_value": "kv", "query_key": "qk", "enter": "qkv", "out": "o",
         "global_query": "q", "global_key": "k", "global_value": "v"}  # fmt: skip
MAPS = ("query", "key_value", "out", "query_norm", "key_norm")  # all that attention has
ASKS = ("query", "query_key")  # a mixer without queries has a way out of something else


class Weights(Strict, frozen=True):
    """What became of the parameters of the swapped layers, by name within a layer (positions: of the whole): as they
    were, made of others, initialised, or without a place in the new mixer."""

    kept: tuple[str, ...]
    copied: tuple[str, ...]
    new: tuple[str, ...]
    left: tuple[str, ...]


def carried(
    original: Any, spec: dict[str, Any], places: list[Place], seed: int = 0
) -> tuple[nn.Module, Weights, list[str]]:
    """The network of `spec` with the weights of `original`; what became of those in the swapped layers, and the names
    of all parameters there and of positions that were extended."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net: Any = models.build(spec)
        tensors = dict(original.state_dict())
        told: dict[str, set[str]] = {"kept": set(), "copied": set(), "new": set(), "left": set()}
        touched = _positions(original, net, tensors, told)
        new: list[str] = []
        for place in places:
            path = f"{place.stack}.blocks.{place.layer}.mixer.inner"
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{path}.")}
            fresh = net.get_submodule(path)
            _refuse_alien(name for name in original.get_submodule(path).state_dict() if name.split(".")[0] not in MAPS)
            found = maps_into(fresh, original.get_submodule(path), told)
            tensors |= {f"{path}.{name}": tensor for name, tensor in found.items()}
            own = list(fresh.state_dict())
            touched += [f"{path}.{name}" for name in own]
            new += [f"{path}.{name}" for name in own if name not in found]
            told["new"] |= {name for name in own if name not in found}
        _refuse_alien(name for name in tensors if name not in net.state_dict())
        rules = [Rule((name,), (name,)) for name in tensors]
        like = next(p for p in original.parameters() if p.is_floating_point())
        fill(net, tensors, rules, dtype=like.dtype, allow_fresh=new, where="swap", device=like.device)
    return net.eval(), Weights(**{key: tuple(sorted(names)) for key, names in told.items()}), touched


def maps_into(mixer: Mixer, old: Attention, told: Mapping[str, set[str]]) -> dict[str, Tensor]:
    """What of `old` goes into `mixer`, by the names there; `told` hears of every name."""
    if not any(hasattr(mixer, name) for name in ASKS) and not isinstance(mixer, Linear):
        told["left"].update(old.state_dict())
        return {}
    parts = _parts(old, mixer)
    repeated = old.kv_heads < old.heads and not hasattr(mixer, "kv_heads")
    found: dict[str, Tensor] = {}
    for name, roles in ROLES.items():
        if not isinstance(linear := getattr(mixer, name, None), nn.Linear):
            continue
        weights, biases = zip(*(parts[role] for role in roles), strict=True)
        whole = torch.cat(weights)
        if name == "enter" and len(linear.weight) > len(whole):  # the gate behind them is new
            whole = torch.cat([whole, linear.weight.detach()[len(whole) :].to(whole)])
            told["new"].add("enter.weight (its gate)")
        found[f"{name}.weight"] = whole
        if linear.bias is not None:
            zeros = [torch.zeros_like(weight[:, 0]) for weight in weights]
            pairs = zip(biases, zeros, strict=True)
            found[f"{name}.bias"] = torch.cat([none if bias is None else bias for bias, none in pairs])
        elif any(bias is not None for bias in biases):
            told["left"].add(f"bias of {name}")
        copied = name.startswith("global_") or (repeated and set(roles) & {"k", "v"})
        told["copied" if copied else "kept"].update(key for key in found if key.startswith(f"{name}."))
    for name, tensor in old.state_dict().items():
        if "norm" in name and name in mixer.state_dict():
            found[name] = tensor
            told["kept"].add(name)
    return found


def _refuse_alien(names: Iterable[str]) -> None:
    if (first := next(iter(names), None)) is not None:
        raise ValueError(f"swap: {first} is no tensor of this model's spec: swap the model before it is changed")


def _parts(old: Attention, mixer: Mixer) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Weights and biases of queries, keys, values and the way out, as `mixer` needs them."""
    shared = old.kv_heads * old.head_dim
    spread: Callable[[Tensor], Tensor] = lambda t: t
    if not hasattr(mixer, "kv_heads"):  # each key/value head once for every query head that shares it
        spread = lambda t: t.unflatten(0, (old.kv_heads, -1)).repeat_interleave(
            old.heads // old.kv_heads, 0).flatten(0, 1)  # fmt: skip
    # a mixer without a scale of its own divides its scores by sqrt(head_dim)
    scale = 1.0 if hasattr(mixer, "scale") or old.scale is None else old.scale * old.head_dim**0.5

    def of(linear: nn.Linear, rows: slice, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | None]:
        bias = None if linear.bias is None else change(linear.bias.detach()[rows])
        return change(linear.weight.detach()[rows]), bias

    return {
        "q": of(old.query, slice(None), lambda t: t * scale if scale != 1 else t),
        "k": of(old.key_value, slice(0, shared), spread),
        "v": of(old.key_value, slice(shared, None), spread),
        "o": of(old.out, slice(None), lambda t: t),
    }


def _positions(original: nn.Module, net: nn.Module, tensors: dict[str, Tensor], told: dict[str, set[str]]) -> list[str]:
    """Repeats learned positions as far as `net` has them; the names of those it did."""
    own, touched = net.state_dict(), []
    for name, table in original.state_dict().items():
        if not name.endswith("positions.table.weight") or len(own[name]) == len(table):
            continue
        offset = getattr(original.get_submodule(name.removesuffix(".table.weight")), "offset", 0)
        body = table[offset:]
        rows = torch.arange(len(own[name]) - offset, device=table.device) % len(body)
        tensors[name] = torch.cat([table[:offset], body[rows]])
        told["copied"].add(f"{name} ({len(body)} positions, repeated to {len(rows)})")
        touched.append(name)
    return touched
