"""Passes: each input once through the network, in batches that waste nothing; what every action here stands on.

On a CPU, sequences of all lengths share one row without padding (segments keep them apart, positions start anew):
1.14 times as fast on one thread as the best of padded batches (MiniLM, 250 texts of skewed lengths). What cannot be
packed is padded, sorted by length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from os import PathLike
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.block import Stack
from headway.loaded import Inputs, Loaded, follow
from headway.mask import Mask
from headway.models import decoder, encoder

Watch = Callable[[int, int], None]  # of all work, in tokens or pictures: how much is done, and how much there is
BUDGET = {"cpu": 2048}  # tokens a batch; on one thread 512 and 4096 are 6% slower, 1024 as fast. A GPU wants more
GPU_BUDGET = 16384
PICTURES = 16  # a batch


class Group(NamedTuple):
    """Some inputs' last hidden states: which inputs, their ids, which of those are no padding (None: all are)."""

    rows: list[int]
    ids: Int[Tensor, "B T"]
    valid: Bool[Tensor, "B T"] | None
    hidden: Float[Tensor, "B T C"]


def strings(texts: Any, call: str) -> list[str]:
    """A list of texts, checked; `call` is what an error calls the action."""
    found = listed(texts, call)
    for i, text in enumerate(found):
        if not isinstance(text, str):
            raise ValueError(f"{call}: input {i} is a {type(text).__name__}, and this model reads texts: give a str")
        if not text.strip():
            raise ValueError(f"{call}: text {i} is empty: leave it out, or give at least one word")
    return found


def listed(inputs: Any, call: str) -> list[Any]:
    """The inputs as a list that is not empty."""
    if isinstance(inputs, str | bytes | PathLike):
        raise ValueError(f"{call} takes a list, not one alone: {call}([{str(inputs)[:40]!r}])")
    try:
        found = list(inputs)
    except TypeError:
        raise ValueError(f"{call} takes a list, and this is a {type(inputs).__name__}: put it in one") from None
    if not found:
        raise ValueError(f"{call}: nothing to do, the list is empty: give at least one input")
    return found


def groups(
    model: Loaded,
    texts: Sequence[str],
    *,
    net: Any = None,
    task: str = "",
    truncate: bool = False,
    batch_tokens: int | None = None,
    watch: Watch | None = None,
) -> Iterator[Group]:
    """The hidden states of texts, groups in no given order. `task`: the head that will read them (global tokens);
    `net`: a part of the model that reads them, such as a tower."""
    rows, types = [], []
    for text, (ids, kinds) in zip(texts, model.tokenizer.encode_all(texts), strict=True):
        ids, kinds = model.fitted(ids, kinds, text, truncate)
        rows.append(ids)
        types.append(kinds)
    yield from passes(model, rows, types, net=net, task=task, batch_tokens=batch_tokens, watch=watch)


def passes(
    model: Loaded,
    rows: Sequence[Sequence[int]],
    types: Sequence[Sequence[int]],
    *,
    net: Any = None,
    task: str = "",
    batch_tokens: int | None = None,
    watch: Watch | None = None,
) -> Iterator[Group]:
    """The same for ids; `net` where it is a part of the model, such as a tower."""
    if batch_tokens is not None and (type(batch_tokens) is not int or batch_tokens < 1):
        raise ValueError(f"batch_tokens is a number of tokens, 1 or more, not {batch_tokens!r}")
    net = model.net if net is None else net
    budget = batch_tokens or BUDGET.get(model.device.type, GPU_BUDGET)
    own = follow(model.net, range(len(rows)), anew=True)
    packed = packs(net) and task not in model.facts.globals and not own
    done, total = 0, sum(map(len, rows))
    for batch in batches([len(row) for row in rows], budget, packed):
        follow(model.net, batch, anew=True)
        inputs = model.batch([rows[i] for i in batch], [types[i] for i in batch]) if not packed else None
        if inputs is None:
            yield from _packed(model, net, batch, rows, types)
        else:
            yield Group(batch, inputs.ids, inputs.valid, _hidden(model, net, inputs, task))
        done += sum(len(rows[i]) for i in batch)
        if watch is not None:
            watch(done, total)


