"""Change: the spec of a model with other mixers in some of its layers, and how near that comes to the original.

Heads, head width, biases and scale of the new mixer are the attention's own, so that its weights fit; what the new
mixer cannot have is refused where it would change every score, and told where it is little.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import torch

from headway import mixers
from headway.loaded import Loaded
from headway.positions import Positions
from headway.spec import Strict
from headway.swap.words import layers_of

STACKS = {"encoder": ("stack",), "decoder": ("stack",), "vision": ("stack",), "seq2seq": ("encoder", "decoder")}
SHARED = ("heads", "kv_heads", "head_dim", "bias", "out_bias", "qk_norm", "norm_eps", "softcap", "scale")


class Place(NamedTuple):
    """A layer that changes: `before` and `after` are its mixers as a spec has them."""

    stack: str
    layer: int
    before: dict[str, Any]
    after: dict[str, Any]


class Exactness(Strict, frozen=True):
    """Whether the new mixers compute what the old ones did: for texts of up to `tokens` (None: of any length), or not
    at all (0); and why."""

    tokens: int | None
    why: str


class Change(NamedTuple):
    """The new spec, what changes in it, and how exact that is."""

    spec: dict[str, Any]
    places: list[Place]
    exactness: Exactness


def changed(
    model: Loaded, mixer: Mapping[str, Any], layers: str | Sequence[int] | None = None, context: int | None = None
) -> Change:
    """The spec of `model` with `mixer` in its `layers`, and positions for `context` tokens."""
    if model.kind not in STACKS:
        raise ValueError(f"swap: a {model.kind} has no stack to swap in: give one of {', '.join(STACKS)}")
    spec = extended(model, context)
    length = context or model.max_tokens
    depths = {name: len(spec[name]["blocks"]) * spec[name]["repeat"] for name in STACKS[model.kind]}
    places: list[Place] = []
    for stack, chosen in layers_of(layers, depths).items():
        blocks = [dict(block) for block in spec[stack]["blocks"] * spec[stack]["repeat"]]
        causal = stack == "decoder" or model.kind == "decoder"
        scheme = (spec[stack].get("positions") or {}).get("name", "rotary")
        for layer in chosen:
            before = _attention(blocks[layer].get("mixer"), layer, spec["width"])
            after = _completed(mixer, before, causal, length, scheme)
            _check(after, spec["width"], causal, stack)
            blocks[layer]["mixer"] = after
            places.append(Place(stack, layer, before, after))
        alike = all(block == blocks[0] for block in blocks)
        spec[stack] = {**spec[stack], "blocks": blocks[:1] if alike else blocks, "repeat": len(blocks) if alike else 1}
    each = [exactness(place, model.kind == "decoder" or place.stack == "decoder") for place in places]
    return Change(spec, places, min(each, key=lambda one: math.inf if one.tokens is None else one.tokens))


def extended(model: Loaded, context: int | None) -> dict[str, Any]:
    """The model's spec, every field there, its learned positions `context` long."""
    spec = {"stack": None, **_plain(model.spec)}
    for stack in STACKS[model.kind]:
        spec[stack] = {"repeat": 1, "positions": {}, **spec[stack]}
        if context is not None and spec[stack]["positions"].get("name") == "learned":
            spec[stack]["positions"] = {**spec[stack]["positions"], "length": context}
    if spec["stack"] is None:
        del spec["stack"]
    if context is None:
        return spec
    if model.max_tokens is None:
        raise ValueError(f"swap: this {model.kind} has no longest text that could be extended: leave out context")
    if context < model.max_tokens:
        raise ValueError(f"swap: a context of {context} tokens is below the {model.max_tokens} that it has: give more")
    return spec


def exactness(place: Place, causal: bool) -> Exactness:
    """How near a new mixer comes to the old one, before any healing."""
    old, new = place.before, place.after
    name = new["name"]
    if old.get("window") is not None and old.get("window") != new.get("window"):
        return Exactness(tokens=0, why="the original has a window of its own, and this one sees other tokens")
    if name in ("attention", "longformer", "streaming") and _dilation(new) == 1:
        window = new.get("window", {"attention": None, "longformer": 256, "streaming": 1020}[name])
        sides = (window, window) if isinstance(window, int) else window
        reach = [side for side in ((sides or ())[:1] if causal else sides or ()) if side is not None]
        if not reach:
            return Exactness(tokens=None, why="every token sees all that it saw before")
        sinks = new.get("sinks", 4 if name == "streaming" else 0)
        equal = min(reach) + 1 + (sinks if causal else 0)  # on both sides, sinks are seen and do not see
        near = f"the {min(reach)} nearest tokens" + (f" and the first {sinks}" if sinks else "")
        why = f"the same weights and softmax, over {near}: equal while a text has up to {equal} tokens"
        if sinks and name == "attention" and causal:
            why += "; its sinks stay where they stand, so far beyond the trained length take streaming:window=N,sinks=M"
        return Exactness(tokens=equal, why=why)
    return Exactness(tokens=0, why=_differs(name, new))


