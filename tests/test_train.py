"""Claims about the training loop: exact to the bit, kept to its budget, and nothing lost however a run is stopped."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import ARCHITECTURES, eight_pairs, fresh, prepared_task, task, trainer, write_pairs
from torch import Tensor, nn

import headway
from headway import objectives
from headway.data.batches import IGNORE, Order
from headway.data.pairs import Pairs
from headway.recipe import OptimizerSpec, Recipe, read
from headway.train import Interrupted, check_run, checkpoint, open_run
from headway.train.loop import Status, Trainer
from headway.train.optim import build_optimizers, set_rate

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.tsv")


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = (folder / "log.jsonl").read_text("utf-8").splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)]


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()


def weights(loop: Trainer) -> Weights:
    return {name: tensor.clone() for name, tensor in loop.model.state_dict().items()}


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# exact


def test_the_same_seed_gives_the_same_losses_to_the_bit(pairs: Path, tmp_path: Path) -> None:
    dropout = {**task(pairs)["model"], "dropout": 0.1}
    for name, seed in (("one", 3), ("again", 3), ("other", 4)):
        headway.train(task(pairs, seed=seed, model=dropout), out=tmp_path / name)
    assert len(losses(tmp_path / "one")) == 12
    assert losses(tmp_path / "one") == losses(tmp_path / "again")
    assert digest(tmp_path / "one") == digest(tmp_path / "again")
    assert losses(tmp_path / "one") != losses(tmp_path / "other")


def test_large_seeds_differ_too(pairs: Path, tmp_path: Path) -> None:
    dropout = {**task(pairs)["model"], "dropout": 0.1}
    found = []
    for seed in (2**23 - 1, 2**23 - 2):
        headway.train(task(pairs, seed=seed, model=dropout, budget={"steps": 2}), out=tmp_path / str(seed))
        found.append(losses(tmp_path / str(seed)))
    assert found[0] != found[1]


# the budget


@pytest.mark.parametrize("steps", [1, 5])
def test_a_budget_of_steps_is_kept(pairs: Path, tmp_path: Path, steps: int) -> None:
    result = headway.train(task(pairs, budget={"steps": steps}), out=tmp_path / "run")
    assert result["steps"] == steps == len(losses(tmp_path / "run"))


def test_a_budget_of_tokens_ends_with_the_batch_that_reaches_it(pairs: Path, tmp_path: Path) -> None:
    budget = 3000
    result = headway.train(task(pairs, budget={"tokens": budget}), out=tmp_path / "run")
    _, prepared = prepared_task(pairs)
    spent = [prepared.batches.batch(step).tokens for step in range(result["steps"])]
    assert sum(spent[:-1]) < budget <= sum(spent) == result["tokens"]


def test_a_budget_of_seconds_counts_training_alone(pairs: Path, tmp_path: Path) -> None:
    loop = trainer(tmp_path / "run", pairs, budget={"seconds": 0.3})
    slow = loop.valid_loss
    loop.valid_loss = lambda batches: (time.sleep(0.2), slow(batches))[1]  # type: ignore[method-assign]
    loop.fit()
    spent = [json.loads(line)["seconds"] for line in (tmp_path / "run" / "log.jsonl").read_text("utf-8").splitlines()]
    assert spent[-1] >= 0.3 and all(seconds < 0.3 for seconds in spent[:-1])
    assert len(spent) > 1 and loop.progress.evaluations > 1


# stopping and going on


def stop_at(step: int, number: int) -> Callable[[Status], None]:
    def watch(status: Status) -> None:
        if status.step == step:
            os.kill(os.getpid(), number)

    return watch


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on_to_the_same_bits(pairs: Path, tmp_path: Path, name: str, number: int) -> None:
    changed: dict[str, Any] = {
        "optimizer": {"name": name, "warmup": 4},
        "model": {**ARCHITECTURES["rnn_attention"], "dropout": 0.1},
    }
    whole = trainer(tmp_path / "whole", pairs, **changed)
    whole.fit()
    stopped = trainer(tmp_path / "stopped", pairs, **changed)
    stopped.watch = stop_at(7, number)
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as stop:
        stopped.fit()
    assert stop.value.terminated == (number == signal.SIGTERM)
    assert signal.getsignal(number) == before, "the signal is handed back"
    assert stopped.progress.step == 7
    resumed = trainer(tmp_path / "stopped", pairs, **changed)
    assert resumed.resume()
    assert same(weights(resumed), weights(stopped)), "the very weights at which it stopped"
    resumed.fit()
    assert same(weights(whole), weights(resumed))
    assert losses(tmp_path / "whole") == losses(tmp_path / "stopped")
    assert whole.progress.curve[-1]["loss"] == resumed.progress.curve[-1]["loss"]
    assert [p["valid_loss"] for p in whole.progress.curve] == [p["valid_loss"] for p in resumed.progress.curve]


def environment() -> dict[str, str]:
    source = str(Path(headway.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}


def test_a_log_without_a_checkpoint_is_begun_anew(pairs: Path, tmp_path: Path) -> None:
    """A run killed while it wrote its first checkpoint has a log already."""
    (tmp_path / "log.jsonl").write_text('{"step": 0, "loss": 9.0}\n{"step": 1, "lo', "utf-8")
    loop = trainer(tmp_path, pairs)
    assert not loop.resume()
    loop.fit()
    assert [step for step, _ in losses(tmp_path)] == list(range(12))


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_so_many_checkpoints_are_kept(pairs: Path, tmp_path: Path, keep: int) -> None:
    trainer(tmp_path, pairs, checkpoint_seconds=0, keep=keep).fit()
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [f"step-{step:09d}" for step in range(13 - keep, 13)]


def test_a_damaged_checkpoint_is_named(pairs: Path, tmp_path: Path) -> None:
    trainer(tmp_path, pairs).fit()
    found = checkpoint.latest(tmp_path / "checkpoints")
    assert found is not None
    weights_file = found / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"step-000000012/model\.safetensors") as fault:
        trainer(tmp_path, pairs).resume()
    assert "\n" not in str(fault.value)


def test_a_finished_run_is_not_trained_again(pairs: Path, tmp_path: Path) -> None:
    first = headway.train(task(pairs), out=tmp_path / "run")
    seen: list[Status] = []
    again = headway.train(task(pairs), out=tmp_path / "run", resume=True, watch=lambda _, status: seen.append(status))
    assert not seen
    assert again == json.loads(json.dumps(first))


def test_sigterm_saves_and_exits_with_0(pairs: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"  # JSON is YAML
    recipe.write_text(json.dumps(task(pairs, budget={"seconds": 60})), "utf-8")
    out = tmp_path / "run"
    program = [sys.executable, "-m", "headway", "train", str(recipe), "--out", str(out)]
    settings = ["--set", "checkpoint_seconds=0"]
    with subprocess.Popen(
        [*program, *settings], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        while checkpoint.latest(out / "checkpoints") is None and run.poll() is None:
            time.sleep(0.02)
        run.send_signal(signal.SIGTERM)
        _, said = run.communicate(timeout=60)
    assert run.returncode == 0
    assert "Traceback" not in said
    assert "--resume" in said and str(out) in said, "it says how to go on"
    saved = checkpoint.latest(out / "checkpoints")
    assert saved is not None
    assert len(losses(out)) == int(saved.name.removeprefix("step-"))


# the run's folder


def recipe_for(pairs: Path, **changed: Any) -> Recipe:
    return read(task(pairs, **changed))


def begin(folder: Path, recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> Path:
    check_run(folder, recipe, resume=resume, overwrite=overwrite)
    open_run(folder, recipe, overwrite=overwrite)
    return folder


def test_an_old_run_is_not_written_over_unasked(pairs: Path, tmp_path: Path) -> None:
    folder = begin(tmp_path / "run", recipe_for(pairs))
    (folder / "log.jsonl").write_text("{}\n", "utf-8")
    with pytest.raises(ValueError, match="--resume goes on with it, --overwrite starts anew"):
        begin(folder, recipe_for(pairs))
    assert (folder / "log.jsonl").is_file()
    begin(folder, recipe_for(pairs), resume=True)
    assert (folder / "log.jsonl").is_file()
    begin(folder, recipe_for(pairs), overwrite=True)
    assert not (folder / "log.jsonl").exists()


@pytest.mark.parametrize(("resume", "overwrite"), [(False, False), (True, False), (False, True)])
def test_a_folder_that_holds_no_run_is_never_removed(
    pairs: Path, tmp_path: Path, resume: bool, overwrite: bool
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work", "utf-8")
    with pytest.raises(ValueError, match="holds no run, so it is left alone"):
        begin(tmp_path, recipe_for(pairs), resume=resume, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_that_never_began_is_in_nobodys_way(pairs: Path, tmp_path: Path) -> None:
    wrong = task(pairs, max_tokens=3)
    with pytest.raises(ValueError, match="raise max_tokens"):
        headway.train(wrong, out=tmp_path / "run")
    headway.train(task(pairs, budget={"steps": 1}), out=tmp_path / "run")


def test_a_mistake_costs_no_old_run(pairs: Path, tmp_path: Path) -> None:
    headway.train(task(pairs, budget={"steps": 1}), out=tmp_path / "run")
    with pytest.raises(ValueError, match="raise max_tokens"):
        headway.train(task(pairs, max_tokens=3), out=tmp_path / "run", overwrite=True)
    assert headway.load(tmp_path / "run").generate(["a"])
    with pytest.raises(ValueError, match="choose one"):
        headway.train(task(pairs, budget={"steps": 1}), out=tmp_path / "run", resume=True, overwrite=True)


def test_going_on_with_other_data_is_refused(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.tsv")
    recipe = task(pairs, budget={"steps": 5})
    with pytest.raises(Interrupted):
        headway.train(recipe, out=tmp_path / "run", watch=lambda name, status: os.kill(os.getpid(), signal.SIGINT))
    lines = pairs.read_text("utf-8").splitlines(keepends=True)
    pairs.write_text("".join([lines[0], *reversed(lines[1:])]), "utf-8")
    with pytest.raises(ValueError, match="other data"):
        headway.train(recipe, out=tmp_path / "run", resume=True)


def test_a_file_is_no_folder_for_a_run(pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(ValueError, match="cannot be the folder of a run"):
        begin(tmp_path / "file", recipe_for(pairs))


def test_going_on_with_another_recipe_is_refused(pairs: Path, tmp_path: Path) -> None:
    headway.train(task(pairs, budget={"steps": 1}), out=tmp_path / "run")
    with pytest.raises(ValueError, match="another recipe") as fault:
        headway.train(task(pairs, budget={"steps": 2}), out=tmp_path / "run", resume=True)
    assert "\n" not in str(fault.value)


def test_a_run_from_before_a_key_was_known_goes_on(pairs: Path, tmp_path: Path) -> None:
    recipe = task(pairs, budget={"steps": 1})
    result = headway.train(recipe, out=tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "recipe.json").read_text("utf-8"))
    del kept["penalty"]
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(kept), "utf-8")
    assert headway.train(recipe, out=tmp_path / "run", resume=True)["valid_loss"] == result["valid_loss"]


# the loss


def by_hand(net: nn.Module, batch: Pairs, smoothing: float) -> float:
    """Cross-entropy against (1 - smoothing) on the target and smoothing / V everywhere, token by token."""
    with torch.no_grad():
        p = net(batch.source, batch.target_in, batch.source_valid).double().softmax(-1)
    total, vocab = 0.0, p.shape[-1]
    for row, labels in zip(p.tolist(), batch.target_out.tolist(), strict=True):
        for place, label in zip(row, labels, strict=True):
            if label == IGNORE:
                continue
            wanted = [smoothing / vocab + (1 - smoothing) * (token == label) for token in range(vocab)]
            total -= sum(w * math.log(q) for w, q in zip(wanted, place, strict=True) if w)
    return total


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_cross_entropy_as_written_by_hand(smoothing: float) -> None:
    net, batch = fresh("transformer"), eight_pairs()
    loss = objectives.build({"name": "seq2seq", "smoothing": smoothing})(net, batch)
    assert loss.tokens == int((batch.target_out != IGNORE).sum()) < batch.target_out.numel()
    assert float(loss.total.detach()) == pytest.approx(by_hand(net, batch, smoothing), rel=1e-5)
    assert float(loss.plain) == pytest.approx(by_hand(net, batch, 0.0), rel=1e-5)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_padding_changes_no_loss(name: str) -> None:
    net, batch = fresh(name), eight_pairs()
    objective = objectives.build({"name": "seq2seq", "smoothing": 0.1})
    assert batch.source_valid is not None
    longer = replace(
        batch,
        source=F.pad(batch.source, (0, 5)),
        source_valid=F.pad(batch.source_valid, (0, 5), value=False),
        target_in=F.pad(batch.target_in, (0, 3)),
        target_out=F.pad(batch.target_out, (0, 3), value=IGNORE),
    )
    plain, padded = objective(net, batch), objective(net, longer)
    assert plain.tokens == padded.tokens
    torch.testing.assert_close(plain.total, padded.total)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_architecture_learns_one_batch_by_heart(name: str) -> None:
    net, batch = fresh(name).train(), eight_pairs()
    spec = OptimizerSpec(lr=2e-2, matrix_lr=0.03, warmup=5)
    optimizers = build_optimizers(net, spec)
    objective = objectives.build({})
    for step in range(90):
        loss = objective(net, batch)
        (loss.total / loss.tokens).backward()
        set_rate(optimizers, spec, step, step / 90)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert float(loss.plain) / loss.tokens < 0.02


def test_the_best_weights_are_the_ones_kept(pairs: Path, tmp_path: Path) -> None:
    """At a rate far too high after the first evaluations, later weights are worse."""
    loop = trainer(tmp_path, pairs, evaluations=12, optimizer={"name": "adamw", "lr": 1.0, "decay": 0.0})
    scores: dict[float, Weights] = {}
    plain = loop.valid_loss

    def noted(batches: Order) -> float:
        value = plain(batches)
        scores[value] = weights(loop)
        return value

    loop.valid_loss = noted  # type: ignore[method-assign]
    model = loop.fit()
    assert min(scores) < list(scores)[-1], "the last were the best, so nothing is tested"
    assert same(dict(model.net.state_dict()), scores[min(scores)])
    assert loop.progress.best_loss == min(scores)


@pytest.mark.parametrize("steps", [1, 30])
def test_a_loss_that_is_no_number_ends_in_one_line(pairs: Path, tmp_path: Path, steps: int) -> None:
    changed = {"optimizer": {"name": "adamw", "lr": 1e38, "warmup": 0, "clip": 1e38}, "budget": {"steps": steps}}
    with pytest.raises(ValueError, match=r"loss is (nan|inf) at step \d+: lower optimizer\.lr") as fault:
        trainer(tmp_path, pairs, **changed).fit()
    assert "\n" not in str(fault.value)


# what is wrong is told before it costs anything


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model": {**ARCHITECTURES["conv"], "width": 0}}, "width"),
        ({"max_tokens": 64, "model": ARCHITECTURES["conv"]}, "learned positions end at 64"),
        ({"optimizer": {"lr": -1.0}}, r"> 0.0 at `optimizer.lr`"),
        ({"objective": {"name": "seq2seq", "smoothing": 2.0}}, "objective.smoothing"),
        ({"beams": 0}, "beams"),
        ({"evaluations": 0}, "evaluations"),
        ({"test_limit": 0}, "test_limit"),
        ({"seed": -1}, "seed"),
    ],
)
def test_what_cannot_work_is_refused_before_training(
    pairs: Path, tmp_path: Path, changed: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words) as fault:
        headway.train(task(pairs, **changed), out=tmp_path / "run", watch=lambda *_: pytest.fail("it trained"))
    assert "\n" not in str(fault.value)


def test_a_decoder_that_cannot_stream_is_refused_before_training(pairs: Path, tmp_path: Path) -> None:
    model = ARCHITECTURES["rnn"]
    block = {"mixer": {"name": "rnn", "bidirectional": True}, "cross": {"name": "summary"}}
    wrong = {**model, "decoder": {**model["decoder"], "blocks": [block]}}
    with pytest.raises(ValueError, match="cannot"):
        headway.train(task(pairs, model=wrong), out=tmp_path / "run", watch=lambda *_: pytest.fail("it trained"))


def test_a_test_pair_that_does_not_fit_is_refused_like_any_other(pairs: Path, tmp_path: Path) -> None:
    own = tmp_path / "test.tsv"
    own.write_text("input\ttarget\nabcdefghabcdefghabcdefgh\tA B\n", "utf-8")
    data = {"source": str(pairs), "test": str(own)}
    with pytest.raises(ValueError, match="raise max_tokens"):
        headway.train(task(pairs, data=data, max_tokens=10), out=tmp_path / "run")


def test_only_what_a_run_wrote_is_removed(pairs: Path, tmp_path: Path) -> None:
    """A recipe of that name in a project's folder makes it no run."""
    recipe = recipe_for(pairs)
    begin(tmp_path / "run", recipe)
    (tmp_path / "run" / "thesis.tex").write_text("years of work", "utf-8")
    with pytest.raises(ValueError, match=r"holds thesis\.tex, which no run wrote, so nothing is removed"):
        begin(tmp_path / "run", recipe, overwrite=True)
    assert (tmp_path / "run" / "thesis.tex").read_text("utf-8") == "years of work"


def test_a_model_is_saved_before_it_is_measured(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise ValueError("no way to measure it")

    monkeypatch.setattr("headway.objectives.seq2seq.Objective.score", fails)
    with pytest.raises(ValueError, match="no way to measure it"):
        headway.train(task(pairs), out=tmp_path / "run")
    assert headway.load(tmp_path / "run").kind == "seq2seq"


def test_features_that_are_drawn_anew_are_refused_where_a_step_has_several_passes(pairs: Path, tmp_path: Path) -> None:
    mixer = {"name": "performer", "heads": 2, "features": 8, "redraw": 2}
    model = {"kind": "decoder", "width": 16, "stack": {"blocks": [{"mixer": mixer}]}}
    recipe = task(pairs, model=model, objective={"name": "causal", "pack": False})
    recipe["data"] = {"source": str(pairs), "text": "input"}
    with pytest.raises(ValueError, match="performer's redraw changes features between passes that accumulate takes"):
        headway.train({**recipe, "accumulate": 2}, out=tmp_path / "run")