def batches(lengths: Sequence[int], budget: int, packed: bool) -> Iterator[list[int]]:
    """Indices sorted by length, cut so that a batch has at most `budget` tokens, padding included, or one row."""
    batch: list[int] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        tokens = tokens + lengths[i] if packed else (len(batch) + 1) * lengths[i]
        if batch and tokens > budget:
            yield batch
            batch, tokens = [], lengths[i]
        batch.append(i)
    if batch:
        yield batch


def packs(net: Any) -> bool:
    """Whether sequences may share a row at no cost: exact attention alone, no window, no bias, on a CPU."""
    if not isinstance(net, encoder.Model | decoder.Model) or next(net.parameters()).device.type != "cpu":
        return False
    from headway.mixers.attention import Attention

    mixers = [block.mixer.inner for block in net.stack.blocks if block.mixer is not None]
    if type(net.stack) is not Stack:  # an adapter stands there, which puts tokens before those of each sequence
        return False
    exact = all(
        isinstance(mixer, Attention) and mixer.softcap is None and mixer.local.window is None for mixer in mixers
    )
    return exact and not net.stack.positions.biases


def _packed(
    model: Loaded, net: Any, batch: list[int], rows: Sequence[Sequence[int]], types: Sequence[Sequence[int]]
) -> Iterator[Group]:
    """One row of sequences, and then a group for each length in it."""
    lengths = torch.tensor([len(rows[i]) for i in batch])
    ids = torch.tensor([[t for i in batch for t in rows[i]]])
    segments = torch.repeat_interleave(torch.arange(len(batch)), lengths)[None]
    pos = torch.arange(ids.shape[1])[None] - (lengths.cumsum(0) - lengths)[segments]
    more: dict[str, Any] = {"mask": Mask(segments=segments)} if len(batch) > 1 else {}
    kinds = torch.tensor([[t for i in batch for t in types[i]]])
    if isinstance(net, encoder.Model) and net.types is not None and net.types.num_embeddings > 1 and kinds.any():
        more["types"] = kinds
    hidden = compute(net, ids, pos=pos, **more)
    at = 0
    for length, found in groupby(batch, key=lambda i: len(rows[i])):
        same = list(found)
        part = slice(at, at + length * len(same))
        at = part.stop
        yield Group(same, ids[0, part].view(len(same), length), None, hidden[0, part].unflatten(0, (len(same), length)))


def _hidden(model: Loaded, net: Any, inputs: Inputs, task: str) -> Float[Tensor, "B T C"]:
    if net is model.net:
        return model.hidden(inputs, mask=model.global_tokens(task, inputs))
    return compute(net, inputs.ids, inputs.valid, **({} if inputs.types is None else {"types": inputs.types}))


@torch.inference_mode()
def compute(call: Callable[..., Tensor], *inputs: Any, **named: Any) -> Tensor:
    """What a module or a head gives, without gradients. (A decorated generator would do so for its caller, too.)"""
    return call(*inputs, **named)


def pictures(
    model: Loaded, images: Any, call: str, *, watch: Watch | None = None
) -> Iterator[tuple[list[int], Tensor]]:
    """Pictures as the checkpoint wants them, `Float[B 3 H W]` with which they are, a few at a time."""
    from headway.image import pixels

    images = listed(images, call)
    if model.image is None:
        raise ValueError(f"{call}: this model came without a preprocessor_config.json, which says what pictures become")
    dtype = next(model.net.parameters()).dtype
    for start in range(0, len(images), PICTURES):
        part = list(range(start, min(start + PICTURES, len(images))))
        follow(model.net, part, anew=True)
        yield part, pixels([images[i] for i in part], model.image).to(model.device, dtype)
        if watch is not None:
            watch(part[-1] + 1, len(images))
