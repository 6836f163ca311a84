"""Claims about training from end to end: what is trained can be used, what is published can be trained on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import vocabularies
from published import TINY, oracle
from shell import Headway
from test_objectives_tokens import KINDS, TEXTS

import headway
from headway.objectives._probe import accuracy, words
from headway.objectives.causal import compressed
from headway.objectives.distill import divergence
from headway.objectives.fim import Gap, followed, lines
from headway.recipe import built_in, read
from headway.train.data import prepare
from headway.train.network import network, spec_of


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts with labels, as a file."""
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    rows = [{"text": f"{text} {i}", "label": "odd" if i % 2 else "even"} for i in range(20) for text in TEXTS]
    path.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    return path


def task(source: Path, objective: dict[str, Any], kind: str, **changed: Any) -> dict[str, Any]:
    loaded = "load" in changed.get("model", {})  # which brings a tokenizer of its own
    return {
        "data": {"source": str(source)},
        "tokenizers": {} if loaded else {"input": {"kind": "bpe", "vocab": 300}},
        "budget": {"steps": 3},
        "batch_tokens": 256,
        "max_tokens": 64,
        "precision": "fp32",
        "evaluations": 1,
        "optimizer": {"name": "adamw", "lr": 1e-2, "warmup": 5},
        "test_limit": 4,
        "objective": objective,
        "model": KINDS[kind],
        **changed,
    }


# what was trained is used like what was downloaded


def test_a_trained_decoder_goes_on_from_a_text(texts: Path, tmp_path: Path, run: Headway) -> None:
    result = headway.train(task(texts, {"name": "causal"}, "decoder", budget={"steps": 20}), out=tmp_path / "run")
    assert result["use"] == 'generate {} "TEXT"'
    assert result["bits_per_byte"] < 8 and result["bits_per_byte_xz_baseline"] > 0
    model = headway.load(tmp_path / "run")
    found = model.generate(["a rose"], max_tokens=8)[0]
    assert 0 < len(found.ids) <= 8
    assert "".join(model.stream("a rose", max_tokens=8)) == found.text
    ids = torch.tensor([model.tokenizer.encode("a rose").ids[:-1]])
    assert found.ids[0] == int(model.logits(ids)[0, -1].argmax()), "behind <bos> a rose, as in training"
    done = run("generate", tmp_path / "run", "a rose", "-n", 8)
    assert done.code == 0 and done.out.rstrip("\n") == found.text.rstrip("\n")


def test_a_trained_encoder_fills_gaps(texts: Path, tmp_path: Path, run: Headway) -> None:
    objective = {"name": "masked", "probe": True}
    result = headway.train(task(texts, objective, "encoder", budget={"steps": 100}), out=tmp_path / "run")
    assert result["use"] == 'fill {} "This is a <mask>."'
    assert result["fill_perplexity"] < 150, "of 300 tokens"
    assert 0 <= result["fill_accuracy"] <= 1 and result["fill_accuracy_baseline"] > 0
    assert result["probe_labels"] == 2 and 0 <= result["probe_accuracy"] <= 1
    model = headway.load(tmp_path / "run")
    (gap,) = model.fill("a rose is a <mask> is a rose", top=3)
    assert len(gap) == 3 and gap[0].text.startswith("a rose is a ") and gap[0].text.endswith(" is a rose")
    assert "  " not in gap[0].text, "the mask takes the space that is a part of a word"
    done = run("fill", tmp_path / "run", "a rose is a <mask> is a rose", "--top", 3)
    assert done.code == 0 and len(done.out.splitlines()) == 3
    assert model.embed(["a rose"], pooling="mean").shape == (1, 32)


@pytest.mark.parametrize(
    ("objective", "kind", "metric"),
    [({"name": "span"}, "seq2seq", "span_accuracy"), ({"name": "fim"}, "decoder", "bits_per_byte")],
)
def test_the_others_train_and_load(
    texts: Path, tmp_path: Path, objective: dict[str, Any], kind: str, metric: str
) -> None:
    result = headway.train(task(texts, objective, kind, workers=0), out=tmp_path / "run")
    assert math.isfinite(result[metric]) and metric in result["metrics"]
    assert headway.load(tmp_path / "run").kind == kind


