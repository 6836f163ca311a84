"""Claims about contrastive training: which loss it is, that micro-batches and ranks are one batch, and its use."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.distributed as dist
from objective import gradients, learned, made
from PIL import Image
from torch import nn

import headway
from headway.objectives import build
from headway.objectives._recall import ngrams, recall
from headway.recipe import Recipe, read
from headway.train.data import Prepared

BLOCKS = [{"mixer": {"name": "attention", "heads": 2}, "feedforward": {}}]
ENCODER: dict[str, Any] = {"kind": "encoder", "width": 32, "stack": {"blocks": BLOCKS}}
VIT = {
    "kind": "vision",
    "width": 32,
    "patches": {"image": [8, 8], "patch": 4},
    "stack": {"positions": {"name": "none"}, "blocks": BLOCKS},
}
TWO = {"kind": "dual", "towers": {"letters": ENCODER, "sounds": ENCODER}}
SEEN = {"kind": "dual", "towers": {"text": ENCODER, "image": VIT}}
CASES = {
    "dropout": ({"pairs": "dropout"}, ENCODER),
    "second": ({"pairs": "second"}, ENCODER),
    "first token": ({"pairs": "second", "pooling": "first", "temperature": 0.1}, ENCODER),
    "negative": ({"pairs": "negative"}, ENCODER),
    "clip": ({"pairs": "target"}, TWO),
    "siglip": ({"pairs": "target", "loss": "sigmoid"}, TWO),
    "image": ({"pairs": "image"}, SEEN),
}


def write(folder: Path) -> Path:
    """Words of differing length, the same in capitals one letter at a time, and a word that is another."""
    draw = np.random.default_rng(0)
    words = sorted({"".join(draw.choice(list("abcdefgh"), draw.integers(2, 9))) for _ in range(160)})
    lines = ["input,target,text,second,negative,image"]
    for i, word in enumerate(words):
        Image.new("RGB", (8, 8), tuple(int(c) for c in draw.integers(0, 255, 3))).save(folder / f"{i}.png")
        other = words[(i + 80) % len(words)]
        lines.append(f"{word},{' '.join(word.upper())},{word},{word[::-1]},{other[::-1]},{i}.png")
    (folder / "rows.csv").write_text("\n".join(lines) + "\n", "utf-8")
    return folder / "rows.csv"


def recipe(source: Path, case: str, **changed: Any) -> Recipe:
    objective, model = CASES[case]
    given: dict[str, Any] = {
        "data": {"source": str(source), "held_out": 10},
        "tokenizers": {"input": {"kind": "characters"}, "target": {"kind": "whitespace"}},
        "objective": {"name": "contrastive", **objective},
        "budget": {"steps": 3},
        "batch_tokens": 700,
        "precision": "fp32",
        "optimizer": {"warmup": 2},
        "model": model,
    }
    return read({**given, **changed})


@pytest.fixture(params=CASES)
def task(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Prepared, nn.Module]:
    return request.param, *made(recipe(write(tmp_path), request.param))


def some(prepared: Prepared, first: int, last: int) -> Any:
    examples = [e for row in prepared.splits.train[first:last] for e in prepared.objective.encode(row, prepared.tools)]
    return prepared.objective.collate(examples, np.random.default_rng(0))


def test_loss_is_the_published_one(task: tuple[str, Prepared, nn.Module]) -> None:
    case, prepared, net = task
    objective, batch = prepared.objective, some(prepared, 0, 5)
    with torch.no_grad():
        sides = [side.double() for side in objective.vectors(net, batch)]  # type: ignore[attr-defined]
        found = objective(net, batch)
    assert all(torch.allclose(side.norm(dim=1), torch.ones(5).double(), atol=1e-5) for side in sides)
    by_hand = 0.0
    for i in range(5):
        if case in ("clip", "image"):
            scale = math.exp(float(net.scale.detach()))  # type: ignore[arg-type]
            for one, two in (sides, sides[::-1]):
                scores = [math.exp(scale * float(one[i] @ other)) for other in two]
                by_hand -= math.log(scores[i] / sum(scores)) / 2
        elif case == "siglip":
            for j in range(5):
                z = 10 * float(sides[0][i] @ sides[1][j]) - 10
                by_hand += math.log1p(math.exp(-z if i == j else z))
        else:
            others = [
                math.exp(float(sides[0][i] @ other) / objective.temperature) for side in sides[1:] for other in side
            ]  # type: ignore[attr-defined]
            assert len(others) == (10 if case == "negative" else 5)
            by_hand -= math.log(others[i] / sum(others))
    assert abs(float(found.total) - by_hand) < 2e-4 and found.tokens == 5


def test_one_batch_is_learned_by_heart(task: tuple[str, Prepared, nn.Module]) -> None:
    _, prepared, net = task
    assert learned(prepared, net, some(prepared, 0, 8), steps=60, rate=1e-2) < 0.1


def test_micro_batches_are_one_batch(task: tuple[str, Prepared, nn.Module]) -> None:
    _, prepared, net = task
    whole = gradients(prepared, net, [some(prepared, 0, 12)])
    parts = gradients(prepared, net, [some(prepared, 0, 4), some(prepared, 4, 5), some(prepared, 5, 12)])
    assert len(whole[1]) == len(parts[1]) and abs(whole[0] - parts[0]) < 1e-6
    scale = max(float(slope.abs().max()) for slope in whole[1])
    assert max(float((a - b).abs().max()) for a, b in zip(whole[1], parts[1], strict=True)) < 1e-6 * max(1, scale)


def test_padding_changes_nothing(task: tuple[str, Prepared, nn.Module]) -> None:
    _, prepared, net = task
    with torch.no_grad():
        together = prepared.objective.vectors(net, some(prepared, 0, 6))  # type: ignore[attr-defined]
        alone = [prepared.objective.vectors(net, some(prepared, i, i + 1)) for i in range(6)]  # type: ignore[attr-defined]
    for side, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.allclose(side, torch.cat(parts), atol=1e-5)


def test_a_text_is_paired_with_itself_under_another_dropout(tmp_path: Path) -> None:
    prepared, net = made(recipe(write(tmp_path), "dropout", model={**ENCODER, "dropout": 0.1}))
    one, two = prepared.objective.vectors(net.train(), some(prepared, 0, 6))  # type: ignore[attr-defined]
    assert 0.5 < float((one * two).sum(1).detach().min()) < 0.9999
    one, two = prepared.objective.vectors(net.eval(), some(prepared, 0, 6))  # type: ignore[attr-defined]
    assert torch.allclose(one, two, atol=1e-6)


def test_the_way_back_of_a_micro_batch_has_the_dropout_of_its_first_time(tmp_path: Path) -> None:
    prepared, net = made(recipe(write(tmp_path), "second", model={**ENCODER, "dropout": 0.2}))
    batches = [some(prepared, 0, 4), some(prepared, 4, 9)]
    found = gradients(prepared, net.train(), batches)
    net.zero_grad()
    kept = []
    for part, batch in enumerate(batches):
        torch.manual_seed(part)
        kept.append(prepared.objective.vectors(net, batch))  # type: ignore[attr-defined]
    total = prepared.objective.compare(net, [torch.cat(side) for side in zip(*kept, strict=True)])  # type: ignore[attr-defined]
    (total / 9).backward()
    wanted = [p.grad for p in net.parameters() if p.grad is not None]
    assert max(float((a - b).abs().max()) for a, b in zip(found[1], wanted, strict=True)) < 1e-5


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"loss": "sigmoid"}, "needs the scale and bias of two towers"),
        ({"pairs": "target", "temperature": 0.1}, "towers have model.scale"),
        ({"temperature": 0.0}, "above 0"),
    ],
)
def test_options_that_mean_nothing_together_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        build({"name": "contrastive", **options})


ONE_EACH, TWO_EACH = [[(0, 5)], [(5, 12)]], [[(0, 5), (5, 7)], [(7, 10), (10, 12)]]
SHARED = [("negative", TWO_EACH), ("clip", ONE_EACH), ("siglip", TWO_EACH)]


def _ranks(rank: int, source: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for case, parts in SHARED:
        prepared, net = made(recipe(Path(source), case))
        mine = [some(prepared, first, last) for first, last in parts[rank]]
        net.train()
        plain, _ = prepared.objective.backward(net, mine, 12.0, lambda part: nullcontext())
        found = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None] + [torch.tensor([plain])])
        dist.all_reduce(found)
        if rank == 0:
            torch.save(found, f"{folder}/{case}.pt")
    dist.destroy_process_group()


def test_two_ranks_with_unequally_many_rows_are_one_process(tmp_path: Path) -> None:
    source = write(tmp_path)
    torch.multiprocessing.spawn(_ranks, (str(source), str(tmp_path)), nprocs=2)
    for case, _ in SHARED:
        found = torch.load(tmp_path / f"{case}.pt", weights_only=True)
        prepared, net = made(recipe(source, case))
        plain, slopes = gradients(prepared, net, [some(prepared, 0, 12)])
        assert abs(float(found[-1]) / 12 - plain) < 1e-5
        assert float((found[:-1] - torch.cat([slope.flatten() for slope in slopes])).abs().max()) < 1e-5


def test_recall_counts_the_right_ones_among_the_best() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.8, 0.3], [0.6, 0.5, 0.4]])
    found = recall(scores, [[0], [0, 1], [2]])
    assert abs(found["recall_at_1"] - 2 / 3) < 1e-6 and found["recall_at_10"] == 1.0
    assert float(ngrams(["head way"]) @ ngrams(["Headway!"]).T) > 0.999
    assert recall(torch.zeros(1, 40), [[3]])["recall_at_10"] == 0.0  # those that are all alike are told by chance


def test_trained_towers_embed_either_side(tmp_path: Path) -> None:
    given = recipe(write(tmp_path), "clip", budget={"steps": 40}, accumulate=2)
    result = headway.train(msgspec.to_builtins(given), out=tmp_path / "run")
    assert result["recall_at_1"] > 0.8 and "recall_at_1_baseline" in result
    model = headway.load(tmp_path / "run", "cpu")
    letters, sounds = model.embed(["hade", "fab"]), model.embed(["H A D E", "F A B"], task="sounds")
    assert float((letters * sounds).sum(1).min()) > 0.5 > float(letters[0] @ sounds[1])
    with pytest.raises(ValueError, match="reads no pictures: its towers are letters, sounds"):
        model.embed([tmp_path / "0.png"])


def test_a_trained_encoder_embeds_as_it_was_trained(tmp_path: Path) -> None:
    given = recipe(write(tmp_path), "first token", budget={"steps": 10})
    headway.train(msgspec.to_builtins(given), out=tmp_path / "run")
    model = headway.load(tmp_path / "run", "cpu")
    assert (model.facts.pooling, model.facts.normalize) == ("first", True)
    assert torch.allclose(model.embed(["abc"]).norm(dim=1), torch.ones(1))


def test_trained_towers_of_pictures_and_texts_meet(tmp_path: Path) -> None:
    given = recipe(write(tmp_path), "image", budget={"steps": 3})
    result = headway.train(msgspec.to_builtins(given), out=tmp_path / "run")
    model = headway.load(tmp_path / "run", "cpu")
    assert model.embed([tmp_path / "0.png"]).shape == model.embed(["abc"]).shape
    assert model.classify([tmp_path / "0.png"], labels=["abc", "def"])[0].label in ("abc", "def")
    assert result["recall_at_1_baseline"] == 1 / result["test_candidates"]
