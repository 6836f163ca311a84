"""Claims about what a recipe may switch on: schedules, an average, precision, memory, compiling; and a run's card."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, eight_pairs, fresh, prepared_task, task, trainer, write_pairs
from torch import Tensor, nn

import headway
from headway import machine, objectives
from headway.objectives._tokens import Tokens
from headway.recipe import OptimizerSpec, read
from headway.train.average import Average
from headway.train.card import commit
from headway.train.half import Half
from headway.train.recompute import keep_all, recompute
from headway.train.schedule import scale
from headway.train.watch import flops_per_token


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.tsv")


# schedules


def path_of(schedule: str, steps: int = 100, **given: Any) -> list[float]:
    spec = OptimizerSpec(schedule=schedule, **{"warmup": 10, **given})  # type: ignore[arg-type]
    return [scale(spec, step, step / steps) for step in range(steps)]


@pytest.mark.parametrize(
    ("schedule", "falls_from", "at_75"),
    [
        ("linear", 0.0, 0.25),
        ("cosine", 0.0, 0.5 * (1 + math.cos(0.75 * math.pi))),
        ("wsd", 0.8, 1.0),
        ("constant", 1.0, 1.0),
    ],
)
def test_a_schedule_rises_and_falls_as_its_name_says(schedule: str, falls_from: float, at_75: float) -> None:
    found = path_of(schedule)
    assert found[0] == pytest.approx(0.1) and found[0] < found[5] < found[9]
    assert found[75] == pytest.approx(at_75)
    level = [share for step, share in enumerate(found) if 10 <= step <= 100 * falls_from]
    assert level == pytest.approx([1.0] * len(level), abs=1e-6)
    falling = [share for step, share in enumerate(found) if step > max(10, 100 * falls_from)]
    assert falling == sorted(falling, reverse=True)
    assert not falling or falling[-1] < 0.15
    assert scale(OptimizerSpec(schedule=schedule), 10**6, 1.0) == (schedule == "constant")  # type: ignore[arg-type]


def test_a_decay_of_ones_own_moves_where_the_fall_begins() -> None:
    found = path_of("cosine", decay=0.5)
    assert set(found[10:50]) == {1.0} and found[75] == pytest.approx(0.5)
    assert path_of("wsd", decay=0.5)[75] == pytest.approx(1 - math.sqrt(0.5))


def test_a_constant_rate_with_a_decay_is_refused() -> None:
    with pytest.raises(ValueError, match=r"constant never falls, and decay is 0\.5: leave decay out") as fault:
        read({"data": {"source": "x"}, "budget": {"steps": 1}, "model": {},
              "optimizer": {"schedule": "constant", "decay": 0.5}})  # fmt: skip
    assert "\n" not in str(fault.value)


# the average


def test_the_average_is_what_its_equation_says() -> None:
    net = nn.Linear(2, 2)
    average, wanted = Average(net, 0.5), net.weight.detach().clone()
    for step in range(20):
        with torch.no_grad():
            net.weight.add_(1.0)
        average.update(net, step)
        keep = min(0.5, (1 + step) / (10 + step))
        wanted = keep * wanted + (1 - keep) * net.weight.detach()
    torch.testing.assert_close(average.tensors["weight"], wanted)
    own = net.weight.detach().clone()
    with average.inside(net):
        torch.testing.assert_close(net.weight.detach(), wanted)
    assert torch.equal(net.weight.detach(), own)


def test_with_an_average_the_average_is_evaluated_and_kept(pairs: Path, tmp_path: Path) -> None:
    loop = trainer(tmp_path, pairs, optimizer={"warmup": 2, "ema": 0.9}, evaluations=1)
    model = loop.fit()
    assert loop.average is not None
    kept, last = dict(model.net.state_dict()), loop.average.tensors
    assert all(torch.equal(kept[name], last[name]) for name in last)
    assert loop.valid_loss(loop.prepared.curve) == loop.progress.best_loss


# precision


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def test_pure_bf16_keeps_weights_and_sums_in_fp32() -> None:
    net, batch = fresh("transformer").train(), eight_pairs()
    objective = objectives.build({})
    objective(net, batch).total.backward()
    exact = gradients(net)
    net.zero_grad()
    half = Half(net)
    for _ in range(2):  # two micro-batches
        half.refresh()
        with torch.autocast("cpu", torch.bfloat16):
            objective(half.net, batch).total.backward()
        half.collect()
    assert {p.dtype for p in half.net.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    for (name, own), copy in zip(net.named_buffers(), half.net.buffers(), strict=True):
        assert own is copy, name
    for name, wanted in exact.items():
        error = (gradients(net)[name] / 2 - wanted).norm() / wanted.norm()
        assert error < 0.05, (name, float(error))


@pytest.mark.parametrize("precision", ["bf16", "pure-bf16"])
def test_bf16_trains_nearly_as_fp32_does(pairs: Path, tmp_path: Path, precision: str) -> None:
    found = {}
    for one in ("fp32", precision):
        loop = trainer(tmp_path / one, pairs, precision=one, budget={"steps": 30})
        loop.fit()
        found[one] = loop.progress.best_loss
    assert found[precision] == pytest.approx(found["fp32"], rel=0.03)
    assert found[precision] != found["fp32"]


# memory


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_activation_checkpointing_changes_no_bit_of_a_gradient(name: str) -> None:
    """Dropout included: the second run draws what the first drew."""
    spec = {**ARCHITECTURES[name], "dropout": 0.2, "source_vocab": 12, "target_vocab": 12}
    net, batch = headway.models.build(spec).train(), eight_pairs()
    objective, found = objectives.build({}), []
    for on in (False, True):
        if on:
            recompute(net)
        torch.manual_seed(7)
        objective(net, batch).total.backward()
        found.append(gradients(net))
        net.zero_grad()
    assert found[0].keys() == found[1].keys()
    for key in found[0]:
        assert torch.equal(found[0][key], found[1][key]), key
    keep_all(net)
    assert not any("forward" in vars(module) for module in net.modules())


def test_activation_checkpointing_keeps_less() -> None:
    blocks = [{"mixer": {"name": "attention", "heads": 2}, "feedforward": {}}]
    net = headway.models.build({"kind": "decoder", "width": 32, "vocab": 9, "stack": {"blocks": blocks, "repeat": 6}})
    net.train()
    kept = []
    for on in (False, True):
        if on:
            recompute(net)
        sizes: list[int] = []
        count = lambda tensor, sizes=sizes: sizes.append(tensor.numel()) or tensor
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            net(torch.zeros(4, 64, dtype=torch.long), None).sum().backward()
        kept.append(sum(sizes))
    assert kept[1] < kept[0]


# compiling


COMPILED = """
import sys
from pathlib import Path
from tiny import ARCHITECTURES, trainer
for compiled in (False, True):
    folder, pairs = Path(sys.argv[1]) / str(compiled), Path(sys.argv[2])
    loop = trainer(folder, pairs, compile=compiled, model=ARCHITECTURES["transformer"])
    loop.fit()
    print(loop.progress.best_loss)
