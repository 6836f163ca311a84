"""Claims about what no accident may cost: a process killed at any moment, a disk that fails, files that were changed.

Every accident is a real one: SIGKILL, errors of the operating system, other bytes. Nothing is ever unpickled.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from shell import Headway
from test_store import delete, flip, lengthen, sign, truncate
from tiny import ARCHITECTURES, task, trainer, write_pairs

import headway
from headway.train import Interrupted, checkpoint
from headway.train.loop import Trainer
from headway.train.proof import prove

HERE = Path(__file__).parent
STEPS = 24


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.tsv")


def recipe_of(pairs: Path, **changed: Any) -> dict[str, Any]:
    return task(pairs, **{"checkpoint_seconds": 0, "budget": {"steps": 8}, "model": ARCHITECTURES["conv"], **changed})


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()


def environment(**more: str) -> dict[str, str]:
    source = str(Path(headway.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", **more}


def started(program: str, *arguments: object, **more: str) -> str:
    words = [sys.executable, str(HERE / program), *map(str, arguments)]
    done = subprocess.run(words, env=environment(**more), capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    return done.stdout


def stopped(recipe: dict[str, Any], folder: Path, step: int = 3) -> Path:
    """A run that somebody stopped."""
    stop = lambda name, status: status.step == step and os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(Interrupted):
        headway.train(recipe, out=folder, watch=stop)
    return folder


# killed


@pytest.mark.parametrize(
    "kills", [20, pytest.param(200, marks=[pytest.mark.long, pytest.mark.timeout(3000)])], ids=lambda n: f"{n} times"
)
def test_a_run_killed_again_and_again_ends_in_the_same_bits(pairs: Path, tmp_path: Path, kills: int) -> None:
    """Killed at random moments, half of them inside a save; each time it goes on unaided, one step lost at most."""
    recipe = recipe_of(pairs, budget={"steps": STEPS})
    seed = random.randrange(2**32) if kills > 20 else 1
    found = json.loads(started("lives.py", json.dumps(recipe), tmp_path, kills, seed))
    assert found["killed"] == kills
    assert found["inside"] >= 0.4 * kills, found
    assert found["lost"] <= 1, "every step is saved here, so that one interval is one step"
    for run in range(found["runs"]):
        assert digest(tmp_path / f"killed-{run}") == digest(tmp_path / "whole"), (run, seed)
        lines = (tmp_path / f"killed-{run}" / "log.jsonl").read_text("utf-8").splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(STEPS))
        assert not [path for path in (tmp_path / f"killed-{run}").rglob("*") if path.name.endswith(".part")]


# disks


@pytest.fixture(scope="module")
def failing_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What makes writes fail below libc's callers."""
    library = tmp_path_factory.mktemp("disk") / "disk.so"
    if shutil.which("cc") is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler and Linux")
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", library, HERE / "disk.c", "-ldl"], check=True)
    return library


@pytest.mark.parametrize(
    "numbers",
    [[2, 9, 17, 44], pytest.param(list(range(1, 51)), marks=[pytest.mark.long, pytest.mark.timeout(3000)])],
    ids=lambda numbers: f"{len(numbers)} writes",
)
def test_a_full_or_read_only_disk_costs_no_checkpoint(
    pairs: Path, tmp_path: Path, failing_disk: Path, numbers: list[int]
) -> None:
    """From the n-th write on, all fail; the run that went on ends in one line, and all that was there is whole."""
    recipe = tmp_path / "recipe.json"  # JSON is YAML
    recipe.write_text(json.dumps(recipe_of(pairs)), "utf-8")
    base = stopped(recipe_of(pairs), tmp_path / "base")
    (tmp_path / "work").mkdir()
    every = len(numbers) == 50
    if every:
        headway.train(recipe_of(pairs), out=tmp_path / "whole")
    said = started("disk.py", recipe, base, tmp_path / "work", int(every), *numbers, LD_PRELOAD=str(failing_disk))
    outcomes = [json.loads(line) for line in said.splitlines()]
    assert len(outcomes) == 2 * len(numbers)
    for outcome in outcomes:
        assert outcome["status"] == 1, outcome
        assert outcome["said"].count("\n") == 1 and outcome["said"].startswith("headway: "), outcome
        assert "No space left" in outcome["said"] or "Read-only" in outcome["said"], outcome
        assert not outcome["left"], outcome
        assert [fault for _, fault in outcome["proof"]] == [None] * len(outcome["proof"]), outcome
        kept = [path for path, _ in outcome["proof"] if path.startswith("checkpoints/")]
        assert kept and max(kept) >= "checkpoints/step-000000003", outcome
        if every:
            assert outcome["again"] == 0, "with room again, it goes on"
            assert outcome["weights"] == digest(tmp_path / "whole")


# changed files


