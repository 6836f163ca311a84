"""`headway generate`: one prompt as it is written, many in batches, mistakes in one line."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from test_store import saved
from test_write import PROMPTS, loaded
from typer.testing import CliRunner, Result

from headway.cli import app
from headway.commands.generate import _prompts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("writer") / "model"
    loaded(ends=()).save(folder)
    return folder


def run(*words: object, text: str | None = None) -> Result:
    return CliRunner().invoke(app, ["generate", *map(str, words)], input=text)


def test_one_prompt_is_answered_as_in_python(model: Path) -> None:
    done = run(model, PROMPTS[0], "-n", 9)
    assert done.exit_code == 0, done.output
    assert done.stdout == loaded(ends=()).generate([PROMPTS[0]], max_tokens=9)[0].text + "\n"


def test_lines_of_a_file_or_a_pipe_are_answered_in_order(model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n", "utf-8")
    filed = run(model, "--file", tmp_path / "prompts.txt", "-n", 5, "--json")
    piped = run(model, "-n", 5, "--json", text="\n".join(PROMPTS))
    assert filed.exit_code == 0 and filed.stdout == piped.stdout
    records = [json.loads(line) for line in filed.stdout.splitlines()]
    expected = loaded(ends=()).generate(PROMPTS, max_tokens=5)
    assert [r["prompt"] for r in records] == PROMPTS
    assert [r["text"] for r in records] == [e.text for e in expected]
    assert [r["log_probabilities"] for r in records] == [pytest.approx(e.log_probabilities, abs=1e-4) for e in expected]


def test_many_answers_are_a_line_each(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from headway.generate import texts

    def write(model: object, prompts: list[str], how: object, **named: object) -> list[texts.Generation]:
        return [texts.Generation("a\nb", [], [], 0.0, (), "end") for _ in prompts]

    monkeypatch.setattr(texts, "generate", write)
    assert run(model, "x", "y").stdout == "x\ta\\nb\ny\ta\\nb\n"


def test_what_was_answered_is_printed_before_a_later_prompt_fails(model: Path, tmp_path: Path) -> None:
    prompts = [*PROMPTS * 9, "too long for sixty-four places " * 9]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), "utf-8")
    done = run(model, "--file", tmp_path / "prompts.txt", "-n", 3, "--temperature", 2, "--json")
    assert "this model takes 64" in str(done.exception)
    said = [json.loads(line)["ids"] for line in done.stdout.splitlines()]
    drawn = loaded(ends=()).generate(prompts[:36], max_tokens=3, temperature=2.0)
    assert len(said) == 32 and said == [one.ids for one in drawn][:32]


def test_a_pipe_of_other_bytes_is_refused_in_one_line(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.TextIOWrapper(io.BytesIO(b"the cat\ncaf\xe9\n"), "utf-8", "surrogateescape")  # as where LANG is unset
    monkeypatch.setattr("sys.stdin", pipe)
    with pytest.raises(ValueError, match=r"^standard input: not UTF-8 at byte 11; convert it with iconv$"):
        _prompts(None, None)


def test_a_seed_repeats_on_the_command_line(model: Path) -> None:
    one, two, other = (run(model, PROMPTS[0], "--temperature", 2, "--seed", seed).stdout for seed in (1, 1, 2))
    assert one == two != other


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a", "--top-k", "4"], "temperature 0 draws nothing"),
        (["a", "--beams", "2", "--temperature", "1"], "beams keep the likeliest"),
        (["a", "--chat"], "chat"),
        (["a", "--task", "translate"], "no prefix for the task"),
        (["a", "--quantize", "int3"], "quantize is int8 or nothing"),
        (["a", "--dtype", "float8"], "dtype is float32"),
        (["a", "--file", "x.txt"], "not both"),
    ],
)
def test_a_mistake_is_one_line(model: Path, words: list[str], said: str) -> None:
    done = run(model, *words)
    assert isinstance(done.exception, ValueError) and said in str(done.exception)
    assert "\n" not in str(done.exception)


def test_a_model_that_headway_trained_is_told_its_own_command(tmp_path: Path) -> None:
    done = run(saved(tmp_path / "model"), "abc")
    assert isinstance(done.exception, ValueError) and "`headway run" in str(done.exception)
