"""Answers: texts through the encoder-decoders that Headway trained, in batches of nearly equal lengths."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch

from headway.data.pairs import collate
from headway.generate.search import beam, greedy
from headway.loaded import Loaded
from headway.models.seq2seq import Model
from headway.text import Tokenizer

FEW = 2**23  # multiplications of a step below which a second thread costs more to wake than it takes over


class Generation(NamedTuple):
    """One answer: its text, its tokens as ids and as text, and its log-probability in nats; that of each token where
    they were drawn one by one; and why it ended: at its own end, at a stop string, or at the limit."""

    text: str
    ids: list[int]
    tokens: list[str]
    log_probability: float
    log_probabilities: tuple[float, ...] = ()
    finish: Literal["end", "stop", "limit"] = "end"


def answer_all(
    model: Loaded, texts: Iterable[str], *, beams: int = 1, batch: int = 256, penalty: float = 1.0
) -> list[Generation]:
    """One answer for each text; see `headway.hub.Loaded.generate`."""
    if isinstance(texts, str):
        raise ValueError(f"generate takes a list of texts, not one: generate([{texts[:40]!r}])")
    if batch < 1:
        raise ValueError(f"generate: batch is 1 or more, not {batch}")
    if not 0 <= penalty < math.inf:
        raise ValueError(f"generate: penalty is a finite power of the length, 0 or more, not {penalty}")
    net, target = model.net, model.target
    if not isinstance(net, Model) or not isinstance(target, Tokenizer) or model.max_tokens is None:
        raise ValueError(f"a {model.kind} cannot answer this way; only an encoder-decoder that Headway trained can")
    texts = list(texts)
    ids = [model.encode(text) for text in texts]
    order = sorted(range(len(texts)), key=lambda i: len(ids[i]))
    answers: dict[int, Generation] = {}
    for rows in (order[i : i + batch] for i in range(0, len(order), batch)):
        inputs = collate([(ids[i], []) for i in rows])
        valid = None if inputs.source_valid is None else inputs.source_valid.to(model.device)
        source = inputs.source.to(model.device)
        limit = model.max_tokens + 1  # and the end
        with threads(model.parameters * beams * len(rows)):
            if beams == 1:
                found = greedy(net, source, valid, limit=limit)
            else:
                found = beam(net, source, valid, beams=beams, limit=limit, penalty=penalty)
        for i, (written, score) in zip(rows, found, strict=True):
            answers[i] = Generation(target.decode(written), written, target.tokens(written), score)
    return [answers[i] for i in range(len(texts))]


@contextmanager
def threads(work: int) -> Iterator[None]:
    """One thread for little work. The count is the calling thread's own, so nobody else who computes is slowed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if work < FEW else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
