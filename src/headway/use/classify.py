"""Classify: what a text or a picture is, what each word of a text is, or which label of yours a picture is like.

Sequences: softmax over the labels, or a sigmoid each where several may hold. Words: the label of a word's first token,
neighbours of one label together (B-, I-). Two towers: softmax of the picture's scores with each label's text (CLIP).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from headway.loaded import Loaded
from headway.models import reads_pictures
from headway.use.embed import embed
from headway.use.passes import Group, Watch, compute, groups, listed, passes, pictures, strings
from headway.vocabulary import PublishedTokenizer

TEMPLATE = "a photo of a {}"


class Classified(NamedTuple):
    """The likeliest label, its probability, and those of all labels, the likeliest first."""

    label: str
    probability: float
    probabilities: dict[str, float]


class Span(NamedTuple):
    """Words of one label: text[start:end], in characters, and the mean probability of the label."""

    label: str
    text: str
    start: int
    end: int
    probability: float


def classify(
    model: Loaded,
    inputs: Any,
    labels: Sequence[str] | None = None,
    *,
    top: int | None = None,
    template: str = TEMPLATE,
    truncate: bool = False,
    watch: Watch | None = None,
) -> list[Classified] | list[list[Span]]:
    """See `headway.hub.Loaded.classify`."""
    if top is not None and (type(top) is not int or top < 1):
        raise ValueError(f"classify: top is how many labels, 1 or more, not {top!r}")
    if model.kind == "dual":
        if labels is None:
            raise ValueError("classify: a model with two towers has no labels of its own: give labels=['cat', 'dog']")
        return _by_labels(model, inputs, labels, template, top, truncate, watch)
    if labels is not None:
        raise ValueError(f"classify: labels are for models with two towers; this {model.kind} model has its own")
    heads = getattr(model.net, "heads", {})
    if "classify" in heads:
        return _sequences(model, inputs, top, truncate, watch)
    if "tokens" in heads:
        if top is not None:
            raise ValueError("classify: a word has the one label that is likeliest: leave out top")
        return _words(model, strings(inputs, "classify"), truncate, watch)
    there = f"its heads are {', '.join(heads)}" if len(heads) else "it has no head"
    raise ValueError(f"classify needs a head 'classify' or 'tokens' ({there}): load a model that was trained to")


def _sequences(model: Loaded, inputs: Any, top: int | None, truncate: bool, watch: Watch | None) -> list[Classified]:
    names, kind = names_of(model, "classify"), model.facts.original.get("problem_type")
    if kind == "regression":
        raise ValueError("classify: this model gives a number and no classes: model.logits(texts) is that number")
    several = kind == "multi_label_classification" or len(names) == 1
    found: dict[int, Classified] = {}
    for rows, logits in _logits(model, inputs, truncate, watch):
        shares = logits.float().sigmoid() if several else logits.float().softmax(-1)
        found.update(zip(rows, (_named(names, row, top) for row in shares), strict=True))
    return [found[i] for i in range(len(found))]


def _logits(
    model: Loaded, inputs: Any, truncate: bool, watch: Watch | None
) -> Iterator[tuple[list[int], Float[Tensor, "B O"]]]:
    if reads_pictures(model.kind):
        for rows, pixels in pictures(model, inputs, "classify", watch=watch):
            yield rows, compute(model.net.head, "classify", compute(model.net, pixels))
        return
    inputs = listed(inputs, "classify")
    if any(isinstance(one, tuple) for one in inputs):
        found = _pairs(model, inputs, truncate, watch)
    else:
        found = groups(model, strings(inputs, "classify"), task="classify", truncate=truncate, watch=watch)
    for group in found:
        yield group.rows, compute(model.net.head, "classify", group.hidden, group.ids, group.valid)


def _pairs(model: Loaded, inputs: list[Any], truncate: bool, watch: Watch | None) -> Iterator[Group]:
    """The hidden states of pairs of texts."""
    rows, types = [], []
    for i, pair in enumerate(inputs):
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise ValueError(f"classify: input {i} is no pair, and others are: give (one, other) each time")
        one, other = strings(pair, "classify")
        found = model.tokenizer.encode(one, other)
        ids, kinds = model.fitted(found.ids, found.types, one, truncate)
        rows.append(ids)
        types.append(kinds)
    yield from passes(model, rows, types, task="classify", watch=watch)


def _named(names: Sequence[str], shares: Float[Tensor, " O"], top: int | None) -> Classified:
    best = shares.sort(descending=True, stable=True)
    pairs = [(names[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    return Classified(*pairs[0], dict(pairs[:top]))


def names_of(model: Loaded, head: str) -> list[str]:
    """The labels of a head; LABEL_0, LABEL_1, ... where it has none."""
    spec = model.net.heads[head].spec
    return list(spec.labels) or [f"LABEL_{i}" for i in range(spec.outputs)]


@torch.inference_mode()
def _by_labels(
    model: Loaded,
    images: Any,
    labels: Sequence[str],
    template: str,
    top: int | None,
    truncate: bool,
    watch: Watch | None,
) -> list[Classified]:
    """Pictures by how alike they and each label's text are."""
    names = strings(labels, "classify: labels")
    if len(set(names)) < len(names):
        raise ValueError("classify: a label stands twice among labels: name each once")
    if template.count("{}") != 1:
        raise ValueError(
            f"classify: a template has one {{}} for the label, and {template!r} has {template.count('{}')}"
        )
    texts = embed(model, [template.replace("{}", name) for name in names], truncate=truncate)
    net, found = model.net, []
    for _, pixels in pictures(model, images, "classify", watch=watch):
        scores = net.scores(net.project("image", pixels).float(), texts)
        found += [_named(names, row, top) for row in scores.float().softmax(-1)]
    return found


