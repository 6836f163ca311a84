"""The network that a recipe trains: built anew from its spec, or loaded with what the objective asks for besides."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from torch import Tensor, nn

from headway import hub, models
from headway.adapt import adapt
from headway.adapt._base import adaptation_of
from headway.adapt._targets import matches
from headway.heads import HeadSpec
from headway.objectives._tools import Tools
from headway.recipe import OptimizerSpec, Recipe
from headway.spec import convert, nearest
from headway.train.data import Prepared


def spec_of(model: dict[str, Any], prepared: Prepared) -> dict[str, Any]:
    """The whole spec of a recipe's model, as JSON would have it: sizes from vocabulary and classes, heads, and all."""
    start = prepared.tools.start
    given = model
    if start is not None:
        heads = {**start.spec.get("heads", {}), **model.get("heads", {})}
        given = {**start.spec, **({"heads": heads} if heads else {})}  # an encoder-decoder has none
    kinds = prepared.objective.KINDS
    if given.get("kind") in models.names() and given["kind"] not in kinds:
        raise ValueError(f"model.kind: this objective trains {' or '.join(kinds)}, not '{given['kind']}'")
    spec = msgspec.to_builtins(prepared.objective.spec(given, prepared.tools))
    if start is None:
        return spec
    if new := _new(spec, start):  # which take the place of the checkpoint's own
        spec = {**spec, "heads": new}
    frozen = {"adapt": prepared.adapt, "freeze": list(prepared.freeze)}
    return {"load": model["load"], **spec, **{key: value for key, value in frozen.items() if value}}


def refuse_redraw(model: nn.Module, recipe: Recipe, optimizer: OptimizerSpec) -> None:
    """Features that are drawn anew as the model runs (Performer) have to be the same throughout a step, on every rank,
    and in no average of weights."""
    drawn = any(getattr(module, "redraw", None) for module in model.modules())
    shared = {
        "accumulate": recipe.accumulate > 1,
        "activation_checkpointing": recipe.activation_checkpointing,
        "optimizer.ema": optimizer.ema > 0,
        "objective.name=contrastive": recipe.objective.get("name") == "contrastive",
    }
    if drawn and any(shared.values()):
        key = next(key for key, is_on in shared.items() if is_on)
        raise ValueError(f"performer's redraw changes features between passes that {key} takes for one: leave out one")


def network(spec: dict[str, Any], tools: Tools) -> nn.Module:
    """Fresh, or loaded; heads that the checkpoint does not have are drawn, and no other weight is but adapters'."""
    if tools.start is None:
        return models.build(spec)
    new = _new(spec, tools.start)
    net = hub.load(spec["load"], device="cpu", heads=new).net if new else copy.deepcopy(tools.start.net)
    if "adapt" in spec:
        if adaptation_of(net) is not None:
            raise ValueError("adapt: model.load is adapted already, and a new adapter would switch that one off: leave "
                             "adapt out to train it on, or save headway.adapt.fold(model) first")  # fmt: skip
        _adapt(net, dict(spec["adapt"]), tuple(new))
        net.adaptation.source = spec["load"]
    _freeze(net, spec.get("freeze", ()))
    return net


def _adapt(net: nn.Module, how: dict[str, Any], new: tuple[str, ...]) -> None:
    """Gives a network the adapter of a recipe, beside which new heads train."""
    if not isinstance(method := how.pop("method", None), str):
        raise ValueError(f"adapt.method: is missing; there is {', '.join(adapt.methods())}")
    heads = tuple(dict.fromkeys([*how.pop("heads", ()), *new]))
    adapt(net, method, heads=heads, **how)


def _freeze(net: nn.Module, patterns: Sequence[str]) -> None:
    """Parameters whose names patterns mean stay as they are."""
    names = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
    for pattern in patterns:
        found = [parameter for name, parameter in names.items() if matches(pattern, name)]
        if not found:
            raise ValueError(f"freeze: '{pattern}' means no parameter that trains{nearest(pattern, names)}")
        for parameter in found:
            parameter.requires_grad_(False)


def learned(model: nn.Module) -> dict[str, Tensor]:
    """What of a model's state a checkpoint holds: all of it, or what adapters and new heads learn on a frozen base."""
    if adaptation_of(model) is None:
        return model.state_dict()
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}  # a value head, too
    return adapt.state(model) | {name: tensor for name, tensor in model.state_dict().items() if name in trains}


def relearn(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """The way back of `learned`."""
    model.load_state_dict(tensors, strict=adaptation_of(model) is None)


def _new(spec: dict[str, Any], start: hub.Loaded) -> dict[str, Any]:
    """The heads that the checkpoint does not have, or not so."""
    typed = lambda heads: {name: convert(msgspec.to_builtins(head), HeadSpec, f"heads.{name}") for name, head in heads}
    own, wanted = (typed(one.get("heads", {}).items()) for one in (start.spec, spec))
    return {name: msgspec.to_builtins(head) for name, head in wanted.items() if own.get(name) != head}