def _differs(name: str, new: Mapping[str, Any]) -> str:
    if name == "longformer":
        return f"with steps of {_dilation(new)} tokens it passes over tokens that the original sees"
    if name == "performer":
        return "random features estimate the softmax of the same queries and keys; more of them err less"
    if name == "linformer":
        return f"keys and values of all tokens are summed into {new.get('rank', 256)} by a projection that is new"
    if name == "linear":
        return "the same queries, keys and values without the softmax: another weighting, which has to be learned"
    return "it mixes tokens in another way and keeps nothing of the attention: heal it, or train it"


def _dilation(named: Mapping[str, Any]) -> int:
    given = named.get("dilation", 1)
    return given if isinstance(given, int) else max(given, default=1)


def _plain(spec: Any) -> dict[str, Any]:
    """The spec as plain dicts and lists: loaded ones hold records in places."""
    return msgspec.to_builtins(spec)


def _attention(named: dict[str, Any] | None, layer: int, width: int) -> dict[str, Any]:
    """All options of a layer's attention."""
    if named is None or named["name"] != "attention":
        what = "nothing" if named is None else named["name"]
        raise ValueError(
            f"swap: layer {layer} mixes by {what}, and what is swapped is attention: leave it out (layers)"
        )
    options = mixers.options(named)[1]
    options["kv_heads"] = options["kv_heads"] or options["heads"]
    options["head_dim"] = options["head_dim"] or width // options["heads"]
    options["out_bias"] = options["bias"] if options["out_bias"] is None else options["out_bias"]
    return {"name": "attention", **_plain(options)}


def _completed(
    mixer: Mapping[str, Any], before: dict[str, Any], causal: bool, length: int | None, scheme: str
) -> dict[str, Any]:
    """The new mixer's spec with what it takes over from the attention."""
    name = mixer["name"]
    known = inspect.signature(mixers.find(name).__init__).parameters
    new = dict(mixer)
    for key in SHARED if "heads" in known else ():
        value = before[key]
        if key == "bias" and "out_bias" not in known:
            value = before["bias"] or before["out_bias"]
        if key in known and new.setdefault(key, value) != value:
            raise ValueError(f"swap: {key}={new[key]} does not fit the weights, which have {value}: leave it out")
        if key in ("qk_norm", "softcap") and value and key not in known:
            raise ValueError(f"swap: the original has {key}={value}, which {name} has not: choose attention:window=N")
    if scheme in ("buckets", "alibi") and "heads" in known and name != "attention":
        raise ValueError(
            f"swap: this stack adds a bias by distance ({scheme}) to every score, and {name} forms none that could "
            "take it: choose attention:window=N"
        )
    if name == "attention" and isinstance(window := new.get("window"), int):
        new["window"] = [window, 0 if causal else window]
    if name == "longformer":
        new.setdefault("global_projections", not causal)
    if "bidirectional" in known:
        new.setdefault("bidirectional", not causal)
    if "length" in known and "length" not in new:
        if length is None:
            raise ValueError(f"swap: {name} is made for a longest text, and this model names none: give length=N")
        new["length"] = length
    return {key: value for key, value in new.items() if value is not None}


def _check(named: dict[str, Any], width: int, causal: bool, stack: str) -> None:
    with torch.device("meta"):
        can = mixers.build(named, width, Positions()).can
    if ("causal" if causal else "bidirectional") not in can:
        what = "only causal" if "causal" in can else "not causal"
        wish = f"swap the encoder alone ({stack.replace('decoder', 'encoder')})" if stack == "decoder" else ""
        raise ValueError(f"swap: {named['name']} is {what}, and this stack is {'' if causal else 'not '}causal: "
                         f"{wish or 'choose another mixer (attention can be either)'}")  # fmt: skip
