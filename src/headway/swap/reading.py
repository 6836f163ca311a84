"""Reading: a user's text or pictures as batches that both models read, and what they then say, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.hub import Loaded
from headway.loaded import Inputs
from headway.probe.stacks import head_at, leaving
from headway.swap.change import STACKS
from headway.vocabulary import PublishedTokenizer

HIDDEN = 0.15  # of the tokens that a masked model reads (1810.04805)
TOKENS = 4096  # of a batch, unless one row has more
ANSWER = 64  # tokens of a row that the decoder of an encoder-decoder reads
RUN = 512  # positions whose predictions are held at a time


class Batch(NamedTuple):
    """What is read: ids, or pixels (`B C H W`). `asked`: where the model predicts; `labels`: what stands there."""

    given: Tensor
    asked: Bool[Tensor, "B T"] | None = None
    labels: Int[Tensor, " N"] | None = None
    target: Int[Tensor, "B U"] | None = None

    def to(self, device: torch.device) -> Batch:
        move = lambda t: None if t is None else t.to(device)
        return Batch(self.given.to(device), move(self.asked), move(self.labels), move(self.target))


class Seen(NamedTuple):
    """Hidden states behind each block of each stack, what the heads read where they are asked, and that head."""

    layers: dict[str, list[Float[Tensor, "B T C"]]]
    asked: Tensor
    head: Any

    def logits(self) -> Iterator[Float[Tensor, "N V"]]:
        """The predictions, a run of positions at a time."""
        for part in self.asked.split(RUN) if len(self.asked) else ():
            yield self.head(part)


def texts_of(path: Path | None, field: str = "text") -> list[str]:
    """The texts of a file (a column of a table, or all of a plain text); of none, Python's own documentation."""
    if path is None:
        from headway.data.builtin import documentation

        return [text for (text,) in documentation.rows()]
    from headway.data.files import documents, reader, texts

    if not path.is_file():
        raise ValueError(f"{path}: no such file; --data names a text, or a table with a column '{field}'")
    found = [row[0] for _, row in documents(path, "file") if not isinstance(row, str)]
    if reader(path) is not None:
        found = [text for _, text, problem in texts(path, field) if not problem]
    if not any(text.strip() for text in found):
        raise ValueError(f"{path}: holds no text that could be read: name another file")
    return found


def rows_of(model: Loaded, texts: Sequence[str], length: int) -> Int[Tensor, "N T"]:
    """All texts, one behind the other, in rows of `length` tokens with the specials that stand around a text."""
    source = model.source
    if source is None:
        raise ValueError("swap: this model came without a tokenizer, so its answers to a text cannot be compared")
    before: list[int] = []
    behind: list[int] = []
    if isinstance(source, PublishedTokenizer):
        around = source.encode("a")
        inner = [i for i, word in enumerate(around.words) if word is not None]
        before, behind = around.ids[: inner[0]], around.ids[inner[-1] + 1 :]
        ids = [
            i for found in source.encode_all(list(texts)) for i in found[0][len(before) : len(found[0]) - len(behind)]
        ]
    else:
        ids = [i for text in texts for i in source.encode(text.lower() if model.lowercase else text)]
    room = length - len(before) - len(behind)
    if room < 2 or len(ids) < room:
        raise ValueError(f"swap: {len(ids)} tokens of text do not fill one row of {length}: give more text, or a "
                         "smaller length")  # fmt: skip
    pieces = [ids[start : start + room] for start in range(0, len(ids) - room + 1, room)]
    return torch.tensor([[*before, *piece, *behind] for piece in pieces])


def batches(model: Loaded, rows: Tensor, seed: int = 0, tokens: int = TOKENS) -> Iterator[Batch]:
    """The rows in batches, with what is asked of them: the next token, or tokens that are hidden."""
    random = torch.Generator().manual_seed(seed)
    size = max(1, tokens // rows.shape[1]) if rows.ndim == 2 else 8
    for part in rows.split(size):
        yield asked_of(model, part, random).to(model.device)


def asked_of(model: Loaded, rows: Tensor, random: torch.Generator) -> Batch:
    """One batch; which tokens are hidden is drawn."""
    if rows.ndim == 4:
        return Batch(rows)
    heads = getattr(model.net, "heads", {})
    if model.kind == "decoder" and "lm" in heads:
        asked = torch.ones_like(rows, dtype=torch.bool)
        asked[:, -1] = False
        return Batch(rows, asked, rows[:, 1:].flatten())
    if model.kind == "seq2seq":
        start = model.facts.start if model.facts.start is not None else model.padding
        return Batch(rows, target=torch.cat([rows.new_full((len(rows), 1), start), rows[:, : ANSWER - 1]], 1))
    mask = model.source.mask if isinstance(model.source, PublishedTokenizer) else None
    if model.kind == "encoder" and "lm" in heads and mask is not None:
        special = torch.tensor(sorted(model.tokenizer.special_ids))
        asked = (torch.rand(rows.shape, generator=random) < HIDDEN) & ~torch.isin(rows, special)
        return Batch(rows.masked_fill(asked, mask), asked, rows[asked])
    return Batch(rows)


def read(model: Loaded, batch: Batch) -> Seen:
    """What the model makes of a batch."""
    net: Any = model.net
    blocks = {name: list(net.get_submodule(name).blocks) for name in STACKS[model.kind]}
    name = None if model.kind == "seq2seq" else head_at(net, None)
    mask = None
    if name is not None and batch.given.ndim == 2:
        mask = model.global_tokens(name, Inputs(batch.given, None, None))

    def run() -> Tensor:
        if batch.target is not None:
            return net.states(batch.target, net.encode(batch.given))
        return net(batch.given) if mask is None else net(batch.given, mask=mask)

    outputs, x = leaving(run, [block for each in blocks.values() for block in each])
    layers = {}
    for stack, each in blocks.items():
        layers[stack], outputs = outputs[: len(each)], outputs[len(each) :]
    if model.kind == "seq2seq":
        return Seen(layers, x.flatten(0, 1), lambda part: net.head_of(part[None])[0])
    if name is None:
        return Seen(layers, x[:0], None)
    if batch.asked is not None:  # one token at a time: all heads with labels here read each by itself
        return Seen(layers, x[batch.asked], lambda part: net.head(name, part[None])[0])
    whole = net.head(name, x, batch.given, None) if batch.given.ndim == 2 else net.head(name, x)
    whole = whole.mT if name == "spans" else whole  # there a token is chosen, twice
    return Seen(layers, whole.flatten(0, -2), lambda part: part)