# --- words


@torch.inference_mode()
def _words(model: Loaded, texts: list[str], truncate: bool, watch: Watch | None) -> list[list[Span]]:
    names, found = names_of(model, "tokens"), {}
    for group in groups(model, texts, task="tokens", truncate=truncate, watch=watch):
        shares = model.net.head("tokens", group.hidden, group.ids, group.valid).float().softmax(-1)
        best = shares.max(-1)
        for row, ids, labels, probabilities in zip(
            group.rows, group.ids.tolist(), best.indices.tolist(), best.values.tolist(), strict=True
        ):
            found[row] = spans_of(model, texts[row], ids, [names[i] for i in labels], probabilities)
    return [found[i] for i in range(len(texts))]


def spans_of(model: Loaded, text: str, ids: list[int], labels: list[str], probabilities: list[float]) -> list[Span]:
    """Neighbouring words of one label as one span; those outside ("O") are left out."""
    spans: list[tuple[str, list[tuple[int, int, float]]]] = []
    last = ""
    for start, end, token in words(model.tokenizer, text, ids):
        begins, label = tag(labels[token])
        if label == last and not begins:
            spans[-1][1].append((start, end, probabilities[token]))
        else:
            spans.append((label, [(start, end, probabilities[token])]))
        last = label
    return [
        Span(label, text[parts[0][0] : parts[-1][1]], parts[0][0], parts[-1][1], sum(p for *_, p in parts) / len(parts))
        for label, parts in spans
        if label != "O"
    ]


def words(tokenizer: PublishedTokenizer, text: str, ids: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Each word of a text that was read as `ids`: start and end in characters, and its first token's index.

    A token continues a word where WordPiece marks it so ("##"), elsewhere where letters or digits touch.
    """
    found, mark = tokenizer.encode(text), tokenizer.continues
    spelt = tokenizer.tokens(found.ids)
    same = (one == two for one, two in zip(found.ids, ids, strict=False))
    kept = sum(takewhile(bool, same))  # of a text that was cut, the mark of its end took a token's place
    start = end = first = -1
    for i, ((left, right), of) in enumerate(zip(found.offsets[:kept], found.sequence, strict=False)):
        if of is None or left == right:
            continue
        while left < right and text[left].isspace():  # byte-level pieces hold the space before them
            left += 1
        if left == right:  # a space alone
            continue
        touches = left == end and text[left - 1].isalnum() and text[left : left + 1].isalnum()
        if first >= 0 and (spelt[i].startswith(mark) if mark else touches):
            end = right
            continue
        if first >= 0:
            yield start, end, first
        start, end, first = left, right, i
    if first >= 0:
        yield start, end, first


def tag(label: str) -> tuple[bool, str]:
    """Whether a label says that something begins, and what it is: "B-PER" is a PER that begins."""
    found = re.fullmatch(r"([BISELU])-(.+)", label)
    return (found[1] in "BSU", found[2]) if found else (False, label)
