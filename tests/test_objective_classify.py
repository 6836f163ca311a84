"""Claims about classifying: texts, pairs, words and pictures, trained from rows and then used as any model is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from objective import gradients, learned, made
from PIL import Image
from shell import Headway
from torch import nn

import headway
from headway import models
from headway.data.batches import IGNORE
from headway.recipe import Recipe, read
from headway.train.data import Prepared, prepare

ENCODER = {
    "kind": "encoder",
    "width": 32,
    "stack": {"blocks": [{"mixer": {"name": "attention", "heads": 2}, "feedforward": {}}]},
}
VIT = {
    "kind": "vision",
    "width": 32,
    "patches": {"image": [8, 8], "patch": 4},
    "stack": {"positions": {"name": "none"}, "blocks": ENCODER["stack"]["blocks"]},  # type: ignore[index]
}
CONVNET = {"kind": "convnet", "width": 8, "image": [8, 8], "depths": [1, 1]}


def texts(folder: Path, rows: int = 120) -> Path:
    """A text says what colour it is of, in words of differing number; 3 classes, unequally many."""
    draw = np.random.default_rng(0)
    lines = ["text,second,label"]
    for i in range(rows):
        label = ["red", "red", "green", "blue"][i % 4]
        words = draw.choice(["on", "an", "in", "no"], draw.integers(1, 7)).tolist()
        words.insert(int(draw.integers(0, len(words) + 1)), label)
        lines.append(f"{' '.join(words)} {i},{label if i % 2 else 'other'} {i},{label}")
    path = folder / "texts.csv"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def tagged(folder: Path) -> Path:
    """Names behind "mr" are people, those behind "in" are places; a person may have two names."""
    draw = np.random.default_rng(1)
    lines = ["text\tlabel"]
    for i in range(120):
        name, other = draw.choice(["Lee-Ann", "Kim", "Jo", "Ada"], 2)
        place = draw.choice(["Kim", "Oslo", "Jo"])
        lines.append(f"mr {name} {other} is in {place} {i}\tO B-PER I-PER O O B-LOC O")
    path = folder / "tagged.tsv"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def recipe(source: Path | str, model: dict[str, Any], **changed: Any) -> Recipe:
    given: dict[str, Any] = {
        "data": {"source": str(source)},
        "tokenizers": {"input": {"kind": "characters"}},
        "objective": {"name": "classify"},
        "budget": {"steps": 2},
        "batch_tokens": 400,
        "precision": "fp32",
        "optimizer": {"warmup": 2},
        "model": model,
    }
    return read({**given, **changed})


KINDS = ["text", "pair", "words", "image", "convnet"]


@pytest.fixture(params=KINDS)
def task(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Prepared, nn.Module]:
    kind = request.param
    if kind in ("image", "convnet"):
        objective = {"name": "classify", "of": "image"}
        return made(recipe("digits", VIT if kind == "image" else CONVNET, objective=objective, batch_tokens=64))
    source = tagged(tmp_path) if kind == "words" else texts(tmp_path)
    return made(recipe(source, ENCODER, objective={"name": "classify", "of": kind}))


def some(prepared: Prepared, first: int, last: int) -> Any:
    """A batch of the valid rows from `first` to `last`, padded together."""
    tools, objective = prepared.tools, prepared.objective
    rows = [*prepared.splits.valid, *prepared.splits.train][first:last]
    examples = [example for row in rows for example in objective.encode(row, tools)]
    return objective.collate(examples, np.random.default_rng(0))


def test_one_batch_is_learned_by_heart(task: tuple[Prepared, nn.Module]) -> None:
    prepared, net = task
    batch = some(prepared, 0, 12)
    assert learned(prepared, net, batch, steps=80, rate=2e-2) < 0.05


def test_micro_batches_are_one_batch(task: tuple[Prepared, nn.Module]) -> None:
    prepared, net = task
    whole = gradients(prepared, net, [some(prepared, 0, 12)])
    parts = gradients(prepared, net, [some(prepared, 0, 4), some(prepared, 4, 5), some(prepared, 5, 12)])
    assert abs(whole[0] - parts[0]) < 1e-6
    assert max(float((a - b).abs().max()) for a, b in zip(whole[1], parts[1], strict=True)) < 1e-6


def test_loss_is_minus_the_log_of_what_the_head_gives_the_right_class(task: tuple[Prepared, nn.Module]) -> None:
    prepared, net = task
    batch = some(prepared, 0, 6)
    logits, labels = prepared.objective.predict(net, batch)
    by_hand = -sum(
        math.log(float(row.softmax(0)[label])) for row, label in zip(logits.detach().double(), labels, strict=True)
    )
    loss = prepared.objective(net, batch)
    assert abs(float(loss.total.detach()) - by_hand) < 1e-4 and loss.tokens == len(labels)


@pytest.mark.parametrize("kind", ["text", "pair", "words"])
def test_padding_changes_nothing(kind: str, tmp_path: Path) -> None:
    source = tagged(tmp_path) if kind == "words" else texts(tmp_path)
    prepared, net = made(recipe(source, ENCODER, objective={"name": "classify", "of": kind}))
    together = float(prepared.objective(net, some(prepared, 0, 9)).plain)
    alone = sum(float(prepared.objective(net, some(prepared, i, i + 1)).plain) for i in range(9))
    assert abs(together - alone) < 1e-4


def test_balanced_weights_count_each_class_alike(tmp_path: Path) -> None:
    objective = {"name": "classify", "weights": "balanced"}
    prepared, net = made(recipe(texts(tmp_path), ENCODER, objective=objective))
    labels = [row[1] for row in prepared.splits.train]
    weights = {name: len(labels) / (3 * labels.count(name)) for name in prepared.tools.labels}
    batch = some(prepared, 0, 8)
    logits, found = prepared.objective.predict(net, batch)
    each = nn.functional.cross_entropy(logits, found, reduction="none").detach()
    by_hand = sum(float(e) * weights[prepared.tools.labels[i]] for e, i in zip(each, found.tolist(), strict=True))
    loss = prepared.objective(net, batch)
    assert abs(float(loss.total.detach()) - by_hand) < 1e-4 and abs(float(loss.plain) - float(each.sum())) < 1e-4
    with pytest.raises(ValueError, match="blue stand on one side only"):
        prepare(recipe(texts(tmp_path), ENCODER, objective={"name": "classify", "weights": {"red": 1.0, "green": 2.0}}))


def test_a_word_is_asked_at_its_first_token_and_begins_once(tmp_path: Path) -> None:
    prepared, _ = made(recipe(tagged(tmp_path), ENCODER, objective={"name": "classify", "of": "words"}))
    [(ids, _, labels)] = prepared.objective.encode(("mr Lee-Ann Kim", "O B-PER I-PER"), prepared.tools)
    asked = {i: prepared.tools.labels[label] for i, label in enumerate(labels) if label != IGNORE}
    # <bos> mr_Lee-Ann_Kim: "Lee", "-" and "Ann" are words of their own to whom the command asks
    assert asked == {1: "O", 4: "B-PER", 7: "I-PER", 8: "I-PER", 12: "I-PER"} and len(ids) == len(labels)


def test_a_bad_row_is_told_or_skipped(tmp_path: Path) -> None:
    prepared, _ = made(recipe(tagged(tmp_path), ENCODER, objective={"name": "classify", "of": "words"}))
    for row, told in ((("two words", "O"), "2 words, and there are 1 labels"), (("one", "X"), "stands in no training")):
        with pytest.raises(ValueError, match=told):
            prepared.objective.encode(row, prepared.tools)
    prepared, _ = made(recipe(texts(tmp_path), ENCODER))
    with pytest.raises(ValueError, match="has 102 tokens, and the model takes 64: raise max_tokens, or set obj"):
        prepared.objective.encode(("x" * 100, "red"), prepared.tools)


def trained(given: Recipe, folder: Path) -> tuple[dict[str, Any], Any]:
    result = headway.train(msgspec.to_builtins(given), out=folder)
    return result, headway.load(folder, "cpu")


@pytest.mark.parametrize("kind", ["text", "pair"])
def test_a_trained_text_classifier_classifies(kind: str, tmp_path: Path, run: Headway) -> None:
    given = recipe(
        texts(tmp_path, 400), ENCODER, objective={"name": "classify", "of": kind}, budget={"steps": 60},
        tokenizers={"input": {"kind": "whitespace"}}, data={"source": str(tmp_path / "texts.csv"), "held_out": 15},
    )  # fmt: skip
    result, model = trained(given, tmp_path / "run")
    assert result["accuracy"] == 1.0 and 0 < result["accuracy_baseline"] <= 1
    one = ("on an red 3", "other 3") if kind == "pair" else "on an red 3"
    assert model.classify([one])[0].label == "red"
    done = run("classify", tmp_path / "run", "\t".join(one) if isinstance(one, tuple) else one)
    assert done.code == 0 and "\tred\t" in done.out


def test_trained_words_are_found_as_spans(tmp_path: Path) -> None:
    tokens = {"input": {"kind": "bpe", "vocab": 300}}
    given = recipe(tagged(tmp_path), ENCODER, objective={"name": "classify", "of": "words"}, budget={"steps": 150},
                   tokenizers=tokens, data={"source": str(tmp_path / "tagged.tsv"), "held_out": 15})  # fmt: skip
    result, model = trained(given, tmp_path / "run")
    assert result["span_f1"] > 0.95 > result["span_f1_baseline"]
    found = model.classify(["mr Lee-Ann Kim is in Jo 9"])[0]
    assert [(span.label, span.text) for span in found] == [("PER", "Lee-Ann Kim"), ("LOC", "Jo")]


@pytest.mark.parametrize("model", [VIT, CONVNET], ids=["vit", "convnet"])
def test_a_trained_picture_classifier_reads_files_of_any_size(model: dict[str, Any], tmp_path: Path) -> None:
    given = recipe("digits", model, objective={"name": "classify", "of": "image"}, budget={"steps": 60},
                   batch_tokens=128, data={"source": "digits", "held_out": 20})  # fmt: skip
    result, found = trained(given, tmp_path / "run")
    assert result["accuracy"] > 0.6 and result["accuracy_baseline"] > 0.9 and result["test_rows"] > 250
    row = prepare(given).splits.test[0]
    Image.fromarray(row[0]).resize((80, 80), Image.Resampling.NEAREST).save(tmp_path / "digit.png")
    assert found.classify([tmp_path / "digit.png"])[0].probabilities.keys() == set("0123456789")
    assert found.classify([row[0]])[0].label == found.classify([Image.fromarray(row[0])])[0].label


def test_pictures_of_a_folder_are_classes_by_its_folders(tmp_path: Path) -> None:
    for i in range(60):
        place = tmp_path / "data" / ("dark" if i % 2 else "light")
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9 + i % 3, 12), (i % 2 * -200 + 220,) * 3).save(place / f"{i}.png")
    given = recipe(tmp_path / "data", CONVNET, objective={"name": "classify", "of": "image"}, budget={"steps": 30},
                   batch_tokens=16, data={"source": str(tmp_path / "data"), "held_out": 20})  # fmt: skip
    result, model = trained(given, tmp_path / "run")
    assert result["accuracy"] == 1.0
    assert [one.label for one in model.classify([tmp_path / "data" / "light" / "0.png"])] == ["light"]


def test_a_convnet_sees_its_neighbours_as_a_convolution_does() -> None:
    from headway.models.convnet import Convolution

    layer, x = Convolution(3, 5, 3), torch.randn(2, 3, 7, 6)
    weight = layer.map.weight.unflatten(1, (3, 3, 3))
    wanted = nn.functional.conv2d(x, weight, layer.map.bias, padding=1)
    assert torch.allclose(layer(x), wanted, atol=1e-5)


def test_without_positions_patches_may_be_shuffled() -> None:
    spec = {**VIT, "patches": {**VIT["patches"], "positions": False}, "heads": {"classify": {"pool": "mean"}}}  # type: ignore[dict-item]
    net, x = models.build(spec), torch.randn(2, 3, 8, 8)
    shuffled = torch.cat([x[..., 4:], x[..., :4]], -1)
    one, two = (net.head("classify", net(pixels)) for pixels in (x, shuffled))  # type: ignore[operator]
    assert torch.allclose(one, two, atol=1e-5)
