"""Claims about what is on the disk: written whole or not at all, never trusted when read, and never a pickle."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURES, fresh

import headway
from headway import store
from headway.hub import Loaded
from headway.store import read_folder, write_folder, write_text
from headway.text import Tokenizer, TokenizerSpec


def saved(folder: Path, name: str = "transformer") -> Path:
    source = Tokenizer.train(TokenizerSpec(), ["abcdefgh"])
    target = Tokenizer.train(TokenizerSpec("whitespace"), ["A B C D E F G H I"])
    spec = {**ARCHITECTURES[name], "source_vocab": source.vocab, "target_vocab": target.vocab}
    Loaded(fresh(name, source.vocab, target.vocab), spec, source, target, max_tokens=20).save(folder)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def sign(folder: Path) -> None:
    """A manifest that vouches for what is there now: from here on, only the reading itself can object."""
    files = [path for path in folder.iterdir() if path.name != "manifest.json"]
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (folder / "manifest.json").write_text(json.dumps(sums), "utf-8")


def refusal(folder: Path) -> str:
    """The one line with which a folder is refused, in under a second."""
    began = time.perf_counter()
    with pytest.raises(ValueError) as fault:
        headway.load(folder)
    assert time.perf_counter() - began < 1
    text = str(fault.value)
    assert "\n" not in text
    assert str(folder) in text
    return text


# writing


def test_a_model_comes_back_as_it_was(model: Path) -> None:
    one, again = headway.load(model), headway.load(model)
    assert one.generate(["abc", "h"]) == again.generate(["abc", "h"])
    again.save(model.parent / "again")
    assert contents(model) == contents(model.parent / "again")


WRITES = ["mkdir", "save_file", "write_text", "_flush", "rename", "rename after the old one stepped aside"]


@pytest.mark.parametrize(
    ("failing", "old"), [(write, old) for write in WRITES for old in (False, True) if old or write != WRITES[-1]]
)
def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, old: bool
) -> None:
    folder = tmp_path / "folder"
    if old:
        write_folder(folder, {"t": {"x": torch.zeros(3)}}, {"r": 1})
    before = contents(folder) if old else None

    def full(*anything: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    rename, calls = os.rename, []

    def second(source: Any, target: Any) -> None:
        calls.append(source)
        if len(calls) == 2:
            full()
        rename(source, target)

    with monkeypatch.context() as patch:
        if failing == WRITES[-1]:
            patch.setattr(os, "rename", second)
        elif failing == "rename":
            patch.setattr(os, "rename", full)
        elif failing in ("mkdir", "write_text"):
            patch.setattr(Path, failing, full)
        else:
            patch.setattr(store, failing, full)
        with pytest.raises(ValueError, match=r"cannot write .*No space left on device") as fault:
            write_folder(folder, {"t": {"x": torch.ones(3)}}, {"r": 2})
    assert "\n" not in str(fault.value)
    assert [path.name for path in tmp_path.iterdir()] == (["folder"] if old else [])
    assert not old or contents(folder) == before


def test_a_disk_that_fills_while_tensors_are_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors does not raise an OSError there."""

    def full(*anything: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(ValueError, match=r"cannot write .*No space left"):
        write_folder(tmp_path / "folder", {"t": {"x": torch.ones(3)}}, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failing", ["write_text", "_flush", "replace"])
def test_a_failed_small_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    file = tmp_path / "results.json"
    write_text(file, "old")

    def full(*anything: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    where: Any = {"write_text": Path, "_flush": store, "replace": os}[failing]
    with monkeypatch.context() as patch:
        patch.setattr(where, failing, full)
        with pytest.raises(ValueError, match="cannot write"):
            write_text(file, "new")
    assert {path.name: path.read_text("utf-8") for path in tmp_path.iterdir()} == {"results.json": "old"}


def test_a_stop_in_the_middle_of_a_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*anything: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "_swap", stop)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "folder", {}, {"r": 1})
    assert not list(tmp_path.iterdir())


def test_shared_weights_are_written_and_come_back(tmp_path: Path) -> None:
    shared = torch.randn(4)
    write_folder(tmp_path / "folder", {"t": {"a": shared, "b": shared}}, {})
    tensors, _ = read_folder(tmp_path / "folder")
    assert torch.equal(tensors["t"]["a"], shared) and torch.equal(tensors["t"]["b"], shared)


# reading


def flip(file: Path, draw: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def truncate(file: Path, draw: random.Random) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: draw.randrange(len(data))])


def lengthen(file: Path, draw: random.Random) -> None:
    file.write_bytes(file.read_bytes() + draw.randbytes(draw.randint(1, 50)))


def delete(file: Path, draw: random.Random) -> None:
    file.unlink()


@pytest.mark.parametrize("change", [flip, truncate, lengthen, delete])
def test_no_changed_byte_goes_unnoticed(
    whole: Path, tmp_path: Path, change: Callable[[Path, random.Random], None]
) -> None:
    """25 folders a kind of change, 100 in all; any file may be hit, the manifest among them."""
    draw = random.Random(change.__name__)
    for i in range(25):
        folder = Path(shutil.copytree(whole, tmp_path / str(i)))
        files = sorted(folder.iterdir())
        file = files[i % len(files)]
        change(file, draw)
        said = refusal(folder)
        # a manifest that is still one may put the blame on what it tells of
        assert file.name in said or file.name == "manifest.json"


