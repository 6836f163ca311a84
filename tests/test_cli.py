"""Claims about the command line: it answers at once, does what it says, and takes every mistake in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from shell import Headway, Outcome
from tiny import ARCHITECTURES, task, write_pairs
from typer.testing import CliRunner

import headway
from headway import cli
from headway.recipe import built_in


def shell(*command: str, stdin: str = "", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    source = str(Path(headway.__file__).parents[1])
    return subprocess.run(
        [sys.executable, *command], input=stdin, cwd=cwd, capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def write_recipe(folder: Path, **changed: Any) -> Path:
    """A recipe file beside its data; JSON is YAML."""
    pairs = write_pairs(folder / "pairs.tsv")
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(task(pairs, **changed)), "utf-8")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    headway.train(str(write_recipe(folder)), out=folder / "run")
    return folder / "run"


# help


def test_help_loads_no_pytorch() -> None:
    program = """
import sys
from headway.cli import app
try:
    app(["--help"])
except SystemExit:
    pass
heavy = {"torch", "numpy", "tokenizers", "rich.progress", "msgspec"} & set(sys.modules)
assert not heavy, heavy
"""
    done = shell("-c", program)
    assert done.returncode == 0, done.stderr
    assert "headway demo" in done.stdout


def test_every_command_explains_itself() -> None:
    runner = CliRunner()
    for command in ("demo", "train", "compare", "run"):
        done = runner.invoke(cli.app, [command, "--help"])
        assert done.exit_code == 0
        assert "Usage" in done.output


def test_train_alone_explains_and_names_the_built_in_recipes(run: Headway) -> None:
    done = run("train")
    assert done.code == 0
    assert all(name in done.out and line in done.out for name, line in built_in().items())
    assert "--set" in done.out


# train and run


def test_a_recipe_is_trained_and_its_model_used(run: Headway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_recipe(tmp_path, name="backwards")
    monkeypatch.chdir(tmp_path)
    done = run("train", "recipe.yaml", "--set", "budget.steps=4", "--set", "seed=5")
    assert done.code == 0, done.err
    assert "Use it: headway run runs/backwards" in done.out
    result = json.loads(Path("runs/backwards/result.json").read_text("utf-8"))
    assert result["steps"] == 4
    assert run("run", "runs/backwards", "abc").code == 0
    again = run("train", "recipe.yaml", "--set", "budget.steps=4", "--set", "seed=5")
    assert again.code == 1 and "--resume" in again.err and "--overwrite" in again.err


def test_one_word_is_answered_bare_and_several_beside_their_inputs(run: Headway, trained: Path) -> None:
    model = headway.load(trained)
    answers = [g.text for g in model.generate(["abc", "hgf"])]
    assert run("run", trained, "abc").out == f"{answers[0]}\n"
    assert run("run", trained, "abc", "hgf").out == f"abc\t{answers[0]}\nhgf\t{answers[1]}\n"
    wide = [g.text for g in model.generate(["abc", "hgf"], beams=3)]
    assert run("run", trained, "abc", "hgf", "--beams", 3).out == f"abc\t{wide[0]}\nhgf\t{wide[1]}\n"


def test_a_file_and_standard_input_are_answered_alike(run: Headway, trained: Path, tmp_path: Path) -> None:
    """Blank lines are nothing; a byte order mark, Windows' line ends and a missing last one change nothing."""
    expected = "".join(
        f"{w}\t{g.text}\n" for w, g in zip(("abc", "hgf"), headway.load(trained).generate(["abc", "hgf"]), strict=True)
    )
    for lines in (b"abc\nhgf\n", b"abc\n\n  \nhgf", b"\xef\xbb\xbfabc\r\nhgf\r\n"):
        (tmp_path / "words.txt").write_bytes(lines)
        for done in (run("run", trained, "--file", tmp_path / "words.txt"), run("run", trained, stdin=lines)):
            assert done == (0, expected, "")


