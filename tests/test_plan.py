"""A plan's memory is what a run takes here, and its times follow from what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from shell import Headway
from tiny import ARCHITECTURES, prepared_task, task, write_pairs

from headway.recipe import read
from headway.train.data import prepare
from headway.train.plan import Plan, plan, step

# large enough for the numbers to outweigh what the process itself needs
DECODER = {
    "kind": "decoder",
    "width": 320,
    "stack": {
        "positions": {"name": "rotary"},
        "blocks": [{"mixer": {"name": "attention", "heads": 5}, "feedforward": {}}],
        "repeat": 4,
    },
}

# trains a small one first, so that what PyTorch loads and keeps is not counted, then the one in question
MEASURE = """
import ctypes, gc, json, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from headway.recipe import read
from headway.train.data import prepare
from headway.train.loop import Trainer
from headway.train.plan import step

def run(recipe, prepared, folder):
    Path(folder).mkdir(parents=True)
    Trainer(recipe, recipe.model, recipe.optimizer, prepared, Path(folder)).fit()

given = json.loads(sys.argv[1])
recipe = read(given)
prepared = prepare(recipe)
small = read({**given, "model": {**given["model"], "width": given["model"]["width"] // 4}})
run(small, prepared, sys.argv[2] + "/small")
gc.collect(); ctypes.CDLL("libc.so.6").malloc_trim(0)
status = lambda name: next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(name))
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
run(recipe, prepared, sys.argv[2] + "/run")
print(status("VmHWM") - before)
"""


def documentation(**changed: Any) -> dict[str, Any]:
    return {
        "data": {"source": "documentation"},
        "tokenizers": {"input": {"kind": "bpe", "vocab": 600}},
        "objective": {"name": "causal"},
        "budget": {"steps": 3},
        "evaluations": 1,
        "batch_tokens": 1024,
        "max_tokens": 256,
        "precision": "fp32",
        "checkpoint_seconds": 1e9,
        "optimizer": {"name": "adamw"},
        "model": DECODER,
        **changed,
    }


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read off Linux's own books")
@pytest.mark.parametrize(
    "changed",
    [{}, pytest.param({"activation_checkpointing": True}, marks=pytest.mark.long)],
    ids=["plain", "checkpointed"],
)
def test_the_memory_of_a_plan_is_what_a_run_takes(tmp_path: Path, changed: dict[str, Any]) -> None:
    given = documentation(**changed)
    recipe = read(given)
    one = plan(recipe, prepare(recipe), gpus=1, gpu="h100", share=0.4)
    # freed memory goes back to the system at once, so that what the process holds is what PyTorch holds
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, json.dumps(given), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sum(one.memory.values()) == pytest.approx(int(done.stdout), rel=0.10)


def planned(gpus: int = 1, **changed: Any) -> Plan:
    recipe = read(documentation(accumulate=8, **changed))
    return plan(recipe, prepare(recipe), gpus=gpus, gpu="h100", share=0.4)


def test_flops_are_six_a_parameter_and_token_and_attention_besides() -> None:
    recipe = read(documentation())
    prepared = prepare(recipe)
    one = step(recipe, prepared)
    embedding = prepared.tools.vocab * DECODER["width"]  # tied: its product is the head's
    rows = one.tokens / recipe.max_tokens
    attention = 12 * rows * 4 * recipe.max_tokens**2 * DECODER["width"]  # scores and values, forward and twice back
    assert one.parameters > embedding
    assert one.flops == pytest.approx(6 * one.parameters * one.tokens + attention, rel=0.08)


def test_what_is_cut_is_shared_and_what_is_whole_is_not() -> None:
    one, whole, cut, each = planned(1), planned(4), planned(4, parallel="fsdp"), planned(8, parallel="fsdp")
    assert whole.memory == one.memory
    for part in ("weights", "optimizer"):
        assert cut.memory[part] == one.memory[part] // 4
    # kept whole from one micro-batch to the next; with one each, they are cut as they come
    assert cut.memory["gradients"] == one.memory["gradients"] == 8 * each.memory["gradients"]
    assert cut.memory["activations"] == one.memory["activations"] and cut.memory["gathered"] > 0
    assert one.bytes_exchanged == 0 and cut.bytes_exchanged > whole.bytes_exchanged > 0


def test_times_add_up() -> None:
    found = planned(4)
    assert found.tokens_per_step == pytest.approx(8 * 1024, rel=0.05)
    assert found.step_seconds >= max(found.compute_seconds, found.exchange_seconds)
    assert found.bubble == pytest.approx(1 - found.compute_seconds / found.step_seconds)
    assert found.seconds == pytest.approx(3 * found.step_seconds) and found.steps == 3


def test_a_plan_of_pairs_is_told_on_the_command_line(tmp_path: Path, run: Headway) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(task(write_pairs(tmp_path / "pairs.tsv"), model=ARCHITECTURES["transformer"])), "utf-8")
    shown = run("plan", path, "--gpu", "l4")
    assert shown.code == 0 and "It fits." in shown.out and "activations" in shown.out
    record = json.loads(run("plan", path, "--json").out)
    assert record["fits"] and record["gpu"] == "h100"


@pytest.mark.parametrize(
    ("asked", "words"),
    [({"gpu": "h10"}, "did you mean 'h100'"), ({"gpus": 3}, "set accumulate=3"), ({"share": 0.0}, "above 0")],
)
def test_what_cannot_be_planned_is_told_in_one_line(tmp_path: Path, asked: dict[str, Any], words: str) -> None:
    recipe, prepared = prepared_task(write_pairs(tmp_path / "pairs.tsv"))
    with pytest.raises(ValueError, match=words) as fault:
        plan(recipe, prepared, **{"gpus": 1, "gpu": "h100", "share": 0.4, **asked})
    assert "\n" not in str(fault.value)
