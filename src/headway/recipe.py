"""Recipe: what to train on which data, under which budget; a YAML file, typed and strict.

`model` is one model (`headway train`), `models` several (`headway compare`), each under the same budget. Any key can
be set from outside: `--set optimizer.lr=1e-3`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from headway.data.sources import DataSpec
from headway.spec import Strict, convert, nearest, number, override
from headway.text import TokenizerSpec

Positive = Annotated[int, Meta(ge=1)]
Above0 = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, le=1)]


class Sides(Strict, frozen=True):
    """One tokenizer for what goes in, one for what comes out."""

    input: TokenizerSpec = TokenizerSpec()
    target: TokenizerSpec = TokenizerSpec()


class Budget(Strict, frozen=True):
    """When training ends: exactly one of them. Only steps and tokens repeat to the bit: seconds are never the same."""

    seconds: float | None = None
    steps: int | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        given = {key: value for key, value in self.asdict().items() if value is not None}
        if len(given) != 1 or not all(0 < value < math.inf for value in given.values()):
            raise ValueError(
                f"budget is one of seconds, steps or tokens, finite and above 0; this one is {given or 'empty'}"
            )

    def asdict(self) -> dict[str, float | int | None]:
        return {"seconds": self.seconds, "steps": self.steps, "tokens": self.tokens}

    def fraction(self, seconds: float, steps: int, tokens: int) -> float:
        """The share of the budget that is spent, 0 to 1."""
        if self.seconds is not None:
            return min(1.0, seconds / self.seconds)
        if self.steps is not None:
            return min(1.0, steps / self.steps)
        assert self.tokens is not None
        return min(1.0, tokens / self.tokens)


class OptimizerSpec(Strict, frozen=True):
    """adamw (1711.05101), or muon: orthogonalised momentum for the matrices inside the blocks, AdamW for the rest.

    lr: of AdamW. matrix_lr: of Muon, unused by adamw. weight_decay: of matrices, times the rate. warmup: steps to full
    rate. schedule: how the rate falls to zero (`train/schedule.py`); decay: over which last share of the budget, by
    default all of it (wsd: a fifth). clip: largest norm of the gradient. ema: the share that the moving average of the
    weights keeps of itself at a step (0.999); with it, the average is what is evaluated and kept (0: no average).
    layer_decay: each block's rate is so much of that of the block above (1: all learn alike; 2003.10555).
    """

    name: Literal["adamw", "muon"] = "muon"
    lr: Above0 = 5e-3
    matrix_lr: Above0 = 0.02
    betas: tuple[Share, Share] = (0.9, 0.98)
    weight_decay: Annotated[float, Meta(ge=0)] = 0.01
    clip: Above0 = 1.0
    warmup: Annotated[int, Meta(ge=0)] = 100
    schedule: Literal["linear", "cosine", "wsd", "constant"] = "linear"
    decay: Share | None = None
    ema: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    layer_decay: Annotated[float, Meta(gt=0, le=1)] = 1.0

    def __post_init__(self) -> None:
        share = {"wsd": 0.2, "constant": 0.0}.get(self.schedule, 1.0) if self.decay is None else self.decay
        if self.schedule == "constant" and share:
            raise ValueError(f"schedule constant never falls, and decay is {share}: leave decay out, or take linear")
        msgspec.structs.force_setattr(self, "decay", share)


class Entry(Strict, frozen=True):
    """One model of a comparison: how to call it, whom to cite, its spec, and its own optimizer if it needs one; and on
    how many of the training rows it learns, if not on all."""

    model: dict[str, Any]
    title: str = ""
    source: str = ""
    optimizer: OptimizerSpec | None = None
    train_rows: Positive | None = None


class Recipe(Strict, frozen=True):
    """Everything a run depends on. `max_tokens` is the longest input or target, in tokens, that the model takes.

    `model` is a spec, or {load: FOLDER, heads: {...}} for a checkpoint to go on from. Of one that is loaded, `freeze`
    keeps what patterns of its parameters' names mean as it is, and `adapt` all of it: {method: lora, rank: 8, targets:
    "blocks.*.mixer.{q,v}"} trains adapters (`headway.adapt`) and new heads, and checkpoints hold nothing else.

    A step takes `accumulate` batches of at most `batch_tokens`, over all ranks together; `workers` processes make them
    ahead of time. `parallel`: how the ranks that torchrun starts share the model: whole on each ("ddp"), cut ("fsdp").

    `precision`: "bf16" computes in it where that is safe (autocast), "pure-bf16" throughout, with fp32 weights beside
    (1710.03740). `activation_checkpointing` runs each block again on the way back instead of keeping what it computed;
    `compile` has torch.compile fuse each feed-forward. `spike`: training stops at a loss that many standard
    deviations above its running mean (0: only where it is no number). `log`: "tensorboard" is written, too, beside
    the JSON lines. `keep`: checkpoints, each with the best weights.

    Test inputs are answered with `beams`, which compete by log-probability over length^`penalty`.
    """

    data: DataSpec
    budget: Budget
    name: str = "run"
    title: str = ""
    tokenizers: Sides = Sides()
    model: dict[str, Any] | None = None
    models: dict[str, Entry] | None = None
    adapt: dict[str, Any] | None = None
    freeze: tuple[str, ...] = ()
    objective: dict[str, Any] = {}
    optimizer: OptimizerSpec = OptimizerSpec()
    batch_tokens: Positive = 4096
    accumulate: Positive = 1
    workers: Annotated[int, Meta(ge=0, le=64)] = 0
    parallel: Literal["ddp", "fsdp"] = "ddp"
    max_tokens: Annotated[int, Meta(ge=1, le=2**16)] = 64
    precision: Literal["auto", "fp32", "bf16", "pure-bf16"] = "auto"
    activation_checkpointing: bool = False
    compile: bool = False
    spike: Annotated[float, Meta(ge=0)] = 0.0
    seed: Annotated[int, Meta(ge=0, lt=2**23)] = 0
    evaluations: Positive = 20
    log: Literal["jsonl", "tensorboard"] = "jsonl"
    checkpoint_seconds: float = 30.0
    keep: Positive = 2
    beams: Positive = 1
    penalty: Annotated[float, Meta(ge=0)] = 1.0
    test_limit: Positive | None = None

    def __post_init__(self) -> None:
        if (self.model is None) == (self.models is None):
            raise ValueError("a recipe has either `model` (headway train) or `models` (headway compare)")
        for key in ("adapt", "freeze"):
            if getattr(self, key) and "load" not in (self.model or {}):
                raise ValueError(
                    f"{key}: keeps trained weights as they are, and this model has none: give it model.load"
                )


def built_in() -> dict[str, str]:
    """Headway's own recipes, by name, with their first comment line."""
    folder = resources.files("headway") / "recipes"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return {f.name[:-5]: f.read_text("utf-8").partition("\n")[0].lstrip("# ") for f in files}


