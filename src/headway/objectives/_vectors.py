"""Texts or pictures as a batch, and what a model makes of them: for objectives that read whole inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headway.data.batches import padded
from headway.loaded import Inputs, Loaded
from headway.mask import Mask
from headway.objectives import Unfit, empty
from headway.objectives._tools import Tools
from headway.vocabulary import PublishedTokenizer


class Read(NamedTuple):
    """Texts as a model reads them: `ids` and `types` are `Int[B T]`, `valid` is `Bool[B T]` or None."""

    ids: Int[Tensor, "B T"]
    types: Int[Tensor, "B T"]
    valid: Bool[Tensor, "B T"] | None
    tokens: int


def read(texts: Sequence[tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]]) -> Read:
    """Rows of ids and types, filled up on the right."""
    ids, valid = padded([ids for ids, _ in texts], 0)
    types, _ = padded([types for _, types in texts], 0)
    return Read(ids, types, None if bool(valid.all()) else valid, int(valid.sum()))


def text_of(
    tools: Tools, text: str, second: str | None = None, *, truncate: bool = False
) -> tuple[list[int], list[int]]:
    """Ids and types of a text or a pair, specials included, as long as the model takes; `Unfit` where it is longer and
    nobody asked to cut it."""
    ids, types = tools.encode(text, second)
    limit = limit_of(tools)
    if len(ids) <= _marks(tools.source, second is not None):
        raise empty(text)
    if len(ids) > limit:
        if not truncate:
            told = "raise max_tokens, or set objective.truncate=true"
            raise Unfit(f"the text {text[:40]!r} has {len(ids)} tokens, and the model takes {limit}: {told}")
        ids, types = [*ids[: limit - 1], ids[-1]], types[:limit]
    return ids, types


@lru_cache(maxsize=16)
def _marks(tokenizer: Any, pair: bool) -> int:
    """How many ids of a text, or of a pair, are marks around it."""
    if isinstance(tokenizer, PublishedTokenizer):
        return len(tokenizer.encode("", "" if pair else None).ids)
    return 3 if pair else 2


def limit_of(tools: Tools) -> int:
    """The longest input, in tokens."""
    known = tools.start.max_tokens if tools.start is not None else None
    return min(tools.max_tokens, known or tools.max_tokens)


def reader(tools: Tools) -> PublishedTokenizer:
    """The source as a tokenizer that tells places in characters."""
    from headway.vocabulary.own import dressed

    if isinstance(tools.source, PublishedTokenizer):
        return tools.source
    assert tools.source is not None, "an objective that reads texts names their columns"
    return dressed(tools.source, lowercase=tools.lowercase)


def tower_tools(tools: Tools) -> Tools:
    """Those of the second of two towers that read texts, ready to be used as published tokenizers are."""
    from headway.vocabulary.own import dressed

    target = tools.target
    if target is None:
        raise ValueError("the second tower has no tokenizer of its own here: load a model that has")
    return replace(tools, source=target if isinstance(target, PublishedTokenizer) else dressed(target))


def hidden(model: Any, batch: Any, start: Loaded | None = None, task: str = "") -> Float[Tensor, "B T C"]:
    """The states of a batch's `ids`, `types` and `valid`; of a checkpoint, with the global tokens of its task."""
    more: dict[str, Any] = {}
    types: nn.Embedding | None = getattr(model, "types", None)
    if types is not None and types.num_embeddings > 1:
        more["types"] = batch.types
    if start is not None:
        mask: Mask | None = start.global_tokens(task, Inputs(batch.ids, batch.valid, None))
        more |= {} if mask is None else {"mask": mask}
    return model(batch.ids, batch.valid, **more)


def with_types(model: dict[str, Any]) -> dict[str, Any]:
    """A new model of pairs tells the two parts apart, unless the recipe says how many types there are."""
    return {"types": 2, **model}