@pytest.fixture(scope="module")
def trained(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with two checkpoints."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    headway.train(recipe_of(pairs), out=folder)
    return folder


@pytest.fixture(scope="module")
def resuming(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A trainer that is given one folder after the other to go on in."""
    return trainer(tmp_path_factory.mktemp("resuming"), pairs, **recipe_of(pairs))


def lone_checkpoint(trained: Path, run: Path) -> Path:
    found = checkpoint.latest(trained / "checkpoints")
    assert found is not None
    return Path(shutil.copytree(found, run / "checkpoints" / found.name))


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.long)])
def test_no_changed_checkpoint_is_gone_on_from(trained: Path, resuming: Trainer, tmp_path: Path, count: int) -> None:
    """Flipped, cut, lengthened or removed: one line that names the file and why, in under a second."""
    draw = random.Random(count)
    for i in range(count):
        run = tmp_path / str(i)
        folder = lone_checkpoint(trained, run)
        file = draw.choice(sorted(folder.iterdir()))
        draw.choice([flip, truncate, lengthen, delete])(file, draw)
        resuming.folder = run
        began = time.perf_counter()
        with pytest.raises(ValueError) as fault:
            resuming.resume()
        assert time.perf_counter() - began < 1
        said = str(fault.value)
        assert "\n" not in said and str(folder) in said, said
        # a manifest that is still one may put the blame on what it tells of
        assert file.name in said or file.name == "manifest.json", said
        shutil.rmtree(run)


def test_a_signed_checkpoint_with_other_bytes_is_read_or_refused_in_one_line(
    trained: Path, resuming: Trainer, tmp_path: Path
) -> None:
    """The sums are right here, as an attacker's would be: only the reading itself can object."""
    draw, outcomes = random.Random(2), {"read": 0, "refused": 0}
    for i in range(100):
        run = tmp_path / str(i)
        folder = lone_checkpoint(trained, run)
        file = draw.choice(sorted(path for path in folder.iterdir() if path.name != "manifest.json"))
        draw.choice([flip, flip, truncate, lengthen])(file, draw)
        sign(folder)
        resuming.folder = run
        try:
            resuming.resume()
        except ValueError as error:
            assert "\n" not in str(error) and str(folder) in str(error)
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1
        shutil.rmtree(run)
    assert min(outcomes.values()) > 5, outcomes


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ("progress", "{}"), ("progress", "[]"), ("progress", '{"step": "one"}'), ("progress", '{"step": 1e400}'),
        ("progress", "null"), ("spec", "null"), ("data", "7"), ("spec", "[" * 100_000),
    ],
)  # fmt: skip
def test_a_signed_record_that_lies_is_refused(
    trained: Path, resuming: Trainer, tmp_path: Path, record: str, text: str
) -> None:
    folder = lone_checkpoint(trained, tmp_path)
    (folder / f"{record}.json").write_text(text, "utf-8")
    sign(folder)
    resuming.folder = tmp_path
    if text == "{}":  # a run that took no step, says it
        assert resuming.resume() and resuming.progress.step == 0
        return
    with pytest.raises(ValueError) as fault:
        resuming.resume()
    assert "\n" not in str(fault.value) and str(folder) in str(fault.value)


@pytest.mark.parametrize("change", [flip, truncate, delete])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(pairs: Path, tmp_path: Path, change: Any) -> None:
    recipe = recipe_of(pairs)
    headway.train(recipe, out=tmp_path / "whole")
    folder = stopped(recipe, tmp_path / "run", step=4) / "checkpoints"
    change(folder / "step-000000004" / "optimizer.safetensors", random.Random(0))
    said: list[str] = []
    headway.train(recipe, out=tmp_path / "run", resume=True, note=said.append)
    told = [line for line in said if "set aside" in line]
    assert len(told) == 1 and "step-000000004/optimizer.safetensors" in told[0], said
    assert "damaged-step-000000004" in told[0] and "going on from step 3" in told[0]
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")
    assert [fault for *_, fault in prove(tmp_path / "run")].count(None) >= 5


def test_where_no_checkpoint_is_whole_nothing_is_touched(pairs: Path, tmp_path: Path) -> None:
    folder = stopped(recipe_of(pairs), tmp_path / "run") / "checkpoints"
    for one in folder.iterdir():
        truncate(one / "model.safetensors", random.Random(0))
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match="no older checkpoint is whole: start anew with --overwrite"):
        headway.train(recipe_of(pairs), out=tmp_path / "run", resume=True)
    assert sorted(folder.rglob("*")) == before


