"""Embed: a vector for each text or picture, as the checkpoint pools and scales them (1908.10084; CLIP 2103.00020).

mean: (1/T) sum_t h_t; first: h_1; last: h_T; or what a pooling head makes of them. Near vectors mean alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from headway import models
from headway.heads import HeadSpec, pool
from headway.loaded import Loaded
from headway.use.passes import Watch, compute, groups, listed, pictures, strings

POOLS = ("mean", "first", "last")


def embed(
    model: Loaded,
    inputs: Any,
    *,
    batch_tokens: int | None = None,
    normalize: bool | None = None,
    pooling: str | None = None,
    task: str | None = None,
    truncate: bool = False,
    watch: Watch | None = None,
) -> Float[Tensor, "N C"]:
    """See `headway.hub.Loaded.embed`."""
    inputs = checked(model, inputs)
    if task is not None and not (model.kind == "dual" and task in model.net.towers):
        inputs = [prefix_of(model, task) + text for text in inputs]
    found: Tensor | None = None
    scaled = scales(model, pooling) if normalize is None else normalize
    for rows, part in _parts(model, inputs, pooling, task, truncate, batch_tokens, watch):
        vectors = F.normalize(part.float(), dim=-1) if scaled else part.float()
        if found is None:
            found = vectors.new_empty(len(inputs), vectors.shape[-1])
        found[rows] = vectors
    assert found is not None
    return found


def checked(model: Loaded, inputs: Any) -> list[Any]:
    """The inputs as a list of one kind, texts or pictures, that this model reads."""
    found = listed(inputs, "embed")
    if not reads_pictures(model, found):
        return strings(found, "embed")
    wrong = next((i for i, one in enumerate(found) if model.kind == "dual" and isinstance(one, str)), None)
    if wrong is not None:
        raise ValueError(f"embed: input {wrong} is a text among pictures: embed them apart (paths are Path objects)")
    return found


def reads_pictures(model: Loaded, inputs: list[Any]) -> bool:
    """Whether these inputs are pictures: of a model with two towers, what is no str is one."""
    return models.reads_pictures(model.kind) or (model.kind == "dual" and not isinstance(inputs[0], str))


def prefix_of(model: Loaded, task: str) -> str:
    """What the checkpoint's texts begin with in a task ("query", "passage")."""
    if task not in model.facts.prefixes or reads_pictures(model, ["a text"]) or model.kind == "dual":
        there = ", ".join(model.facts.prefixes) or "none"
        raise ValueError(f"embed: this checkpoint has no prefix for the task {task!r} (it has {there}): leave out task")
    return model.facts.prefixes[task]


def scales(model: Loaded, pooling: str | None = None) -> bool:
    """Whether vectors are scaled to length one where nobody says."""
    return model.kind == "dual" or model.facts.normalize


def pooling_of(model: Loaded, pooling: str | None) -> str:
    """How one vector is made of many: as asked, else as the checkpoint says; or a ValueError."""
    how = pooling or model.facts.pooling
    heads = [name for name, head in getattr(model.net, "heads", {}).items() if head.spec.pool != "none"]
    choices = ", ".join([*POOLS, *heads])
    if how is None:
        raise ValueError(f"embed: this checkpoint does not say how to make one vector of many: give pooling, {choices}")
    if how not in POOLS and how not in heads:
        raise ValueError(f"embed: pooling is one of {choices}, not {how!r}")
    return how


def _parts(
    model: Loaded,
    inputs: list[Any],
    pooling: str | None,
    task: str | None,
    truncate: bool,
    batch_tokens: int | None,
    watch: Watch | None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Vectors as they come, not yet scaled, with which inputs they are of."""
    pictured = reads_pictures(model, inputs)
    if model.kind == "dual":
        if pooling is not None:
            raise ValueError(f"embed: a model with two towers projects its vectors: leave out pooling={pooling!r}")
        if pictured:
            net = tower(model, "image")
            for rows, pixels in pictures(model, inputs, "embed", watch=watch):
                yield rows, compute(net.head, "project", compute(net, pixels))
            return
        net, reader = reading_tower(model, task)
        for group in groups(reader, inputs, net=net, truncate=truncate, batch_tokens=batch_tokens, watch=watch):
            yield group.rows, compute(net.head, "project", group.hidden, group.ids, group.valid)
        return
    how = pooling_of(model, pooling)
    if pictured:
        for rows, pixels in pictures(model, inputs, "embed", watch=watch):
            yield rows, _pooled(model, how, compute(model.net, pixels))
        return
    for group in groups(model, inputs, truncate=truncate, batch_tokens=batch_tokens, watch=watch):
        yield group.rows, _pooled(model, how, group.hidden, group.ids, group.valid)


@torch.inference_mode()
def _pooled(
    model: Loaded, how: str, hidden: Float[Tensor, "B T C"], ids: Tensor | None = None, valid: Tensor | None = None
) -> Float[Tensor, "B C"]:
    if how in POOLS:
        return pool(hidden.float(), HeadSpec(pool=how), None, valid)  # type: ignore[arg-type]
    return model.net.head(how, hidden) if ids is None else model.net.head(how, hidden, ids, valid)


def reading_tower(model: Loaded, task: str | None) -> tuple[Any, Loaded]:
    """The tower that reads texts, and the model with its tokenizer; where both do, `task` names one (or the first)."""
    names = list(model.net.towers)
    name = task or ("text" if "image" in names else names[0])
    reader = model
    if "image" not in names and name == names[1]:
        reader = copy(model)
        reader.source = model.target
    return tower(model, name), reader


def tower(model: Loaded, name: str) -> Any:
    """One of two towers, or a ValueError that names those that there are."""
    if name not in model.net.towers:
        there = ", ".join(model.net.towers)
        raise ValueError(f"this model reads no {'texts' if name == 'text' else 'pictures'}: its towers are {there}")
    return model.net.towers[name]