def test_a_run_goes_on_under_another_objective(texts: Path, tmp_path: Path) -> None:
    headway.train(task(texts, {"name": "span"}, "seq2seq"), out=tmp_path / "span")
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("\n".join(["input\ttarget", *(f"a rose {i}\tis {i}" for i in range(60))]), "utf-8")
    recipe = task(pairs, {"name": "seq2seq"}, "seq2seq", model={"load": str(tmp_path / "span")})
    result = headway.train(recipe, out=tmp_path / "pairs")
    assert math.isfinite(result["wer"])
    assert headway.load(tmp_path / "pairs").generate(["a rose 3"])[0].text is not None


def test_workers_make_the_same_batches(texts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    losses = []
    for workers in (0, 2):
        out = tmp_path / str(workers)
        headway.train(task(texts, {"name": "fim", "rate": 1.0}, "decoder", workers=workers), out=out)
        losses.append([json.loads(line)["loss"] for line in (out / "log.jsonl").read_text("utf-8").splitlines()])
    assert losses[0] == losses[1]
    assert "fork" not in capfd.readouterr().err


# what was published is trained on


def published(tmp_path: Path, case: tuple[str, int], kind: str) -> tuple[Path, Any]:
    """A tiny checkpoint with a tokenizer of no more ids than it has."""
    folder = tmp_path / "published"
    vocabulary = tmp_path / "vocabulary"
    vocabulary.mkdir()
    theirs = getattr(vocabularies, kind)(vocabulary)
    import transformers

    config = type(oracle(case).config)(**{**oracle(case).config.to_dict(), "vocab_size": len(theirs) + 7})
    torch.manual_seed(0)
    model = getattr(transformers, type(oracle(case)).__name__)(config).eval()
    model.save_pretrained(folder)
    for file in vocabulary.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder, (model, theirs)


def first(name: str) -> tuple[str, int]:
    from published import label

    return next(case for case in TINY if label(case).startswith(name))


@pytest.mark.parametrize(("name", "kind"), [("T5ForCond", "t5"), ("BartForCond", "roberta")])
def test_the_loss_of_a_published_encoder_decoder_is_theirs(tmp_path: Path, name: str, kind: str) -> None:
    folder, (model, theirs) = published(tmp_path, first(name), kind)
    pairs = tmp_path / "pairs.tsv"
    rows = [(f"number {i} is given", f"it is {i} then") for i in range(40)]
    pairs.write_text("\n".join(["input\ttarget", *("\t".join(row) for row in rows)]), "utf-8")
    recipe = task(pairs, {"name": "seq2seq"}, "seq2seq", model={"load": str(folder)}, max_tokens=32)
    prepared = prepare(read(recipe))
    row = prepared.splits.train[0]
    batch = prepared.objective.collate(list(prepared.objective.encode(row, prepared.tools)), np.random.default_rng(0))
    ids, labels = theirs(row[0], return_tensors="pt").input_ids, theirs(row[1], return_tensors="pt").input_ids
    assert torch.equal(batch.source, ids) and torch.equal(batch.target_out, labels)
    with torch.no_grad():
        loss = prepared.objective(headway.load(folder).net, batch)
        expected = model(input_ids=ids, labels=labels).loss
    assert float(loss.plain) / batch.targets == pytest.approx(float(expected), rel=1e-4)
    result = headway.train(recipe, out=tmp_path / "run")
    assert math.isfinite(result["wer"])
    again = headway.load(tmp_path / "run")
    assert again.facts.family and again.generate(["number 3 is given"], max_tokens=4)[0].ids is not None


def test_the_gaps_of_a_published_encoder_are_its_own(tmp_path: Path, texts: Path) -> None:
    folder, _ = published(tmp_path, first("BertForMaskedLM"), "bert")
    recipe = task(texts, {"name": "masked", "whole_word": True}, "encoder", model={"load": str(folder)}, max_tokens=32)
    prepared = prepare(read(recipe))
    assert prepared.tools.extra["<mask>"] == headway.load(folder).tokenizer.mask
    headway.train(recipe, out=tmp_path / "run")
    assert headway.load(tmp_path / "run").fill("a rose is a [MASK]")[0][0].token


def test_what_a_checkpoint_has_no_token_for_is_refused(tmp_path: Path, texts: Path) -> None:
    folder, _ = published(tmp_path, first("GPT2LMHead"), "gpt2")
    recipe = task(texts, {"name": "fim"}, "decoder", model={"load": str(folder)}, max_tokens=32)
    with pytest.raises(ValueError, match=r"the checkpoint's tokenizer has no <fim_prefix>, which this objective needs"):
        prepare(read(recipe))
    with pytest.raises(ValueError, match=r"max_tokens is 64, and the checkpoint takes \d+: lower it"):
        prepare(read(task(texts, {"name": "causal"}, "decoder", model={"load": str(folder)})))


# distill


def test_the_divergence_is_that_of_the_paper() -> None:
    mine, theirs, t = torch.randn(5, 7), torch.randn(5, 9), 3.0
    p, q = (theirs[:, :7] / t).softmax(-1), (mine / t).softmax(-1)
    torch.testing.assert_close(divergence(mine, theirs, t), t**2 * (p * (p / q).log()).sum())
    assert float(divergence(mine, mine, t)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_a_student_hears_teacher_and_truth_in_their_shares(texts: Path, tmp_path: Path, alpha: float) -> None:
    of = {"name": "causal"}
    headway.train(task(texts, of, "decoder"), out=tmp_path / "teacher")
    objective = {"name": "distill", "teacher": str(tmp_path / "teacher"), "of": of, "alpha": alpha, "temperature": 2.0}
    student = {**KINDS["decoder"], "width": 16}
    prepared = prepare(read(task(texts, objective, "decoder", model=student)))
    batch = prepared.batches.batch(0)
    torch.manual_seed(1)
    net = network(spec_of(student, prepared), prepared.tools).eval()
    with torch.no_grad():
        loss = prepared.objective(net, batch)
        inner = prepared.objective.inner  # type: ignore[attr-defined]
        logits, labels = inner.predict(net, batch)
        told, _ = inner.predict(headway.load(tmp_path / "teacher").net, batch)
        hard = F.cross_entropy(logits, labels, reduction="sum")
        by_hand = (1 - alpha) * hard + alpha * divergence(logits, told, 2.0)
    torch.testing.assert_close(loss.total, by_hand)
    torch.testing.assert_close(loss.plain, hard)


def test_a_student_comes_near_its_teacher(texts: Path, tmp_path: Path) -> None:
    of = {"name": "masked"}
    headway.train(task(texts, of, "encoder", budget={"steps": 60}), out=tmp_path / "teacher")
    objective = {"name": "distill", "teacher": str(tmp_path / "teacher"), "of": of, "alpha": 1.0}
    student = {**KINDS["encoder"], "width": 16}
    found = []
    for steps in (1, 60):
        recipe = task(texts, objective, "encoder", model=student, budget={"steps": steps}, tokenizers={})
        found.append(headway.train(recipe, out=tmp_path / "student", overwrite=True))
    teacher = found[1]["fill_perplexity_teacher"]
    assert teacher < found[1]["fill_perplexity"] < 0.5 * found[0]["fill_perplexity"]
    assert headway.load(tmp_path / "student").fill("a rose is a <mask>")[0]


def test_a_classifier_is_distilled_too_and_its_classes_are_the_teachers(texts: Path, tmp_path: Path) -> None:
    of = {"name": "classify", "weights": "balanced", "truncate": True}
    headway.train(task(texts, of, "encoder", tokenizers={}), out=tmp_path / "teacher")
    objective = {"name": "distill", "teacher": str(tmp_path / "teacher"), "of": of}
    result = headway.train(task(texts, objective, "encoder", tokenizers={}), out=tmp_path / "student")
    assert 0 <= result["accuracy"] <= 1 and 0 <= result["accuracy_teacher"] <= 1 and "accuracy_baseline" in result
    other = tmp_path / "other.jsonl"
    other.write_text(texts.read_text("utf-8").replace("odd", "other"), "utf-8")
    with pytest.raises(ValueError, match=r"objective\.teacher tells even, odd, and the rows have even, other"):
        prepare(read(task(other, objective, "encoder", tokenizers={})))


def test_a_student_of_a_published_teacher_begins_as_that_does(tmp_path: Path) -> None:
    folder, _ = published(tmp_path, first("T5ForCond"), "t5")
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("\n".join(["input\ttarget", *(f"number {i}\tit is {i}" for i in range(60))]), "utf-8")
    objective = {"name": "distill", "teacher": str(folder), "of": {"name": "seq2seq"}}
    result = headway.train(task(pairs, objective, "seq2seq", max_tokens=32, tokenizers={}), out=tmp_path / "run")
    assert math.isfinite(result["valid_loss"])
    teacher, student = headway.load(folder), headway.load(tmp_path / "run")
    assert student.facts.start == teacher.facts.start == 0 and student.facts.eos == teacher.facts.eos
    prepared = prepare(read(task(pairs, objective, "seq2seq", max_tokens=32, tokenizers={})))
    assert prepared.batches.batch(0).target_in[:, 0].eq(0).all()


def test_a_teacher_that_cannot_be_asked_is_refused(texts: Path, tmp_path: Path) -> None:
    headway.train(task(texts, {"name": "causal"}, "decoder"), out=tmp_path / "teacher")
    teacher = str(tmp_path / "teacher")
    for of, reason in (({"name": "masked"}, "is a decoder, and this objective asks a encoder"),
                       ({"name": "causl"}, "no objective 'causl'")):  # fmt: skip
        with pytest.raises(ValueError) as fault:
            prepare(read(task(texts, {"name": "distill", "teacher": teacher, "of": of}, "encoder")))
        assert reason in str(fault.value) and "\n" not in str(fault.value)


# baselines and the probe


def test_a_compressor_is_charged_for_the_new_text_alone() -> None:
    known = " ".join(f"word{i * 7919 % 1000}" for i in range(2000)).encode()
    told = compressed(known, known[:2000])["bits_per_byte_xz_baseline"]
    fresh = compressed(b"", known[:2000])["bits_per_byte_xz_baseline"]
    assert 0 <= told < 0.2 < fresh


def test_the_probe_tells_what_can_be_told_and_guesses_the_rest() -> None:
    torch.manual_seed(0)
    labels = torch.arange(200) % 2
    x = torch.randn(200, 8)
    assert accuracy(x, labels) < 0.65
    x[:, 3] += 6 * labels
    assert accuracy(x, labels) > 0.97
    assert accuracy(words([[5 + int(label), 9] for label in labels], 12), labels) == 1.0


def test_the_line_that_follows_is_looked_up() -> None:
    gap = Gap("a = 1\nb = 2\nc = 3\na = 1", "b = 2", "\nd")
    assert followed(gap, {}) == "b = 2"
    assert followed(Gap("x\ny", "z", ""), {}) == ""
    text = "\n".join(f"value_{i} = {i}" for i in range(40))
    found = lines([(text,)], 5)
    assert len(found) == 5 and all(f"{gap.before}\n{gap.line}{gap.after}" == text for gap in found)
    assert found == lines([(text,)], 5)


@pytest.mark.long
@pytest.mark.parametrize("name", ["code", "fill", "prose"])
def test_the_recipe_runs_without_a_download(name: str, tmp_path: Path) -> None:
    assert name in built_in()
    tiny = ["budget.steps=2", "evaluations=1", "test_limit=4", "precision=fp32"]
    result = headway.train(name, out=tmp_path / "run", overrides=tiny)
    assert result["steps"] == 2 and any(metric.endswith("_baseline") for metric in result["metrics"] + list(result))