def test_verify_proves_a_run_and_names_what_is_damaged(trained: Path, tmp_path: Path, run: Headway) -> None:
    done = run("verify", trained)
    assert done.code == 0
    assert done.out.count("whole\t") == done.out.count("\n") == 7, "2 checkpoints, a model, 3 records, the log"
    files = sorted(path.relative_to(trained) for path in trained.rglob("*") if path.is_file())
    for i, file in enumerate(files):
        copy = Path(shutil.copytree(trained, tmp_path / str(i)))
        truncate(copy / file, random.Random(0))
        failed = run("verify", copy)
        assert failed.code == 1, file
        assert failed.out.count("DAMAGED\t") == 1 and str(file.parent) in failed.out, file
    assert run("verify", tmp_path).code == 1
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    assert "holds neither a run nor a model" in run("verify", nothing).err


# pickle

BANNED = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}
CALLS = {"torch.load", "torch.save", "torch.jit.load", "torch.package", "pd.read_pickle", "pandas.read_pickle"}


def faults_of(source: str) -> list[str]:
    """What in a source could unpickle, or run text as code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in BANNED]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found += [module] if module.partition(".")[0] in BANNED else []
            found += [f"{module}.{a.name}" for a in node.names if f"{module}.{a.name}" in CALLS]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in CALLS:
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Call):
            named = {k.arg: k.value for k in node.keywords}
            allowed = named.get("allow_pickle")
            if allowed is not None and not (isinstance(allowed, ast.Constant) and allowed.value is False):
                found.append("allow_pickle")
            if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec", "__import__"):
                found.append(node.func.id)
    return found


def test_no_file_of_headway_can_unpickle() -> None:
    for path in Path(headway.__file__).parent.rglob("*.py"):
        assert not faults_of(path.read_text("utf-8")), path


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from joblib import load", "import torch\ntorch.load('x')", "from torch import load", "eval('1')",
     "import numpy as np\nnp.load('x', allow_pickle=True)", "import marshal as m", "f(allow_pickle=flag)"],
)  # fmt: skip
def test_the_scan_sees_what_could_unpickle(source: str) -> None:
    assert faults_of(source)


def test_nothing_is_unpickled_on_any_way_back(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Headway
) -> None:
    """Training, going on, loading, answering and proving, while unpickling itself is blocked."""
    folder = stopped(recipe_of(pairs), tmp_path / "run")

    def blocked(*anything: Any, **named: Any) -> Any:
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler", "_Unpickler", "_load", "_loads"):
        monkeypatch.setattr(pickle, name, blocked)
    for module in (torch, torch.serialization):
        monkeypatch.setattr(module, "load", blocked)
    monkeypatch.setattr(np.lib.format, "read_array", blocked)
    result = headway.train(recipe_of(pairs), out=folder, resume=True)
    assert result["steps"] == 8
    loaded = headway.load(folder)
    assert loaded.generate(["abc"])
    loaded.save(tmp_path / "again")
    assert headway.load(tmp_path / "again").generate(["abc"]) == loaded.generate(["abc"])
    assert run("verify", folder).code == 0
    with pytest.raises(AssertionError, match="unpickled"):
        pickle.loads(b"")


# stopped by itself


@torch.no_grad()
def spoil(loop: Trainer, size: float) -> None:
    for parameter in loop.model.parameters():
        parameter.add_(size * torch.randn_like(parameter))


def test_a_loss_that_is_no_number_leaves_its_batch(pairs: Path, tmp_path: Path) -> None:
    loop = trainer(tmp_path, pairs, **recipe_of(pairs, accumulate=2, evaluations=1, checkpoint_seconds=60))
    loop.watch = lambda status: spoil(loop, math.nan) if status.step == 3 else None
    with pytest.raises(ValueError, match=r"the loss is nan at step 3: lower .*; its batch is in ") as fault:
        loop.fit()
    step = 3
    folder = tmp_path / f"stopped-step-{step:09d}"
    assert str(fault.value).endswith(str(folder)) and "\n" not in str(fault.value)
    record = json.loads((folder / "stopped.json").read_text("utf-8"))
    assert record["step"] == step and record["why"] in str(fault.value)
    assert list(record["batches"]) == [f"batch-{2 * step}", f"batch-{2 * step + 1}"]
    for number in (2 * step, 2 * step + 1):
        wanted, kept = loop.prepared.batches.batch(number), load_file(folder / f"batch-{number}.safetensors")
        assert torch.equal(kept["source"], wanted.source) and torch.equal(kept["target_out"], wanted.target_out)


@pytest.mark.parametrize("spike", [0.0, 4.0])
def test_a_leap_of_the_loss_stops_the_run_where_it_is_asked_to(pairs: Path, tmp_path: Path, spike: float) -> None:
    """The weights are shaken at step 60; the step that would follow is not taken."""
    recipe = recipe_of(pairs, spike=spike, budget={"steps": 62}, checkpoint_seconds=60)
    loop = trainer(tmp_path, pairs, **recipe)

    loop.watch = lambda status: spoil(loop, 1.0) if status.step == 60 else None
    if not spike:
        loop.fit()
        return
    with pytest.raises(ValueError, match=r"the loss leapt to .* at step 60: .*stopped-step-000000060"):
        loop.fit()
