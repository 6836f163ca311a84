"""The commands for using a model do what they say, go on where they were stopped, and take a mistake in one line."""

from __future__ import annotations

import csv
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from readers import dual, published, vision
from shell import Headway, Outcome

import headway
from headway.use import rows, stream

TEXTS = [f"the {'red ' * (i % 5)}cat {i % 7} is in the house" for i in range(40)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a tiny model of an architecture."""
    kept: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in kept:
            kept[architecture] = tmp_path_factory.mktemp("model")
            published(kept[architecture], architecture)
        return kept[architecture]

    return make


def write_texts(folder: Path) -> dict[str, Path]:
    """The same texts in every kind of file."""
    import pyarrow
    import pyarrow.parquet

    files = {kind: folder / f"texts.{kind}" for kind in ("txt", "csv", "tsv", "jsonl", "parquet")}
    files["txt"].write_text("\n".join(TEXTS))
    for kind, mark in (("csv", ","), ("tsv", "\t")):
        with files[kind].open("w", newline="") as file:
            csv.writer(file, delimiter=mark).writerows([("id", "text"), *enumerate(TEXTS)])
    files["jsonl"].write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), files["parquet"])
    return files


# --- embed


@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "jsonl", "parquet"])
def test_every_kind_of_file_gives_the_vectors_of_its_texts(
    run: Headway, folders: Any, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "CHUNK", 7)
    folder, out = folders("BertModel"), tmp_path / "out.npy"
    done = run("embed", folder, write_texts(tmp_path)[kind], "-o", out, "--pooling", "mean", "--normalize")
    assert done.code == 0 and "40 vectors of 32" in done.out, done
    wanted = headway.load(folder).embed(TEXTS, pooling="mean", normalize=True)
    np.testing.assert_allclose(np.load(out), wanted.numpy(), atol=1e-6)
    assert sorted(p.name for p in tmp_path.glob("*out*")) == ["out.npy"]


def test_parquet_out_has_each_text_beside_its_vector(run: Headway, folders: Any, tmp_path: Path) -> None:
    import pyarrow.parquet

    folder, out = folders("BertModel"), tmp_path / "out.parquet"
    assert run("embed", folder, write_texts(tmp_path)["csv"], "-o", out, "--pooling", "first").code == 0
    table = pyarrow.parquet.read_table(out)
    assert table.column_names == ["text", "embedding"] and table["text"].to_pylist() == TEXTS
    wanted = headway.load(folder).embed(TEXTS, pooling="first").numpy()
    np.testing.assert_allclose(np.stack(table["embedding"].to_numpy()), wanted, atol=1e-6)
    assert sorted(p.name for p in tmp_path.glob("*out*")) == ["out.parquet"]


class Stopped:
    """Presses Ctrl-C in the third chunk, once some vectors of it are there but not written."""

    def __init__(self, after: int) -> None:
        self.after, self.calls, self.seen = after, 0, [0]
        self.real = stream.embed

    def __call__(self, model: Any, inputs: Any, **how: Any) -> torch.Tensor:
        self.calls += 1
        if self.calls > self.after:
            raise KeyboardInterrupt
        self.seen.append(len(inputs))
        return self.real(model, inputs, **how)


def stop(run: Headway, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Outcome:
    with monkeypatch.context() as patch:
        patch.setattr(rows, "CHUNK", 7)
        patch.setattr(stream, "embed", Stopped(2))
        return run("embed", *arguments)


@pytest.mark.parametrize("ending", ["npy", "parquet"])
def test_a_stopped_run_goes_on_at_the_exact_row_and_ends_in_the_same_file(
    run: Headway, folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    folder, file, out = folders("BertModel"), write_texts(tmp_path)["txt"], tmp_path / f"out.{ending}"
    whole = tmp_path / f"whole.{ending}"
    assert run("embed", folder, file, "-o", whole, "--pooling", "mean").code == 0
    stopped = stop(run, monkeypatch, folder, file, "-o", out, "--pooling", "mean")
    assert stopped.code == 130 and not out.exists()
    assert f"Go on with: headway embed {folder} {file} -o {out} --pooling mean --resume" in stopped.err
    part = tmp_path / f"{out.name}.part"
    assert json.loads((tmp_path / f"{part.name}.json").read_text())["rows"] == 14
    with part.open("ab") as torn:  # what was written behind the last record does not count
        torn.write(b"torn")
    again = run("embed", folder, file, "-o", out, "--pooling", "mean")
    assert again.code == 1 and "a run was stopped here: --resume goes on with it" in again.err
    spy = Stopped(99)
    with monkeypatch.context() as patch:
        patch.setattr(stream, "embed", spy)
        assert run("embed", folder, file, "-o", out, "--pooling", "mean", "--resume").code == 0
    assert sum(spy.seen) == 40 - 14
    if ending == "npy":
        np.testing.assert_allclose(np.load(out), np.load(whole), atol=1e-6)
    else:
        import pyarrow.parquet

        one, two = (pyarrow.parquet.read_table(path) for path in (out, whole))
        assert one["text"] == two["text"]
        np.testing.assert_allclose(*(np.stack(t["embedding"].to_numpy()) for t in (one, two)), atol=1e-6)
    assert not part.exists() and not (tmp_path / f"{part.name}.json").exists()


def test_a_run_goes_on_with_its_own_file_model_and_options_alone(
    run: Headway, folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file, out = folders("BertModel"), write_texts(tmp_path)["txt"], tmp_path / "out.npy"
    how = ("-o", out, "--pooling", "mean")
    stop(run, monkeypatch, folder, file, *how)
    before = (tmp_path / "out.npy.part").read_bytes()
    other = tmp_path / "other"
    published(other, "BertForMaskedLM")
    changed = tmp_path / "changed.txt"
    changed.write_text(file.read_text().replace("cat 3", "cat 4"))
    for arguments, said in (
        ((folder, changed, *how), "is not the file that it was then"),
        ((other, file, *how), "model or options differ"),
        ((folder, file, "-o", out, "--pooling", "last"), "model or options differ"),
        ((folder, file, *how, "--normalize"), "model or options differ"),
        ((folder, file, *how, "--quantize", "int8"), "model or options differ"),
    ):
        done = run("embed", *arguments, "--resume")
        assert done.code == 1 and said in done.err and done.err.count("\n") == 1, done
    assert (tmp_path / "out.npy.part").read_bytes() == before
    (tmp_path / "out.npy.part").write_bytes(before[:200])
    done = run("embed", folder, file, *how, "--resume")
    assert done.code == 1 and "not what its record says" in done.err


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("gap.txt", "a cat\n\na dog\n", "gap.txt:2: an empty line; mend or remove it"),
        ("latin.txt", b"a cat\ncaf\xe9\n", "latin.txt:2: not UTF-8"),
        ("nothing.txt", "", "nothing to embed, it has no rows"),
        ("no_column.csv", "body\na cat\n", "no column 'text'. It has: body"),
        ("no_key.jsonl", '{"text": "a"}\n{"txt": "a"}\n', "no_key.jsonl:2: no key 'text', did you mean 'txt'"),
        ("long.txt", "cat " * 50, "has 52 tokens; this model takes 40"),
    ],
)
def test_a_bad_row_is_one_line_that_says_where_and_nothing_is_left(
    run: Headway, folders: Any, tmp_path: Path, name: str, content: str | bytes, said: str
) -> None:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    done = run("embed", folders("BertModel"), file, "-o", tmp_path / "out.npy", "--pooling", "mean")
    assert done.code == 1 and said in done.err and done.err.count("\n") == 1, done.err
    assert not list(tmp_path.glob("out.npy*"))


def test_where_vectors_go_is_checked_before_any_work(run: Headway, folders: Any, tmp_path: Path) -> None:
    folder, file = folders("BertModel"), write_texts(tmp_path)["txt"]
    (tmp_path / "there.npy").write_bytes(b"precious")
    for out, said in (
        ("out.bin", "written to a .npy or .parquet file"),
        ("there.npy", "is there already"),
        ("none/out.npy", "no such folder: make it"),
    ):
        done = run("embed", folder, file, "-o", tmp_path / out, "--pooling", "mean")
        assert done.code == 1 and said in done.err
    assert (tmp_path / "there.npy").read_bytes() == b"precious"
    done = run("embed", folder, tmp_path / "none.txt", "-o", tmp_path / "out.npy")
    assert done.code == 1 and "none.txt: no such file" in done.err


def test_the_bar_is_no_part_of_what_a_pipe_reads(run: Headway, folders: Any, tmp_path: Path) -> None:
    done = run(
        "embed", folders("BertModel"), write_texts(tmp_path)["txt"], "-o", tmp_path / "o.npy", "--pooling", "mean"
    )
    assert done.out == f"40 vectors of 32: {tmp_path / 'o.npy'}\n"


def test_a_stopped_run_tells_every_option_that_it_had(
    run: Headway, folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file, out = folders("BertModel"), write_texts(tmp_path)["txt"], tmp_path / "out.npy"
    stopped = stop(run, monkeypatch, folder, file, "-o", out, "--pooling", "mean", "--quantize", "int8")
    again = shlex.split(stopped.err.partition("Go on with: headway ")[2])
    assert run(*again).code == 0 and out.exists()


def test_time_left_follows_the_work_of_this_run_alone(folders: Any, tmp_path: Path) -> None:
    heard: list[stream.Progress] = []
    file = write_texts(tmp_path)["txt"]
    model = headway.load(folders("BertModel"))
    stream.embed_file(model, file, tmp_path / "out.npy", watch=heard.append, pooling="mean", batch_tokens=32)
    assert [one.share for one in heard] == sorted(one.share for one in heard) and len(heard) > 3
    assert heard[-1].share == pytest.approx(1) and heard[-1].rows == heard[-1].total == 40
    assert heard[-1].left == pytest.approx(0, abs=1e-6) and all(one.left > 0 for one in heard[:-1])


def draw(folder: Path) -> list[Path]:
    generator = np.random.default_rng(0)
    (folder / "deep").mkdir(parents=True)
    paths = [folder / "b.png", folder / "a.png", folder / "deep" / "c.png"]
    for path in paths:
        Image.fromarray(generator.integers(0, 255, (12, 10, 3), dtype=np.uint8)).save(path)
    (folder / "notes.txt").write_text("no picture")
    return sorted(paths)


def test_a_folder_of_pictures_and_a_list_of_them_give_their_vectors(run: Headway, tmp_path: Path) -> None:
    import pyarrow.parquet

    paths = draw(tmp_path / "pictures")
    listed = tmp_path / "pictures" / "list.txt"
    listed.write_text("b.png\ndeep/c.png\n")
    for name, model in (("dual", dual(tmp_path)), ("vision", vision())):
        folder = tmp_path / name
        model.save(folder)
        out = tmp_path / f"{name}.parquet"
        assert run("embed", folder, tmp_path / "pictures", "-o", out).code == 0
        table = pyarrow.parquet.read_table(out)
        assert table["path"].to_pylist() == [str(path) for path in paths]
        np.testing.assert_allclose(np.stack(table["embedding"].to_numpy()), model.embed(paths).numpy(), atol=1e-6)
        assert run("embed", folder, listed, "--images", "-o", tmp_path / f"{name}.npy").code == 0
        np.testing.assert_allclose(np.load(tmp_path / f"{name}.npy"), model.embed(paths[1:]).numpy(), atol=1e-6)


def test_a_picture_is_known_by_its_name_and_refused_by_what_reads_texts(
    run: Headway, folders: Any, tmp_path: Path
) -> None:
    paths, folder, out = draw(tmp_path / "pictures"), tmp_path / "dual", tmp_path / "out.npy"
    dual(tmp_path).save(folder)
    for wrong in (paths[0], tmp_path / "pictures"):
        done = run("embed", folders("BertModel"), wrong, "-o", out, "--pooling", "mean")
        assert done.code == 1 and "pictures, and this model reads texts" in done.err and done.err.count("\n") == 1
    assert run("embed", folder, paths[0], "-o", out).code == 0 and np.load(out).shape == (1, 8)


# --- the others


def test_a_slip_with_a_file_is_not_taken_for_a_text(run: Headway, folders: Any, tmp_path: Path) -> None:
    folder = folders("BertForQuestionAnswering")
    for given, said in (("notes.txt", "no such file"), ("./notes", "no such file"), (tmp_path, "a folder")):
        done = run("answer", folder, "-q", "who ?", "-c", given)
        assert done.code == 1 and f"{given}: {said}; give a text file, or the text itself" in done.err
    (tmp_path / "empty.txt").touch()
    done = run("classify", folders("BertForSequenceClassification"), "--file", tmp_path / "empty.txt")
    assert done.code == 1 and "empty.txt: nothing to classify, it has no rows" in done.err
    assert "an empty name" in run("fill", "", "a [MASK]").err
    config = folders("BertForMaskedLM") / "config.json"
    assert f"name the folder of the model, {config.parent}" in run("fill", config, "a [MASK]").err


def test_bytes_that_are_no_text_are_named(run: Headway, folders: Any) -> None:
    done = run("fill", folders("BertForMaskedLM"), "caf\udce9 [MASK]")
    assert done.code == 1 and "cannot encode: character 3 is half a character or a byte that is no UTF-8" in done.err


def test_an_input_with_newlines_stays_one_line(run: Headway, folders: Any) -> None:
    done = run("classify", folders("BertForSequenceClassification"), "the cat\tis\nred")
    assert done.out.startswith("the cat is red\tLABEL_") and done.out.count("\n") == 1


def test_fill_prints_what_the_model_says(run: Headway, folders: Any) -> None:
    folder, text = folders("BertForMaskedLM"), "the [MASK] is in the [MASK]"
    wanted = headway.load(folder).fill(text, top=2)
    shown = run("fill", folder, text, "--top", 2).out.splitlines()
    assert (
        len(shown) == 4
        and shown[0] == f"gap 1\t{wanted[0][0].probability:.1%}\t{wanted[0][0].token}\t{wanted[0][0].text}"
    )
    record = json.loads(run("fill", folder, text, "--json").out)
    assert record["text"] == text and [len(gap) for gap in record["gaps"]] == [5, 5]
    assert (
        run("fill", folder, "no gap").err == "headway: fill: no gap in 'no gap': write [MASK] where a word is missing\n"
    )


def test_classify_takes_texts_or_a_file(run: Headway, folders: Any, tmp_path: Path) -> None:
    folder, files = folders("BertForSequenceClassification"), write_texts(tmp_path)
    wanted: Any = headway.load(folder).classify(TEXTS)
    lines = run("classify", folder, "--file", files["csv"]).out.splitlines()
    assert [line.split("\t")[:2] for line in lines] == [[t, w.label] for t, w in zip(TEXTS, wanted, strict=True)]
    record = json.loads(run("classify", folder, TEXTS[0], "--json").out)
    assert record["label"] == wanted[0].label and len(record["probabilities"]) == 3
    assert "one of them" in run("classify", folder).err
    words = run("classify", folders("BertForTokenClassification"), "anna lives in paris", "--json")
    assert all({"label", "start", "end"} <= set(span) for span in json.loads(words.out)["spans"])


def test_classify_tells_pictures_apart_by_labels(run: Headway, tmp_path: Path) -> None:
    model, paths = dual(tmp_path), draw(tmp_path / "pictures")
    model.save(tmp_path / "dual")
    wanted: Any = model.classify(paths, ["cat", "red house"])
    for given in (paths, ["--file", tmp_path / "pictures"]):
        done = run("classify", tmp_path / "dual", *given, "--labels", "cat, red house")
        assert [line.split("\t")[1] for line in done.out.splitlines()] == [one.label for one in wanted], done
    assert "give labels=" in run("classify", tmp_path / "dual", paths[0]).err


def test_answer_reads_a_file_or_the_text_itself(run: Headway, folders: Any, tmp_path: Path) -> None:
    folder, context = folders("BertForQuestionAnswering"), "anna lives in the red house. " * 10
    (tmp_path / "context.txt").write_text(context)
    wanted = headway.load(folder).answer("who lives ?", context, stride=8)
    for given in (context, tmp_path / "context.txt"):
        done = run("answer", folder, "-q", "who lives ?", "-c", given, "--stride", 8, "--top", 2, "--json")
        first, second = map(json.loads, done.out.splitlines())
        assert (first["start"], first["end"], first["text"]) == (wanted.start, wanted.end, wanted.text)
        assert first["score"] >= second["score"]
    shown = run("answer", folder, "-q", "who lives ?", "-c", context, "--stride", 8).out
    assert f"characters {wanted.start} to {wanted.end}" in shown and "no answer" in shown


@pytest.mark.parametrize("format", ["headway", "transformers"])
def test_save_writes_a_folder_that_loads_to_the_same(run: Headway, folders: Any, tmp_path: Path, format: str) -> None:
    folder = folders("BertModel")
    assert run("save", folder, tmp_path / "new", "--format", format).code == 0
    assert (tmp_path / "new" / "config.json").exists() == (format == "transformers")
    one, two = (headway.load(path).embed(TEXTS[:2], pooling="mean") for path in (folder, tmp_path / "new"))
    assert torch.equal(one, two)
    assert "is there already and not empty" in run("save", folder, tmp_path / "new").err
    assert "headway or transformers, not gguf" in run("save", folder, tmp_path / "x", "--format", "gguf").err


def test_the_commands_are_found_by_themselves_and_load_no_pytorch() -> None:
    import subprocess

    program = "import sys, headway.cli; assert not {'torch', 'numpy', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    from headway import commands

    assert {"embed", "fill", "classify", "answer", "save"} <= {command.__name__ for command in commands.found()}
