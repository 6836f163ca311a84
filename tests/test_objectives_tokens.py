"""Claims about what is hidden from a text, and what a model is asked about it: masked, span, fim, causal, seq2seq."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway import models, objectives
from headway.data.batches import IGNORE, Packed
from headway.data.examples import Example
from headway.objectives import Base, _nats, _tools
from headway.objectives._tools import Tools
from headway.text import EOS, TokenizerSpec

TEXTS = [
    "the quick brown fox jumps over the lazy dog, and the dog does not mind",
    "def answer(question):\n    return 42  # which it is\n",
    "a rose is a rose is a rose",
    "colourless green ideas sleep furiously, or so they say; h\u00e9 \u4e16\u754c",
    "to be or not to be: that is the question",
    "x = [i ** 2 for i in range(10)]\nprint(x)\n",
]
STACK = {"positions": {"name": "rotary"}, "blocks": [{"mixer": {"name": "attention", "heads": 2}, "feedforward": {}}]}
LOOK = {"name": "attention", "heads": 2}
KINDS: dict[str, dict[str, Any]] = {
    "encoder": {"kind": "encoder", "width": 32, "stack": STACK},
    "decoder": {"kind": "decoder", "width": 32, "stack": STACK},
    "seq2seq": {
        "kind": "seq2seq",
        "width": 32,
        "encoder": STACK,
        "decoder": {"positions": {"name": "rotary"}, "blocks": [{"mixer": LOOK, "cross": LOOK, "feedforward": {}}]},
    },
}
CASES = {
    "causal": {"name": "causal"},
    "masked": {"name": "masked", "rate": 0.3},
    "masked_packed": {"name": "masked", "pack": True, "whole_word": True},
    "span": {"name": "span", "rate": 0.3},
    "fim": {"name": "fim"},
    "seq2seq": {"name": "seq2seq"},
}


def made(case: str | dict[str, Any], kind: str = "bpe", max_tokens: int = 56) -> tuple[Base, Tools, list[Example]]:
    """The objective, what it learned of TEXTS, and all of them as examples."""
    objective: Base = objectives.build(CASES[case] if isinstance(case, str) else case)
    rows = [(text, text[::-1]) if len(objective.columns()) == 2 else (text,) for text in TEXTS]
    spec = TokenizerSpec(kind, 300 if kind == "bpe" else None)  # type: ignore[arg-type]
    tools = _tools.learn(objective.columns(), objective.EXTRA, rows, (spec, spec), max_tokens=max_tokens, start=None)
    objective.ready(tools)
    return objective, tools, [example for row in rows for example in objective.encode(row, tools)]


def model_of(objective: Base, tools: Tools) -> nn.Module:
    torch.manual_seed(0)
    return models.build(objective.spec(KINDS[objective.KINDS[0]], tools)).eval()


def batch_of(objective: Base, examples: Sequence[Example], seed: int = 0, rows: Any = None) -> Any:
    """One batch of all examples, each in a row of its own unless `rows` says otherwise."""
    random = np.random.default_rng(seed)
    if isinstance(objective.batches(examples, sizes_of(objective, examples), tokens=4096, length=64, seed=0), Packed):
        rows = [[example] for example in examples] if rows is None else rows
        collate = getattr(objective, "_rows", objective.collate)
        return collate(rows, random)
    return objective.collate(examples, random)


def sizes_of(objective: Base, examples: Sequence[Example]) -> np.ndarray:
    return np.array([objective.sizes(example) for example in examples])


def widened(batch: Any, by: int = 3) -> Any:
    """The same batch with columns of padding, which hold something else than padding does."""

    def grow(x: Tensor, value: Any) -> Tensor:
        return F.pad(x, (0, by), value=value)

    if hasattr(batch, "source"):
        valid = torch.ones_like(batch.source, dtype=torch.bool) if batch.source_valid is None else batch.source_valid
        return replace(
            batch,
            source=grow(batch.source, 5),
            source_valid=grow(valid, False),
            target_in=grow(batch.target_in, 5),
            target_out=grow(batch.target_out, IGNORE),
        )
    valid = torch.ones_like(batch.ids, dtype=torch.bool) if batch.valid is None else batch.valid
    packed = {} if batch.segments is None else {"segments": grow(batch.segments, -1), "pos": grow(batch.pos, -1)}
    return replace(batch, ids=grow(batch.ids, 5), labels=grow(batch.labels, IGNORE), valid=grow(valid, False), **packed)


# every objective


@pytest.mark.parametrize("case", CASES)
def test_one_batch_is_learned_by_heart(case: str) -> None:
    objective, tools, examples = made(case)
    net = model_of(objective, tools).train()
    batch = batch_of(objective, examples[:2])
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-2)
    first = None
    for _ in range(80):
        loss = objective(net, batch)
        first = first or float(loss.plain) / loss.tokens
        (loss.total / batch.targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    last = float(objective(net.eval(), batch).plain) / batch.targets
    assert first is not None and first > 2 and last < 0.1, (first, last)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_that_of_each_target_by_itself(case: str) -> None:
    objective, tools, examples = made(case)
    net = model_of(objective, tools)
    batch = batch_of(objective, examples)
    by_hand, count = 0.0, 0
    for row in range(len(examples)):
        if hasattr(batch, "source"):
            there = slice(None) if batch.source_valid is None else batch.source_valid[row]
            end = int((batch.target_out[row] != IGNORE).sum())
            logits = net(batch.source[row][there][None], batch.target_in[row, :end][None])[0]
            labels = batch.target_out[row, :end]
        else:
            there = slice(None) if batch.valid is None else batch.valid[row]
            logits = net.head("lm", net(batch.ids[row][there][None]))[0]  # type: ignore[operator]
            labels = batch.labels[row][there]
        for at, label in enumerate(labels.tolist()):
            if label != IGNORE:
                by_hand -= float(logits[at].log_softmax(0)[label])
                count += 1
    loss = objective(net, batch)
    assert loss.tokens == batch.targets == count > 0
    assert float(loss.plain) == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_padding_changes_nothing(case: str) -> None:
    objective, tools, examples = made(case)
    net = model_of(objective, tools)
    batch = batch_of(objective, examples)
    assert float(objective(net, widened(batch)).plain) == pytest.approx(float(objective(net, batch).plain), rel=1e-6)


@pytest.mark.parametrize("case", ["causal", "masked_packed", "fim"])
def test_texts_in_one_row_do_not_see_each_other(case: str) -> None:
    objective, tools, examples = made(case)
    net = model_of(objective, tools)
    examples = examples[:4]
    packed = batch_of(objective, examples, rows=[examples[:3], examples[3:]])
    assert packed.segments is not None and packed.ids.shape[0] == 2
    apart = batch_of(objective, examples)
    assert packed.targets == apart.targets
    assert torch.equal(packed.labels[packed.labels != IGNORE], apart.labels[apart.labels != IGNORE])
    assert float(objective(net, packed).plain) == pytest.approx(float(objective(net, apart).plain), rel=1e-6)


@contextlib.contextmanager
def nothing(part: int) -> Iterator[None]:
    yield


def halves(batch: Any) -> list[Any]:
    """The same rows as two micro-batches, of 2 and of the rest."""
    found = []
    for part in (slice(0, 2), slice(2, None)):
        cut = {k: v[part] for k, v in vars(batch).items() if isinstance(v, Tensor)}
        labels = cut.get("labels", cut.get("target_out"))
        assert labels is not None
        found.append(replace(batch, **cut, targets=int((labels != IGNORE).sum())))
    return found


@pytest.mark.parametrize("case", CASES)
def test_micro_batches_are_one_batch(case: str) -> None:
    objective, tools, examples = made(case)
    net = model_of(objective, tools).double()
    batch = batch_of(objective, examples)
    grads = []
    for batches in ([batch], halves(batch)):
        net.zero_grad(set_to_none=True)
        plain, count = objective.backward(net, batches, float(batch.targets), nothing)
        assert count == batch.targets
        grads.append((plain, [p.grad.clone() for p in net.parameters() if p.grad is not None]))
    assert grads[0][0] == pytest.approx(grads[1][0], rel=1e-6)
    for one, other in zip(grads[0][1], grads[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_a_batch_is_a_function_of_seed_and_step(case: str) -> None:
    objective, _, examples = made(case)
    one, other = (
        objective.batches(examples, sizes_of(objective, examples), tokens=128, length=64, seed=3) for _ in range(2)
    )
    other.batch(5)  # what was asked for before does not matter
    first, again = one.batch(2), other.batch(2)
    for name, value in vars(first).items():
        if isinstance(value, Tensor):
            assert torch.equal(value, getattr(again, name)), name


# masked


def masked(examples: int = 400, **options: Any) -> tuple[Any, Tools, Tensor, Tensor, Tensor]:
    """Before, after and labels of many texts, all in one row."""
    objective, tools, found = made({"name": "masked", **options})
    random = np.random.default_rng(0)
    rows = [found[i % len(found)] for i in range(examples)]
    hidden = [objective.hide(example, random) for example in rows]  # type: ignore[attr-defined]
    before = np.concatenate([np.asarray(example[0]) for example in rows])
    after, labels = (np.concatenate([pair[i] for pair in hidden]) for i in (0, 1))
    return objective, tools, torch.from_numpy(before), torch.from_numpy(after), torch.from_numpy(labels)


def test_the_stated_shares_are_hidden_swapped_and_kept() -> None:
    objective, tools, before, after, labels = masked(4000)
    gap = labels != IGNORE
    ordinary = torch.isin(before, torch.from_numpy(tools.ordinary))
    assert float(gap[ordinary].float().mean()) == pytest.approx(0.15, abs=0.004)
    assert not gap[~ordinary].any(), "specials are never hidden"
    assert torch.equal(labels[gap], before[gap]) and torch.equal(after[~gap], before[~gap])
    share = lambda those: float(those[gap].float().mean())
    assert share(after == objective.hidden) == pytest.approx(0.8, abs=0.015)
    assert share((after != objective.hidden) & (after != before)) == pytest.approx(0.1, abs=0.01)
    assert share(after == before) == pytest.approx(0.1, abs=0.01)
    assert torch.isin(after[gap & (after != objective.hidden)], torch.from_numpy(tools.ordinary)).all()


@pytest.mark.parametrize("kind", ["bpe", "characters"])
def test_whole_words_are_hidden_whole(kind: str) -> None:
    objective, _, examples = made({"name": "masked", "whole_word": True}, kind)
    random, shares, split = np.random.default_rng(0), [], 0
    for i in range(3000):
        example = examples[i % len(examples)]
        words, gap = np.asarray(example[1]), objective.hide(example, random)[1] != IGNORE  # type: ignore[attr-defined]
        for word in np.unique(words[words >= 0]):
            assert len(set(gap[words == word])) == 1, "a word half hidden"
            split += (words == word).sum() > 1
        shares.append(gap[words >= 0].mean())
    assert split > 1000, "words of several tokens are among them"
    assert 0.14 < np.mean(shares) < 0.19, "the share of tokens; one word at least is hidden in the shortest texts"


def test_a_word_is_what_stands_between_spaces() -> None:
    _, tools, _ = made({"name": "masked"}, "characters")
    ids, words = tools.words("to be, or")
    assert words == [-1, 0, 0, 1, 2, 2, 2, 3, 4, 4, -1] and len(ids) == len(words)


def test_static_gaps_stay_and_dynamic_ones_move() -> None:
    gaps: dict[int, list[Tensor]] = {}
    for static in (0, 2):
        objective, _, examples = made({"name": "masked", "static": static})
        assert len(examples) == len(TEXTS) * max(1, static)
        gaps[static] = [batch_of(objective, examples, seed=seed).labels for seed in (1, 2)]
        if static:
            assert not torch.equal(gaps[2][0][0], gaps[2][0][1]), "two copies of a text have gaps of their own"
    assert torch.equal(*gaps[2]) and not torch.equal(*gaps[0])


def test_a_text_always_has_a_gap() -> None:
    objective, _, examples = made({"name": "masked", "rate": 0.001})
    assert all((labels != IGNORE).any() for labels in batch_of(objective, examples).labels)


# span


def test_sentinels_give_the_text_back() -> None:
    objective, _, examples = made("span")
    sentinels = objective.sentinels.tolist()  # type: ignore[attr-defined]
    for seed in range(200):
        random = np.random.default_rng(seed)
        for (ids,) in examples:
            source, target = (side.tolist() for side in objective.cut(np.asarray(ids), random))  # type: ignore[attr-defined]
            assert source[-1] == target[-1] == EOS
            assert (len(source), len(target)) == objective.sizes((ids,))
            spans: dict[int, list[int]] = {}
            for token in target[:-1]:
                if token in sentinels:
                    spans[token] = []
                else:
                    spans[list(spans)[-1]].append(token)
            assert list(spans) == sentinels[: len(spans)], "in their order"
            assert all(spans[s] for s in list(spans)[:-1]) and not spans[list(spans)[-1]], "one closes"
            back = [t for token in source[:-1] for t in spans.get(token, [token])]
            assert back == list(ids)


def test_spans_have_the_stated_mean_and_share() -> None:
    objective, _, _ = made("span")
    objective.rate, objective.mean = 0.15, 3.0  # type: ignore[attr-defined]
    ids, random = np.arange(9000, 9400), np.random.default_rng(0)
    where = np.zeros(400)
    lengths: list[int] = []
    for _ in range(300):
        _, target = objective.cut(ids, random)  # type: ignore[attr-defined]
        gone = np.isin(ids, target)
        where += gone
        edges = np.flatnonzero(np.diff(np.concatenate([[0], gone.astype(int), [0]])))
        lengths += (edges[1::2] - edges[::2]).tolist()
        assert gone.sum() == 60
    assert np.mean(lengths) == pytest.approx(3.0) and max(lengths) > 8, "20 spans of 60 tokens"
    assert (where / 300).std() < 0.03 and where[0] > 15 and where[-1] > 15, "anywhere, the ends too"


def test_too_few_sentinels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"max_tokens=4000 makes 200 spans a text, and there are 100 sentinels: lower"):
        made({"name": "span"}, max_tokens=4000)


# fim


@pytest.mark.parametrize("kind", ["bpe", "characters"])
@pytest.mark.parametrize("spm", [0.0, 1.0])
def test_a_rearranged_text_is_the_text(kind: str, spm: float) -> None:
    objective, tools, examples = made({"name": "fim", "rate": 1.0, "spm": spm}, kind, max_tokens=128)
    assert len(examples) == len(TEXTS)
    marks = [tools.extra[name] for name in objective.EXTRA]
    cuts = set()
    for seed in range(100):
        random = np.random.default_rng(seed)
        for text, example in zip(TEXTS, examples, strict=True):
            ids = objective.arrange(example, random)  # type: ignore[attr-defined]
            assert ids[1] == marks[0] and ids[-1] == EOS and len(ids) <= 129
            at = [ids.index(mark) for mark in marks]
            parts = [
                tools.text(ids[at[0] + 1 : at[1]]),
                tools.text(ids[at[1] + 1 : at[2]]),
                tools.text(ids[at[2] + 1 :]),
            ]
            if spm:
                assert at[1] == at[0] + 1 and parts[2] + parts[1] == text, "prefix and middle are one"
                cuts.add(len(parts[2]))
            else:
                assert parts[0] + parts[2] + parts[1] == text
                cuts.add(len(parts[0]))
    assert len(cuts) > 40, "cut anywhere"


def test_the_stated_share_is_rearranged_and_the_rest_is_plain() -> None:
    objective, tools, examples = made({"name": "fim", "rate": 0.3}, max_tokens=128)
    random = np.random.default_rng(0)
    found = [objective.arrange(examples[i % 3], random) for i in range(3000)]  # type: ignore[attr-defined]
    turned = [tools.extra["<fim_prefix>"] in ids for ids in found]
    assert np.mean(turned) == pytest.approx(0.3, abs=0.03)
    assert {tools.text(ids) for ids, yes in zip(found, turned, strict=True) if not yes} == set(TEXTS[:3])


def test_long_texts_are_cut_and_nothing_is_lost() -> None:
    objective, tools, examples = made({"name": "fim", "rate": 0.0}, max_tokens=32)
    assert len(examples) > len(TEXTS)
    assert all(objective.sizes(example)[0] <= 32 for example in examples)
    ids = [i for example in examples for i in objective.arrange(example, np.random.default_rng(0))]  # type: ignore[attr-defined]
    assert tools.text([i for i in ids if i != EOS]) == "".join(TEXTS)


def test_a_tokenizer_that_loses_text_is_refused() -> None:
    with pytest.raises(ValueError, match="is not what this tokenizer gives back"):
        made("fim", "whitespace")


# refusals


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"name": "masked", "rate": 0.0}, "objective.rate is the share of hidden tokens, above 0 and below 1, not 0.0"),
        ({"name": "masked", "mask": 0.8, "swap": 0.3}, "1 together at most: 0.8, 0.3"),
        ({"name": "span", "mean": 0.5}, "not 0.15 and 0.5"),
        ({"name": "fim", "rate": 2.0}, "objective.rate and spm are shares from 0 to 1"),
        ({"name": "masked", "rat": 0.2}, "did you mean 'rate'"),
    ],
)
def test_wrong_options_are_one_line(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError) as fault:
        objectives.build(options)
    assert reason in str(fault.value) and "\n" not in str(fault.value)


@torch.no_grad()
def test_label_smoothing_is_a_share_of_the_uniform() -> None:
    objective, tools, examples = made({"name": "seq2seq", "smoothing": 0.2})
    net = model_of(objective, tools)
    batch = batch_of(objective, examples)
    logits, labels = objective.predict(net, batch)
    by_hand = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.2)
    loss = objective(net, batch)
    torch.testing.assert_close(loss.total, by_hand)
    assert math.isfinite(float(loss.plain)) and float(loss.plain) != pytest.approx(float(loss.total))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_likelihood_of_many_logits_is_cross_entropy(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_nats, "AT_ONCE", 3 * 50)  # rows go through in parts, the last of them smaller
    random = torch.Generator().manual_seed(0)
    logits = (10 * torch.randn(17, 50, generator=random)).to(dtype).requires_grad_()
    labels = torch.randint(50, (17,), generator=random)
    labels[[3, 16]] = IGNORE
    found, wanted = _nats.nats(logits, labels), F.cross_entropy(logits.float(), labels, reduction="sum")
    torch.testing.assert_close(found, wanted)
    own, expected = (torch.autograd.grad(0.5 * loss, logits)[0] for loss in (found, wanted))
    torch.testing.assert_close(own, expected)
    with pytest.raises((IndexError, RuntimeError)):
        _nats.nats(logits, labels + 50)