"""


@pytest.mark.long
def test_compiled_feedforwards_train_as_they_do_uncompiled(pairs: Path, tmp_path: Path) -> None:
    """In a process of its own: the checks of shapes that tests have around every function do not compile."""
    command = [sys.executable, "-c", COMPILED, str(tmp_path), str(pairs)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    eager, compiled = map(float, done.stdout.split())
    assert compiled == pytest.approx(eager, rel=1e-3)


def test_compiling_what_has_no_feedforward_is_refused(pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no feed-forward"):
        trainer(tmp_path, pairs, compile=True, model=ARCHITECTURES["rnn"])


# what is told


def test_flops_are_six_a_parameter_and_token() -> None:
    """Of a decoder whose parameters are all in products: forward 2, backward 4."""
    blocks = [{"mixer": {"name": "attention", "heads": 2, "bias": False}, "feedforward": {"bias": False}}]
    head = {"outputs": 50, "bias": False, "tie": True}
    stack = {"positions": {"name": "none"}, "blocks": blocks}
    net = headway.models.build({"kind": "decoder", "width": 64, "vocab": 50, "heads": {"lm": head}, "stack": stack})
    ids = torch.arange(40)[None]
    batch = Tokens(ids=ids, labels=ids, valid=None, tokens=40, targets=40)
    products = sum(p.numel() for p in net.parameters() if p.ndim == 2)
    assert flops_per_token(objectives.build({"name": "causal"}), net, batch) == pytest.approx(6 * products)


def test_a_run_has_a_card_with_all_that_one_needs_to_have_it_again(pairs: Path, tmp_path: Path) -> None:
    headway.train(task(pairs, seed=5, budget={"steps": 2}), out=tmp_path / "run")
    found = json.loads((tmp_path / "run" / "card.json").read_text("utf-8"))
    file = {"path": str(pairs), "bytes": pairs.stat().st_size, "sha256": hashlib.sha256(pairs.read_bytes()).hexdigest()}
    assert found["data"]["files"] == [file]
    assert found["seed"] == 5 and found["command"] == sys.argv and found["precision"] == "fp32"
    assert found["versions"]["torch"] == torch.__version__ and "numpy" in found["versions"]
    assert found["hardware"] == machine.hardware()
    assert found["spec"]["kind"] == "seq2seq" and found["spec"]["source_vocab"] > 4
    again = read(found["recipe"])
    assert again == read(task(pairs, seed=5, budget={"steps": 2}))
    _, prepared = prepared_task(pairs, seed=5)
    assert found["data"]["fingerprint"] == prepared.fingerprint


def test_the_card_tells_the_commit_of_the_working_folder(tmp_path: Path) -> None:
    assert commit(tmp_path) is None
    who = ["-c", "user.name=n", "-c", "user.email=e"]
    git = lambda *words: subprocess.run(
        ["git", "-C", tmp_path, *who, *words], check=True, capture_output=True, text=True
    )
    git("init")
    (tmp_path / "file").write_text("one", "utf-8")
    git("add", "file")
    git("commit", "-m", "first")
    head = git("rev-parse", "HEAD").stdout.strip()
    assert commit(tmp_path) == {"commit": head, "changed": False}
    (tmp_path / "file").write_text("two", "utf-8")
    assert commit(tmp_path) == {"commit": head, "changed": True}
