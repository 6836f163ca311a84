"""Several ranks train as one process does, whole on each or cut, and a run goes on with another number of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import ARCHITECTURES, task, write_pairs

import headway
from headway.train import checkpoint

STEPS = 20
TOWER = {
    "kind": "encoder",
    "width": 32,
    "dropout": 0.1,
    "stack": {
        "positions": {"name": "learned", "length": 32},
        "blocks": [{"mixer": {"name": "attention", "heads": 2}, "feedforward": {}}],
    },
    "heads": {"project": {"pool": "mean", "outputs": 16, "bias": False}},
}
TOWERS = {"kind": "dual", "towers": {"letters": TOWER, "sounds": TOWER}}
DECODER = {
    "kind": "decoder",
    "width": 32,
    "stack": {
        "positions": {"name": "rotary"},
        "blocks": [{"mixer": {"name": "attention", "heads": 2}, "feedforward": {}}],
        "repeat": 2,
    },
}


def recipes(folder: Path) -> dict[str, dict[str, Any]]:
    """One of each kind, on data made here."""
    pairs = write_pairs(folder / "pairs.tsv", rows=300)
    shared = {
        "budget": {"steps": STEPS},
        "accumulate": 4,
        "batch_tokens": 192,
        "optimizer": {"name": "adamw", "warmup": 2},
    }
    text = {"data": {"source": str(pairs), "text": "input"}, "objective": {"name": "causal"}, "max_tokens": 32}
    return {
        "decoder": task(pairs, **shared, **text, model=DECODER),
        "seq2seq": task(pairs, **shared, model=ARCHITECTURES["transformer"]),
        "dual": task(pairs, **shared, objective={"name": "contrastive", "pairs": "target"}, model=TOWERS),
    }


# stops in the middle, on the word of one rank
STOPPED = """
import os, signal, sys
from headway.train import Interrupted, train
def watch(name, status):
    if status.step == {half} and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGINT)
try:
    train(sys.argv[1], out=sys.argv[2], watch=watch)
except Interrupted:
    pass
"""


def launch(
    folder: Path, recipe: dict[str, Any], ranks: int, *more: str, stop: bool = False
) -> subprocess.CompletedProcess[str]:
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump(recipe), "utf-8")
    words = ["-m", "headway", "train", str(path), "-o", str(folder), *more]
    if stop:
        script = folder.parent / "stopped.py"
        script.write_text(STOPPED.format(half=STEPS // 2), "utf-8")
        words = [str(script), str(path), str(folder)]
    return torchrun(ranks, *words)


def torchrun(ranks: int, *words: str) -> subprocess.CompletedProcess[str]:
    """A program in so many processes (one: without torchrun)."""
    many = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*(many if ranks > 1 else many[:1]), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


def train(folder: Path, recipe: dict[str, Any], ranks: int, *more: str, stop: bool = False) -> list[float]:
    """The losses, step by step, of a run under torchrun (or without, for one)."""
    done = launch(folder, recipe, ranks, *more, stop=stop)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (folder / "log.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize(
    ("kind", "ranks", "parallel"),
    [
        ("decoder", 2, "fsdp"),
        ("seq2seq", 4, "ddp"),
        ("dual", 2, "fsdp"),
        pytest.param("dual", 4, "ddp", marks=pytest.mark.long),
        pytest.param("decoder", 4, "ddp", marks=pytest.mark.long),
        pytest.param("seq2seq", 2, "fsdp", marks=pytest.mark.long),
    ],
)
def test_ranks_train_as_one_process_does(tmp_path: Path, kind: str, ranks: int, parallel: str) -> None:
    recipe = recipes(tmp_path)[kind]
    alone = train(tmp_path / "alone", recipe, 1)
    shared = train(tmp_path / "shared", {**recipe, "parallel": parallel}, ranks)
    assert len(alone) == STEPS
    assert shared == pytest.approx(alone, abs=1e-5)
    one, other = (headway.load(tmp_path / name).net.state_dict() for name in ("alone", "shared"))
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)


DEALT = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from headway.train.ranks import Deal, Ranks, own_part
with Ranks() as ranks:
    mesh = init_device_mesh("cpu", (ranks.size,))
    for rows, count in ((5, 4), (1, 2), (6, 3)):
        torch.manual_seed(0)
        whole = [torch.randn(rows, 3) for _ in range(count)]
        cut = [distribute_tensor(one, mesh, [Shard(0)], src_data_rank=None) for one in whole]
        deal = Deal(cut[0], count)
        mine = deal.out([own_part(one) for one in cut])
        for i, one in enumerate(whole[ranks.rank :: ranks.size]):
            assert torch.equal(mine[i], one)
        for part, one in zip(deal.back(2 * mine), cut, strict=True):
            assert torch.equal(part, 2 * own_part(one))
"""


def test_matrices_that_ranks_cut_unevenly_are_dealt_out_whole_and_come_back(tmp_path: Path) -> None:
    (tmp_path / "dealt.py").write_text(DEALT, "utf-8")
    done = torchrun(3, str(tmp_path / "dealt.py"))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.long
@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
def test_ranks_train_in_pure_bf16_nearly_as_one_process_does(tmp_path: Path, parallel: str) -> None:
    """And keep fp32 weights: steps too small for bf16 are not lost."""
    recipe = {**recipes(tmp_path)["decoder"], "precision": "pure-bf16"}
    alone = train(tmp_path / "alone", recipe, 1)
    shared = train(tmp_path / "shared", {**recipe, "parallel": parallel}, 2)
    assert shared == pytest.approx(alone, abs=2e-2)
    saved, _ = checkpoint.newest(tmp_path / "shared" / "checkpoints")
    assert saved is not None
    assert {value.dtype for value in saved.tensors["model"].values() if value.is_floating_point()} == {torch.float32}
    assert any((value != value.bfloat16().float()).any() for value in saved.tensors["model"].values())


@pytest.mark.long
def test_muon_sees_whole_matrices_where_they_are_cut(tmp_path: Path) -> None:
    """Its products are in bf16, so that the last digits of a sum over ranks show."""
    recipe = {**recipes(tmp_path)["decoder"], "optimizer": {"name": "muon", "warmup": 2}}
    alone = train(tmp_path / "alone", recipe, 1)
    assert train(tmp_path / "shared", {**recipe, "parallel": "fsdp"}, 2) == pytest.approx(alone, abs=1e-3)


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    recipe = {**recipes(tmp_path)["decoder"], "parallel": "fsdp"}
    alone = train(tmp_path / "alone", recipe, 1)
    assert len(train(tmp_path / "moved", recipe, 2, stop=True)) == STEPS // 2
    assert train(tmp_path / "moved", recipe, 4, "--resume") == pytest.approx(alone, abs=1e-5)


def test_ranks_that_cannot_share_a_step_are_told_so_once(tmp_path: Path) -> None:
    recipe = {**recipes(tmp_path)["decoder"], "accumulate": 3}
    done = launch(tmp_path / "run", recipe, 2)
    assert done.returncode != 0
    assert done.stderr.count("which 2 ranks cannot share evenly: set accumulate=4") == 1
