"""Spec: what a model is, as data. Frozen, typed, strict; a model is rebuilt from its saved spec alone.

A misspelt key is an error that names the nearest right one. Nothing in a spec is ever executed: a mixer outside
Headway is named by its dotted path and must have been imported by the user's own code.
"""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta


class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A frozen record that refuses keys it does not know."""


T = TypeVar("T")
Size = Annotated[int, Meta(ge=1, le=2**24)]  # beyond it a spec is a mistake or an attack


Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "silu", "tanh"]
Norm = Literal["layer", "rms"]
Epsilon = Annotated[float, Meta(gt=0, lt=1)]


class FeedForwardSpec(Strict, frozen=True):
    """`hidden` is the inner width (default: four times the model's); `gated` multiplies by a second branch (GLU)."""

    hidden: Size | None = None
    activation: Activation = "gelu"
    gated: bool = False
    bias: bool = True


class BlockSpec(Strict, frozen=True):
    """norm -> mixer -> +, norm -> cross -> +, norm -> feedforward -> +; what is absent is left out.

    `mixer` and `cross` name a file in `mixers/` and its options: {"name": "attention", "heads": 4}. `norm_eps`: what
    its norms add to the variance (default: PyTorch's own). `layer_scale`: each branch is multiplied by a vector that
    starts there (2103.17239).
    """

    mixer: dict[str, Any] | None = None
    cross: dict[str, Any] | None = None
    feedforward: FeedForwardSpec | None = None
    norm: Norm = "layer"
    norm_eps: Epsilon | None = None
    layer_scale: float | None = None
    wiring: Literal["pre", "post", "sandwich", "parallel"] = "pre"


class RotaryScaling(Strict, frozen=True):
    """How rotary angles reach beyond the trained length: `linear` slows all of them by `factor` (2306.15595); `llama3`
    slows only those that turn fewer than `high` times within `trained` tokens, by all of it below `low` turns."""

    name: Literal["linear", "llama3"]
    factor: Annotated[float, Meta(ge=1)]
    low: Annotated[float, Meta(gt=0)] = 1.0
    high: Annotated[float, Meta(gt=0)] = 4.0
    trained: Size = 8192


class PositionSpec(Strict, frozen=True):
    """`length`: a learned table's size. `offset`: rows of the table before that of position 0, as published ones have.
    `base`: of the angles. Rotary turns heads, and does nothing without any. `buckets`, `distance`, `both`: of T5's
    learned bias by distance (1910.10683): how many, from where on the last, and whether they tell before from behind.
    """

    name: Literal["none", "learned", "sinusoidal", "rotary", "alibi", "buckets"] = "rotary"
    length: Size = 512
    offset: Annotated[int, Meta(ge=0, le=16)] = 0
    base: Annotated[float, Meta(gt=0)] = 10000.0
    scaling: RotaryScaling | None = None
    buckets: Annotated[int, Meta(ge=4, le=4096)] = 32
    distance: Size = 128
    both: bool = True


class StackSpec(Strict, frozen=True):
    """`blocks`, in order, `repeat` times over; so a hybrid is a list of two blocks. The first norm stands behind the
    positions, the final one behind the last block."""

    blocks: tuple[BlockSpec, ...]
    repeat: Annotated[int, Meta(ge=1, le=1024)] = 1
    positions: PositionSpec = PositionSpec()
    first_norm: bool = False
    final_norm: bool = True


def convert(data: Any, kind: type[T], where: str = "spec") -> T:
    """`data` as a `kind`, or a ValueError of one line that names the place, the fault and the nearest right key."""
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise ValueError(f"{where}: {_explain(str(error), data, kind)}") from None


def override(data: dict[str, Any], assignment: str) -> dict[str, Any]:
    """A copy of `data` with one dotted key set: `override(recipe, "optimizer.lr=1e-3")`. The value is read as YAML."""
    import yaml

    key, sign, text = assignment.partition("=")
    if not sign or not key:
        raise ValueError(f"--set {assignment}: expected key=value, as in optimizer.lr=1e-3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"--set {assignment}: the value is not valid YAML") from None
    return _put(data, key.split("."), number(value), assignment)


def number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as text; people mean the number."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    if isinstance(value, dict):
        return {key: number(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [number(inner) for inner in value]
    return value


def named(text: str, shown: str, form: str) -> dict[str, Any]:
    """`NAME:OPTION=VALUE:OPTION=VALUE`, or with commas, as {"name": NAME, OPTION: VALUE}; a list is written [512,0].
    For a message: `shown` is what was given, `form` how it is written."""
    import yaml

    name, *assignments = re.split(r"[,:](?![^\[]*\])", text)
    found: dict[str, Any] = {"name": name.strip()}
    for assignment in assignments:
        key, sign, value = assignment.partition("=")
        if not sign or not key.strip():
            raise ValueError(f"{shown}: write {form}")
        try:
            found[key.strip()] = number(yaml.safe_load(value))
        except yaml.YAMLError:
            raise ValueError(f"{shown}: {value} is no value; a list is written [512,0]") from None
    return found


def nearest(word: str, words: Any) -> str:
    """`; did you mean 'x'?` where one of `words` is near, else a list of what there is."""
    words = sorted(words)
    close = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; there is {', '.join(words)}"


def _put(data: Any, keys: list[str], value: Any, assignment: str) -> Any:
    key, rest = keys[0], keys[1:]
    if isinstance(data, list):
        if not key.isdigit() or int(key) >= len(data):
            raise ValueError(f"--set {assignment}: '{key}' is no place in a list of {len(data)}")
        return [_put(v, rest, value, assignment) if rest and i == int(key) else (value if i == int(key) else v)
                for i, v in enumerate(data)]  # fmt: skip
    if data is not None and not isinstance(data, dict):
        raise ValueError(f"--set {assignment}: '{key}' is looked for inside {data!r}, which has no keys")
    data = data or {}
    return {**data, key: _put(data.get(key), rest, value, assignment) if rest else value}


def _explain(message: str, data: Any, kind: Any) -> str:
    """msgspec's message with the nearest key: it knows the path and the unknown word, and we know the fields."""
    match = re.match(r"Object contains unknown field `(.+?)`(?: - at `(.+?)`)?$", message)
    if not match:
        return message.replace(" - at `$.", " at `").replace(" - at `$", " at `")
    word, path = match.group(1), (match.group(2) or "$")[1:].lstrip(".")
    place = f"{path}.{word}" if path else word
    return f"unknown key '{place}'{nearest(word, _fields_at(kind, path))}"


def _fields_at(kind: Any, path: str) -> list[str]:
    """The field names of the struct at a msgspec path such as `encoder.blocks[0].feedforward` or `models[...]`."""
    info: Any = msgspec.inspect.type_info(kind)
    for step in re.findall(r"[^.\[\]]+|\[[^\]]*\]", path):
        info = _struct_of(info)
        if step.startswith("["):
            info = getattr(info, "item_type", None) or getattr(info, "value_type", None) or info
        elif isinstance(info, msgspec.inspect.StructType):
            info = next((field.type for field in info.fields if field.encode_name == step), info)
        else:
            info = getattr(info, "value_type", info)
    info = _struct_of(info)
    return [field.encode_name for field in info.fields] if isinstance(info, msgspec.inspect.StructType) else []


def _struct_of(info: Any) -> Any:
    if isinstance(info, msgspec.inspect.UnionType):
        return next((t for t in info.types if not isinstance(t, msgspec.inspect.NoneType)), info)
    return info