def test_a_signed_folder_with_random_bytes_is_loaded_or_refused_in_one_line(whole: Path, tmp_path: Path) -> None:
    """The sums are right here, as an attacker's would be. What still parses may load, and must then answer."""
    draw = random.Random(0)
    outcomes = {"loaded": 0, "refused": 0}
    for i in range(60):
        folder = Path(shutil.copytree(whole, tmp_path / str(i)))
        file = folder / draw.choice(["spec.json", "source.json", "target.json", "model.safetensors"])
        draw.choice([flip, flip, truncate, lengthen])(file, draw)
        sign(folder)
        began = time.perf_counter()
        try:
            loaded = headway.load(folder)
        except ValueError as error:
            assert "\n" not in str(error)
            assert str(folder) in str(error)
            outcomes["refused"] += 1
        else:
            loaded.generate(["abc"])
            outcomes["loaded"] += 1
        assert time.perf_counter() - began < 1
    assert min(outcomes.values()) > 5


HOSTILE = [
    ({"width": 64}, "model.safetensors"),
    ({"width": 2**20}, "model.safetensors"),
    ({"width": 10**9}, "spec.json"),
    ({"width": 0}, "spec.json"),
    ({"width": -1}, "spec.json"),
    ({"width": "32"}, "spec.json"),
    ({"dropout": 2.0}, "spec.json"),
    ({"source_vocab": 10**12}, "spec.json"),
    ({"kind": "../../etc"}, "spec.json"),
    ({"kind": "os"}, "spec.json"),
    ({"encoder": None}, "spec.json"),
    ({"encoder": {"blocks": []}}, "spec.json"),
    ({"encoder": {"blocks": [{"mixer": {"name": "os.path"}}]}}, "spec.json"),
    ({"encoder": {"blocks": [{"mixer": {"name": "antigravity.thing"}}]}}, "spec.json"),
    ({"encoder": {"blocks": [{"mixer": {"name": "attention", "heads": 0}}]}}, "spec.json"),
    ({"encoder": {"blocks": [{"mixer": {"name": "rnn", "hidden": -5}}]}}, "spec.json"),
    ({"surprise": 1}, "spec.json"),
]


@pytest.mark.parametrize(("changed", "blamed"), HOSTILE, ids=lambda value: str(value)[:60])
def test_a_spec_that_lies_is_refused_at_no_cost(model: Path, changed: dict[str, Any], blamed: str) -> None:
    spec = json.loads((model / "spec.json").read_text("utf-8"))
    spec["model"] |= changed
    (model / "spec.json").write_text(json.dumps(spec), "utf-8")
    sign(model)
    assert blamed in refusal(model)


@pytest.mark.parametrize("path", ["../secret.json", "/etc/passwd", "..", ".", "", "a/b.json", "x.pt", "x\0.json"])
def test_a_manifest_reaches_nothing_outside_its_folder(model: Path, path: str) -> None:
    (model.parent / "secret.json").write_text("{}", "utf-8")
    sums = json.loads((model / "manifest.json").read_text("utf-8"))
    sums[path] = hashlib.sha256(b"{}").hexdigest()
    (model / "manifest.json").write_text(json.dumps(sums), "utf-8")
    assert "manifest.json" in refusal(model) or path.startswith("x")


@pytest.mark.parametrize("text", ["[]", "null", "7", '"text"', "{", "", "[" * 100_000, '{"spec.json": 1}'])
def test_a_manifest_that_is_none_is_refused(model: Path, text: str) -> None:
    (model / "manifest.json").write_text(text, "utf-8")
    refusal(model)


@pytest.mark.parametrize("file", ["spec.json", "source.json", "target.json"])
@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"model": {}}', "[" * 100_000])
def test_a_signed_record_that_is_none_is_refused(model: Path, file: str, text: str) -> None:
    (model / file).write_text(text, "utf-8")
    sign(model)
    assert file in refusal(model)


def test_weights_of_another_model_are_refused(model: Path, tmp_path: Path) -> None:
    other = saved(tmp_path / "other", "conv")
    shutil.copy(other / "model.safetensors", model / "model.safetensors")
    sign(model)
    assert "model.safetensors" in refusal(model)


def test_tokenizers_of_another_model_are_refused(model: Path) -> None:
    source = (model / "source.json").read_bytes()
    (model / "source.json").write_bytes((model / "target.json").read_bytes())
    (model / "target.json").write_bytes(source)
    sign(model)
    assert "not the tokenizer" in refusal(model)


def changed_weights(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> str:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors")
    sign(model)
    return refusal(model)


def test_tensors_that_do_not_fit_are_named(model: Path) -> None:
    assert "head.weight" in changed_weights(model, lambda t: t.update({"head.weight": torch.zeros(2, 2)}))
    assert "head.bias" in changed_weights(model, lambda t: t.pop("head.bias"))
    assert "1 unexpected" in changed_weights(model, lambda t: t.update({"payload": torch.zeros(1)}))


@pytest.mark.parametrize("length", [2**63, 2**40, 100_000_000, 3])
def test_a_giant_header_is_refused_unread(model: Path, length: int) -> None:
    (model / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}" * 100)
    sign(model)
    assert "model.safetensors" in refusal(model)


class Payload:
    """Unpickling this would leave a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("file", ["spec.json", "source.json", "model.safetensors", "manifest.json"])
def test_a_pickle_is_refused_and_never_opened(model: Path, tmp_path: Path, file: str) -> None:
    mark = tmp_path / "mark"
    (model / file).write_bytes(pickle.dumps(Payload(mark)))
    if file != "manifest.json":
        sign(model)
    assert file in refusal(model)
    torch.save({"x": torch.zeros(1)}, model / file)
    if file != "manifest.json":
        sign(model)
    assert file in refusal(model)
    assert not mark.exists()


@pytest.mark.parametrize("there", ["nothing", "empty folder", "file"])
def test_a_folder_without_a_model_is_named(tmp_path: Path, there: str) -> None:
    folder = tmp_path / "model"
    if there == "file":
        folder.write_text("", "utf-8")
    elif there == "empty folder":
        folder.mkdir()
    assert "no model here" in refusal(folder)