def test_a_long_file_is_answered_whole_and_in_order(run: Headway, trained: Path, tmp_path: Path) -> None:
    words = [
        f"{'abcdefgh'[i % 8]}{'abcdefgh'[i // 8 % 8]}{'hgfedcba'[i // 64 % 8]}abcdefghabcdefgh" for i in range(2000)
    ]
    (tmp_path / "words.txt").write_text("\n".join(words), "utf-8")
    done = run("run", trained, "--file", tmp_path / "words.txt")
    assert [line.partition("\t")[0] for line in done.out.splitlines()] == words


def test_an_unknown_character_is_answered_with_a_warning(run: Headway, trained: Path) -> None:
    done = run("run", trained, "abé")
    assert done.code == 0
    assert done.out.endswith("\n")
    assert done.err == "headway: 'abé' has 'é', which the model never saw\n"
    assert run("run", trained, "abc").err == ""


def test_a_model_of_whitespace_words_warns_of_words(run: Headway, tmp_path: Path) -> None:
    path = tmp_path / "words.tsv"
    path.write_text("input\ttarget\n" + "".join(f"one two {'three ' * i}\tA\n" for i in range(1, 40)), "utf-8")
    words = {"kind": "whitespace"}
    headway.train(
        task(path, tokenizers={"input": words, "target": words}, max_tokens=64, budget={"steps": 1}),
        out=tmp_path / "run",
    )
    assert run("run", tmp_path / "run", "one two three").err == ""
    assert (
        run("run", tmp_path / "run", "one zwei three").err
        == "headway: 'one zwei three' has 'zwei', which the model never saw\n"
    )


# compare


def test_a_comparison_leaves_results_a_report_and_models_that_load(run: Headway, tmp_path: Path) -> None:
    models = {name: {"title": name.title(), "model": ARCHITECTURES[name]} for name in ("rnn", "transformer")}
    recipe = write_recipe(tmp_path, model=None, models=models, title="Backwards")
    done = run("compare", recipe, "--out", tmp_path / "out", "--set", "budget.steps=6")
    assert done.code == 0, done.err
    assert "Fewest errors" in done.out and str(tmp_path / "out" / "report.html") in done.out
    results = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert results.keys() == {
        "name", "title", "created", "command", "hardware", "versions", "budget", "data", "models", "metric",
        "objective",
    }  # fmt: skip
    assert results["budget"] == {"steps": 6}
    assert results["data"].keys() == {"source", "input", "target", "train", "valid", "test"}
    assert [model["name"] for model in results["models"]] == ["rnn", "transformer"]
    for model in results["models"]:
        assert model.keys() >= {
            "name", "title", "source", "parameters", "train_tokens_per_second", "valid_loss", "per", "wer",
            "decode_words_per_second", "peak_memory_bytes", "seconds", "steps", "tokens", "by_length", "curve",
            "samples", "alignments",
        }  # fmt: skip
        assert model["steps"] == 6
        assert model["curve"][0].keys() == {"step", "seconds", "tokens", "loss", "valid_loss"}
        assert model["samples"][0].keys() == {"input", "expected", "predicted", "correct"}
        answers = {sample["input"]: sample["predicted"] for sample in model["samples"]}
        loaded = headway.load(tmp_path / "out" / model["name"])
        assert [g.text for g in loaded.generate(answers)] == list(answers.values())
    rnn, transformer = results["models"]
    assert [s["input"] for s in rnn["samples"]] == [s["input"] for s in transformer["samples"]]
    assert not rnn["alignments"], "a fixed vector looks nowhere"
    for alignment in transformer["alignments"]:
        assert len(alignment["weights"]) == len(alignment["output"])
        assert {len(row) for row in alignment["weights"]} == {len(alignment["input"])}
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "Backwards" in page and "Transformer" in page
    resumed = run("compare", recipe, "--out", tmp_path / "out", "--set", "budget.steps=6", "--resume")
    assert resumed.code == 0, resumed.err
    kept = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert kept["models"] == results["models"]