def read(source: str | Path | dict[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a built-in name, a YAML file or a dict, with `overrides` such as "optimizer.lr=1e-3"."""
    data, where = (source, "recipe") if isinstance(source, dict) else parse(source)
    if any(assignment.startswith("budget.") for assignment in overrides):
        data = {**data, "budget": {}}  # a budget has one key, so a new one takes the old one's place
    for assignment in overrides:
        data = override(data, assignment)
    return convert(data, Recipe, where)


def parse(source: str | Path) -> tuple[dict[str, Any], str]:
    """What a YAML file, or a built-in recipe, holds, and what to call it in a message; a key stands once."""
    import yaml

    path = Path(source)
    if str(source) in built_in():
        text, where = (resources.files("headway") / "recipes" / f"{source}.yaml").read_text("utf-8"), f"recipe {source}"
    elif path.is_file():
        try:
            text, where = path.read_text("utf-8"), str(path)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 at byte {error.start}; save the recipe as UTF-8") from None
    else:
        raise ValueError(f"no recipe '{source}': neither a file nor built in{nearest(str(source), built_in())}")
    try:
        if twice := _twice(yaml.compose(text, Loader=yaml.SafeLoader)):
            raise ValueError(f"{where}:{twice.start_mark.line + 1}: '{twice.value}' stands twice; keep one of them")
        data = number(yaml.safe_load(text))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ValueError(f"{where}{line}: not valid YAML: {getattr(error, 'problem', None) or 'unreadable'}") from None
    except RecursionError:
        raise ValueError(f"{where}: a list or mapping in it holds itself (an alias, *); write it out") from None
    if not isinstance(data, dict):
        raise ValueError(f"{where}: a recipe is a mapping of keys to values; this file holds {type(data).__name__}")
    return data, where


def _twice(root: Any) -> Any:
    """The first key that a mapping of a YAML tree holds a second time; YAML itself would let the last one win."""
    waiting, visited = [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) in visited or not isinstance(getattr(node, "value", None), list):
            continue
        visited.add(id(node))  # an alias can make a tree a maze
        seen = set()
        for child in node.value:
            key, inner = child if isinstance(child, tuple) else (None, child)  # a mapping's child, or a sequence's
            waiting.append(inner)
            if key is not None and isinstance(key.value, str):
                if key.value in seen:
                    return key
                seen.add(key.value)
    return None