def test_a_fault_in_the_last_model_is_found_before_the_first_is_trained(run: Headway, tmp_path: Path) -> None:
    wrong = {**ARCHITECTURES["rnn"], "encoder": {"blocks": [{"mixer": {"name": "rmn"}}]}}
    models = {"good": {"model": ARCHITECTURES["rnn"]}, "wrong": {"model": wrong}}
    recipe = write_recipe(tmp_path, model=None, models=models)
    mistake(run("compare", recipe, "--out", tmp_path / "out"), "did you mean 'rnn'?")
    assert not (tmp_path / "out" / "good").exists()


# plugins

PLUGIN = '''
from headway.mixers import Mixer
from headway.layers import residual_output
from headway.state import Recurrent
from torch import nn


class Echo(Mixer):
    """Each token for itself."""

    CAN = frozenset({"causal", "bidirectional", "padding", "stream"})

    def __init__(self, width: int, *, positions=None, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = gain
        self.out = residual_output(nn.Linear(width, width))

    def forward(self, x, *, mask, pos, state=None, context=None):
        self.require(mask, state, context)
        return self.out(self.gain * x)

    def init_state(self, batch, capacity, cross=False):
        return Recurrent()
'''


def test_a_mixer_of_ones_own_trains_and_runs(run: Headway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "outside"
    package.mkdir()
    (package / "__init__.py").write_text("", "utf-8")
    (package / "echo.py").write_text(PLUGIN, "utf-8")
    mixer = {"name": "outside.echo", "gain": 0.5}
    blocks = {"positions": {"name": "none"}, "blocks": [{"mixer": mixer, "cross": {"name": "attention", "heads": 2}}]}
    model = {"kind": "seq2seq", "width": 16, "encoder": {"blocks": [{"mixer": mixer}]}, "decoder": blocks}
    recipe = write_recipe(tmp_path, model=model, budget={"steps": 2})
    monkeypatch.chdir(tmp_path)
    try:
        mistake(run("train", recipe, "--out", "run"), "pass --plugin outside.echo")
        done = run("train", recipe, "--out", "run", "--plugin", "outside.echo")
        assert done.code == 0, done.err
        assert run("run", "run", "abc", "--plugin", "outside.echo").code == 0
    finally:
        for name in ("outside", "outside.echo"):
            sys.modules.pop(name, None)
    mistake(run("run", "run", "abc"), "pass --plugin outside.echo")


def test_a_plugin_that_is_not_there_is_one_line(run: Headway, tmp_path: Path) -> None:
    mistake(run("train", write_recipe(tmp_path), "--plugin", "no_such.module"), "--plugin no_such.module")


def test_files_beside_the_user_are_not_imported_unasked(
    run: Headway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cmudict.py in somebody's folder is theirs; only --plugin looks there, and behind what is installed."""
    recipe = write_recipe(tmp_path, budget={"steps": 1})
    monkeypatch.setattr(sys, "path", before := [entry for entry in sys.path if entry])
    kept = list(before)
    assert run("train", recipe, "--out", tmp_path / "run").code == 0
    assert sys.path == kept
    assert run("train", recipe, "--out", tmp_path / "again", "--plugin", "json").code == 0
    assert sys.path == [*kept, ""]


# mistakes


def mistake(done: Outcome, words: str) -> None:
    """Status 1, and one line on standard error that says what is wrong."""
    assert done.code == 1, done
    lines = done.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("headway: "), done.err
    assert words in lines[0]
    assert "Traceback" not in done.out + done.err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["bach_tokens=5"], "did you mean 'batch_tokens'?"),
        (["seed=seven"], "`seed`"),
        (["seed"], "expected key=value"),
        (["model.widht=5"], "did you mean 'width'?"),
        (["model.width=wide"], "width"),
        (["model.width=0"], "width"),
        (["model.encoder.positions.name=none", "model.encoder.blocks.0.mixer.heads=3"], "no multiple of 3 heads"),
        (["model.encoder.blocks.0.mixer.heads=0"], "`heads`"),
        (["model.encoder.blocks.0.feedforward.hidden=-1"], "hidden"),
        (["model.encoder.blocks.0.mixer.name=atention"], "did you mean 'attention'?"),
        (["model.kind=seq2sec"], "did you mean 'seq2seq'?"),
        (["model.dropout=2"], "dropout"),
        (["model=null"], "either `model`"),
        (["objective.name=seq"], "no objective 'seq'"),
        (["optimizer.lr=-1"], "optimizer.lr"),
        (["max_tokens=3"], "raise max_tokens"),
        (["batch_tokens=5"], "tokens"),
        (["data.source=nothing.tsv"], "nothing.tsv"),
        (["data.input=inptu"], "did you mean 'input'?"),
        (["budget.steps=0"], "budget"),
        (["name=../outside"], "cannot name a folder"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_mistake_in_a_recipe_is_one_line(
    run: Headway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path)
    mistake(run("train", recipe, *(part for setting in settings for part in ("--set", setting))), words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"input\ttarget\n", "no rows"),
        (b"word\tsound\na\tA\n", "no column 'input'"),
        (b"input\ttarget\nab\tA B\ncaf\xe9\tC\n", "pairs.tsv:3: not UTF-8"),
        (b"input\ttarget\nab\n", "pairs.tsv:2"),
        (b"input\ttarget\n" + b"a" * 30 + b"\tA\n", "raise max_tokens"),
        (b"input\ttarget\nab\tA\n", "give more rows"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_mistake_in_the_data_is_one_line(run: Headway, tmp_path: Path, content: bytes, words: str) -> None:
    recipe = write_recipe(tmp_path)
    (tmp_path / "pairs.tsv").write_bytes(content)
    mistake(run("train", recipe, "--out", tmp_path / "run"), words)


def test_a_missing_recipe_is_one_line(run: Headway) -> None:
    for command in ("train", "compare"):
        mistake(run(command, "dmeo"), "did you mean 'demo'?")


def test_a_recipe_for_the_other_command_is_told_so(run: Headway, tmp_path: Path) -> None:
    mistake(run("compare", write_recipe(tmp_path)), "use headway train")
    mistake(run("train", "demo"), "use headway compare")


def test_a_folder_that_is_no_model_is_one_line(run: Headway, tmp_path: Path) -> None:
    mistake(run("run", tmp_path / "nothing", "abc"), "no model here")
    mistake(run("run", tmp_path, "abc"), "no model here")


def test_a_mistake_in_what_is_asked_is_one_line(run: Headway, trained: Path, tmp_path: Path) -> None:
    mistake(run("run", trained, "a" * 25), "25 tokens; this model takes 24")
    mistake(run("run", trained, ""), "empty text")
    mistake(run("run", trained, "--file", tmp_path / "nothing.txt"), "nothing.txt")
    mistake(run("run", trained, "--file", tmp_path), str(tmp_path))
    (tmp_path / "words.txt").write_bytes(b"abc\ncaf\xe9\n")
    mistake(run("run", trained, "--file", tmp_path / "words.txt"), "words.txt:2: not UTF-8")
    mistake(run("run", trained, stdin=b"abc\n\ncaf\xe9"), "standard input:3: not UTF-8")


def test_a_place_that_cannot_be_written_is_one_line(run: Headway, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    mistake(run("train", recipe, "--out", tmp_path / "pairs.tsv"), "cannot be the folder of a run")
    mistake(run("train", recipe, "--out", tmp_path / "pairs.tsv" / "run"), "cannot be the folder of a run")
    mistake(run("train", recipe, "--out", tmp_path), "left alone")


def test_the_shell_sees_the_same(trained: Path) -> None:
    done = shell("-m", "headway", "run", str(trained), stdin="abc\nhgf\n")
    assert done.returncode == 0, done.stderr
    assert [line.partition("\t")[0] for line in done.stdout.splitlines()] == ["abc", "hgf"]
    assert done.stderr == ""
