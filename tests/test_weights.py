"""Claims about published weight files: read exactly, or refused in one line; nothing is executed."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from headway import header, weights
from headway.weights import INDEX, SINGLE, open_weights, write_shards, write_weights

MUTATIONS: list[str] = []  # every mutated source that was opened, counted at the end


@pytest.fixture(autouse=True)
def nothing_unpickles(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a pickle was opened")

    for module, name in ((pickle, "load"), (pickle, "loads"), (torch, "load")):
        monkeypatch.setattr(module, name, forbidden)
    monkeypatch.setattr(pickle, "Unpickler", type("Unpickler", (), {"__init__": forbidden}))


def tensors() -> dict[str, Tensor]:
    return {
        "embedding.weight": torch.randn(7, 4),
        "layer.0.weight": torch.randn(4, 4).bfloat16(),
        "layer.0.bias": torch.randn(4).half(),
        "scale": torch.tensor(2.5),
        "none": torch.zeros(0, 4),
        "ids": torch.arange(5),
        "flags": torch.tensor([True, False, True]),
    }


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Bit for bit, as random bytes may be no numbers."""
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype
        and found[name].shape == tensor.shape
        and torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
        for name, tensor in expected.items()
    )


def answer(source: Path) -> dict[str, Tensor] | str:
    """All tensors, or the one line that refuses them and names the file; in under a second either way."""
    MUTATIONS.append(str(source))
    began = time.perf_counter()
    try:
        opened = open_weights(source)
        found: dict[str, Tensor] | str = {name: opened[name] for name in opened}
    except ValueError as error:
        found = str(error)
        assert "\n" not in found
        assert str(source) in found
        assert len(found) < 1000
    assert time.perf_counter() - began < 1
    return found


def file_of(folder: Path, record: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file with any header at all."""
    text = record if isinstance(record, bytes) else json.dumps(record).encode()
    file = folder / SINGLE
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return file


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_file(tensors(), tmp_path / SINGLE, {"format": "pt"})
    return tmp_path / SINGLE


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    (tmp_path / "sharded").mkdir()
    write_shards(tmp_path / "sharded", tensors(), 60)
    return tmp_path / "sharded"


# reading


@pytest.mark.parametrize("window", [1, 16, 50, 2**24])
def test_tensors_come_back_as_they_were_through_any_window(single: Path, window: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(weights, "WINDOW", window)
    expected = load_file(single)
    for source in (single, single.parent):
        opened = open_weights(source)
        assert same(opened, expected)
        assert {name: len(t.shape) for name, t in expected.items()} == {n: len(s) for n, s in opened.shapes.items()}


def test_names_shapes_and_dtypes_are_known_without_reading_data(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_weights(sharded)
    monkeypatch.setattr(weights, "_open", lambda file: pytest.fail("data were read"))
    expected = tensors()
    assert list(opened) == list(expected)
    assert opened.shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    assert opened.dtypes == {name: tensor.dtype for name, tensor in expected.items()}
    assert opened.nbytes == sum(tensor.nbytes for tensor in expected.values())


def test_a_tensor_is_the_callers_own(single: Path) -> None:
    before = single.read_bytes()
    opened = open_weights(single)
    opened["scale"].fill_(9)
    opened["embedding.weight"].fill_(9)
    assert opened["scale"] == 2.5
    assert single.read_bytes() == before


def test_shards_are_opened_one_after_the_other(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_weights(sharded)
    files = len(list(sharded.glob("*.safetensors")))
    asked = []
    plain = weights._open
    monkeypatch.setattr(weights, "_open", lambda file: asked.append(file) or plain(file))
    for _ in opened.stream(reversed(list(opened))):
        pass
    assert files > 1
    assert len(asked) == len(set(asked)) <= files


def test_a_tensor_that_shrinks_behind_our_back_is_named(single: Path) -> None:
    opened = open_weights(single)
    single.write_bytes(single.read_bytes()[:-20])
    with pytest.raises(ValueError, match=re.escape(str(single))):
        _ = opened["embedding.weight"]


# mutated files


def flip_header(data: bytearray, draw: random.Random) -> None:
    data[draw.randrange(8 + int.from_bytes(data[:8], "little"))] ^= 1 << draw.randrange(8)


def flip_any(data: bytearray, draw: random.Random) -> None:
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def truncate(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data)) :]


def lengthen(data: bytearray, draw: random.Random) -> None:
    data += draw.randbytes(draw.randint(1, 40))


def splice(data: bytearray, draw: random.Random) -> None:
    """Digits, brackets and quotes of the header are replaced by others: mostly JSON still, and mostly a lie."""
    length = int.from_bytes(data[:8], "little")
    places = [i for i in range(8, 8 + length) if chr(data[i]).isdigit()]
    for place in draw.sample(places, draw.randint(1, 3)):
        data[place] = ord(draw.choice('0123456789-.e"[{'))


def swap_letters(data: bytearray, draw: random.Random) -> None:
    """A dtype for another."""
    one, other = draw.sample([b'"F32"', b'"F16"', b'"I64"', b'"BF16"', b'"BOOL"', b'"U8"', b'"F4"', b'"C64"'], 2)
    if one in data:
        length = int.from_bytes(data[:8], "little") + len(other) - len(one)
        data[:] = struct.pack("<Q", length) + data[8:].replace(one, other, 1)


@pytest.mark.parametrize("mutate", [flip_header, flip_any, truncate, lengthen, splice, swap_letters])
def test_a_mutated_file_is_read_as_safetensors_reads_it_or_refused(
    single: Path, mutate: Callable[[bytearray, random.Random], None]
) -> None:
    draw = random.Random(mutate.__name__)
    whole = single.read_bytes()
    outcomes = {"read": 0, "refused": 0}
    for _ in range(80):
        data = bytearray(whole)
        mutate(data, draw)
        single.write_bytes(data)
        found = answer(single)
        if isinstance(found, str):
            outcomes["refused"] += data != whole
        else:
            outcomes["read"] += 1
            assert same(found, load_file(single))  # what we accept, the format's own library reads alike
    assert outcomes["refused"] >= 20
    if mutate in (truncate, lengthen):
        assert outcomes["read"] == 0


def test_a_mutated_shard_or_index_is_refused_or_read_whole(sharded: Path, tmp_path: Path) -> None:
    draw = random.Random(1)
    names = sorted(path.name for path in sharded.iterdir())
    refused = 0
    for i in range(80):
        folder = Path(shutil.copytree(sharded, tmp_path / str(i)))
        file = folder / names[i % len(names)]
        data = bytearray(file.read_bytes())
        draw.choice([flip_any, truncate, lengthen])(data, draw)
        file.write_bytes(data)
        found = answer(folder)
        refused += isinstance(found, str)
        if isinstance(found, dict):
            assert found.keys() == tensors().keys()
    assert refused >= 40


def entry(dtype: Any = "F32", shape: Any = (2,), begin: Any = 0, end: Any = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


LIES: dict[str, tuple[Any, bytes]] = {
    "overlap": ({"a": entry(), "b": entry(begin=4, end=12)}, bytes(12)),
    "the same bytes": ({"a": entry(), "b": entry()}, bytes(8)),
    "hole": ({"a": entry(), "b": entry(begin=12, end=20)}, bytes(20)),
    "hole at the start": ({"a": entry(begin=4, end=12)}, bytes(12)),
    "bytes left over": ({"a": entry()}, bytes(9)),
    "past the end": ({"a": entry()}, bytes(7)),
    "far past the end": ({"a": entry(shape=[2**40], end=2**42)}, bytes(8)),
    "backwards": ({"a": entry(begin=8, end=0)}, bytes(8)),
    "offset below 0": ({"a": entry(begin=-8, end=0)}, bytes(8)),
    "one offset": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8]}}, bytes(8)),
    "three offsets": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}, bytes(8)),
    "offsets are text": ({"a": entry(begin="0", end="8")}, bytes(8)),
    "offsets are fractions": ({"a": entry(begin=0.0, end=8.0)}, bytes(8)),
    "offsets are true and false": ({"a": entry("U8", [1], False, True)}, bytes(1)),
    "offset of 5,000 digits": (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,%s]}}' % (b"9" * 5000), bytes(8)),
    "dim below 0": ({"a": entry(shape=[-2])}, bytes(8)),
    "two dims below 0": ({"a": entry(shape=[-1, -2])}, bytes(8)),
    "dims overflow": ({"a": entry(shape=[2**32, 2**32, 2])}, bytes(8)),
    "dims overflow to 2": ({"a": entry(shape=[2**63 + 1, 2])}, bytes(8)),
    "dims overflow beside a 0": ({"a": entry(shape=[2**62, 2**62, 0], end=0)}, b""),
    "dim is a fraction": ({"a": entry(shape=[2.0])}, bytes(8)),
    "dim is infinite": (b'{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,8]}}', bytes(8)),
    "dim is true": ({"a": entry(shape=[True, 2])}, bytes(8)),
    "shape is a number": ({"a": entry(shape=2)}, bytes(8)),
    "shape is null": ({"a": entry(shape=None)}, bytes(8)),
    "too many dims": ({"a": entry(shape=[1] * 1000 + [2])}, bytes(8)),
    "shape of other bytes": ({"a": entry(shape=[3])}, bytes(8)),
    "dtype unknown": ({"a": entry("F3")}, bytes(8)),
    "dtype is a number": ({"a": entry(32)}, bytes(8)),
    "dtype is a list": ({"a": entry(["F32"])}, bytes(8)),
    "dtype of other size": ({"a": entry("F64")}, bytes(8)),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "one key more": ({"a": {**entry(), "code": "print(1)"}}, bytes(8)),
    "entry is a list": ({"a": [1]}, bytes(8)),
    "entry is null": ({"a": None}, b""),
    "name twice": (b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)),
    "key twice": (b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
    "name with NUL": ({"a\0b": entry()}, bytes(8)),
    "name with a line break": ({"a\nb": entry()}, bytes(8)),
    "name with half a letter": (b'{"\\ud800":%s}' % json.dumps(entry()).encode(), bytes(8)),
    "name with an escape": ({"\x1b[2J": entry()}, bytes(8)),
    "name of 100,000": ({"a" * 100_000: entry()}, bytes(8)),
    "no name": ({"": entry()}, bytes(8)),
    "metadata is a list": ({"__metadata__": [], "a": entry()}, bytes(8)),
    "metadata holds numbers": ({"__metadata__": {"a": 1}, "a": entry()}, bytes(8)),
    "header is a list": ([], b""),
    "header is a number": (b"17", b""),
    "header is null": (b"null", b""),
    "header is nothing": (b"", b"x" * 8),
    "header is no UTF-8": (b'{"\xff":1}', b""),
    "header begins with a mark": (b"\xef\xbb\xbf{}", b""),
    "header begins with a space": (b" {}", b""),
    "header ends early": (b'{"a":', b""),
    "header goes on": (b"{}{}", b""),
    "deep lists": (b'{"a":' + b"[" * 100_000, b""),
    "deep objects": (b'{"a":' * 100_000, b""),
    "deep and whole": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b""),
    "deep metadata": (b'{"__metadata__":' + b'{"a":' * 5000 + b"1" + b"}" * 5001, b""),
    "100,000 names, the last twice": (b"{" + b",".join(b'"%d":1' % min(i, 99_998) for i in range(100_000)) + b"}", b""),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(lie: str, tmp_path: Path) -> None:
    record, data = LIES[lie]
    assert isinstance(answer(file_of(tmp_path, record, data)), str)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40, 100_000_001, 500, 3, 2, 1, 0])
def test_a_length_that_lies_is_refused_unread(length: int, tmp_path: Path) -> None:
    assert isinstance(answer(file_of(tmp_path, {"a": entry()}, bytes(8), length)), str)


def test_a_giant_sparse_file_is_refused_unread(tmp_path: Path) -> None:
    """A header of 200 MB that is really there; reading it would take a second."""
    file = file_of(tmp_path, {}, length=200_000_000)
    os.truncate(file, 300_000_000)
    assert "header would take 200,000,000 bytes" in str(answer(file))


def test_a_file_without_tensors_and_one_with_odd_alignment_are_valid(tmp_path: Path) -> None:
    assert answer(file_of(tmp_path, {})) == {}
    odd = {"a": entry("U8", [1], 0, 1), "b": entry("F32", [2], 1, 9)}
    found = answer(file_of(tmp_path, odd, b"\x07" + struct.pack("<ff", 1, 2)))
    assert isinstance(found, dict)
    assert found["b"].tolist() == [1, 2]


# indices


def with_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> dict[str, Tensor] | str:
    record = json.loads((folder / INDEX).read_text("utf-8"))
    changed = change(record)
    (folder / INDEX).write_text(json.dumps(record if changed is None else changed), "utf-8")
    return answer(folder)


PLACES = [
    "../secret.safetensors", "/etc/passwd", "/secret.safetensors", "..", ".", "", "a/../b.safetensors",
    "./x.safetensors", "sub/x.safetensors", "..\\x.safetensors", "C:\\x.safetensors", "x\0.safetensors",
    "x\n.safetensors", INDEX, "config.json", "model.bin", "pytorch_model.bin", "x.pt", "x.safetensors.pt",
    "missing.safetensors", "~/x.safetensors", "file:///x.safetensors", "%2e%2e/x.safetensors",
    "x" * 5000 + ".safetensors",
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES, ids=lambda place: repr(place)[:30])
@pytest.mark.parametrize("all_of_them", [False, True])
def test_an_index_reaches_nothing_but_shards_of_its_folder(place: str, all_of_them: bool, sharded: Path) -> None:
    save_file({"scale": torch.tensor(1.0)}, sharded.parent / "secret.safetensors")

    def change(record: dict[str, Any]) -> None:
        names = list(record["weight_map"]) if all_of_them else ["scale"]
        record["weight_map"].update(dict.fromkeys(names, place))

    assert isinstance(with_index(sharded, change), str)


@pytest.mark.parametrize("record", [[], None, 7, {}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"a": 1}},
                                    {"weight_map": {"a": None}}, {"weight_map": {"a": ["x.safetensors"]}}])  # fmt: skip
def test_an_index_that_is_none_is_refused(record: Any, sharded: Path) -> None:
    (sharded / INDEX).write_text(json.dumps(record), "utf-8")
    assert isinstance(answer(sharded), str)


@pytest.mark.parametrize("text", [b"", b"{", b"[" * 100_000, b'{"weight_map":' * 50_000, b"\xff", b'{"a":1,"a":1}'])
def test_an_index_that_is_no_json_is_refused(text: bytes, sharded: Path) -> None:
    (sharded / INDEX).write_bytes(text)
    assert isinstance(answer(sharded), str)


def test_each_tensor_is_where_the_index_says_and_nowhere_else(sharded: Path) -> None:
    record = json.loads((sharded / INDEX).read_text("utf-8"))
    first, other = record["weight_map"]["embedding.weight"], record["weight_map"]["ids"]
    assert first != other
    assert "is not in" in str(with_index(sharded, lambda r: r["weight_map"].update({"embedding.weight": other})))
    (sharded / INDEX).write_text(json.dumps(record), "utf-8")
    assert "is in no file" in str(with_index(sharded, lambda r: r["weight_map"].pop("ids") and None))
    (sharded / INDEX).write_text(json.dumps(record), "utf-8")
    assert "1 tensors are not" in str(with_index(sharded, lambda r: r["weight_map"].update({"new": first})))
    (sharded / INDEX).write_text(json.dumps(record), "utf-8")
    save_file({**load_file(sharded / other), "embedding.weight": torch.zeros(7, 4)}, sharded / other)
    assert "belongs in" in str(answer(sharded))


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", INDEX])
def test_a_missing_shard_or_index_is_named(name: str, sharded: Path) -> None:
    target = sorted(sharded.glob("*.safetensors"))[1] if name != INDEX else sharded / INDEX
    target.unlink()
    assert (target.name if name != INDEX else "no weights here") in str(answer(sharded))


# links and things that are no files


def test_a_link_out_of_the_folder_is_refused(sharded: Path, single: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[0]
    outside = sharded.parent / "outside.safetensors"
    shard.rename(outside)
    shard.symlink_to(outside)
    assert "a link that leads out" in str(answer(sharded))
    folder = sharded.parent / "linked"
    folder.mkdir()
    (folder / SINGLE).symlink_to(single)
    assert "a link that leads out" in str(answer(folder))
    assert isinstance(answer(single), dict)


@pytest.mark.parametrize(
    "target", [SINGLE, "other", "nowhere", "/dev/zero", "/etc/passwd", ".", "..", "/proc/self/mem"]
)
def test_a_link_to_itself_or_to_no_file_is_refused(target: str, tmp_path: Path) -> None:
    (tmp_path / "other").symlink_to(SINGLE)
    (tmp_path / SINGLE).symlink_to(target)
    assert isinstance(answer(tmp_path), str)
    assert isinstance(answer(tmp_path / SINGLE), str)


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_is_refused_without_waiting(kind: str, tmp_path: Path) -> None:
    (os.mkfifo if kind == "pipe" else os.mkdir)(tmp_path / SINGLE)
    assert isinstance(answer(tmp_path), str)


def test_the_hubs_cache_of_links_is_read(tmp_path: Path) -> None:
    """models--owner--name/snapshots/REVISION/model.safetensors -> ../../blobs/SUM"""
    snapshot, blobs = tmp_path / "snapshots" / "0123", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file(tensors(), blobs / "4567")
    (snapshot / SINGLE).symlink_to("../../blobs/4567")
    assert isinstance(answer(snapshot), dict)
    (snapshot / SINGLE).unlink()
    (blobs / "4567").rename(tmp_path / "4567")
    (snapshot / SINGLE).symlink_to("../../4567")
    assert "a link that leads out" in str(answer(snapshot))


# pickles


@pytest.fixture
def dumped() -> Iterator[dict[str, bytes]]:
    """Each way that PyTorch and Python write pickles; they would run `Path.touch` if opened."""
    import io

    zipped, legacy = io.BytesIO(), io.BytesIO()
    torch.save({"a": torch.zeros(1)}, zipped)
    torch.save({"a": torch.zeros(1)}, legacy, _use_new_zipfile_serialization=False)
    plain = {f"protocol {i}": pickle.dumps({"a": [Path("/")]}, protocol=i) for i in range(6)}
    return {"zip": zipped.getvalue(), "legacy": legacy.getvalue(), **plain}  # type: ignore[return-value]


NAMES = ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl", "MODEL.BIN", "tf_model.h5",
         "flax_model.msgpack", SINGLE]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_pickle_is_refused_by_any_name(name: str, dumped: dict[str, bytes], tmp_path: Path) -> None:
    for kind, data in dumped.items():
        (tmp_path / name).write_bytes(data)
        said = str(answer(tmp_path / name))
        if name != SINGLE:
            assert "safetensors" in said
        elif kind in ("zip", "legacy"):
            assert "weights_only=True" in said
        assert name in str(answer(tmp_path))


def test_a_pickle_named_in_the_index_is_refused_with_the_line_that_converts_it(sharded: Path) -> None:
    said = str(with_index(sharded, lambda r: r["weight_map"].update({"scale": "pytorch_model-00001.bin"})))
    assert "torch.load('pytorch_model-00001.bin'" in said


def test_the_line_that_converts_a_pickle_works_also_for_tied_tensors(tmp_path: Path) -> None:
    shared = torch.randn(3, 4)
    torch.save({"a": shared, "b": shared, "c": shared.T}, tmp_path / "pytorch_model.bin")
    line = re.search(r'python -c "(.*)"$', str(answer(tmp_path)))
    assert line is not None
    subprocess.run([sys.executable, "-c", line[1]], cwd=tmp_path, check=True)
    found = answer(tmp_path)
    assert isinstance(found, dict)
    assert same(found, {"a": shared, "b": shared, "c": shared.T.contiguous()})


def test_a_file_name_cannot_smuggle_commands_into_that_line(tmp_path: Path) -> None:
    file = tmp_path / "$(touch x)`touch y`.bin"
    file.write_bytes(b"")
    assert "torch.load('FILE'" in str(answer(file))


def test_a_header_of_640_bytes_is_no_pickle(tmp_path: Path) -> None:
    """Its length reads as the first two bytes of a pickle, 80 02."""
    text = json.dumps({"a": entry()}).encode().ljust(0x280)
    assert isinstance(answer(file_of(tmp_path, text, bytes(8))), dict)


@pytest.mark.parametrize("what", ["empty", "missing", "config only"])
def test_a_folder_without_weights_is_named(what: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if what != "missing":
        folder.mkdir()
    if what == "config only":
        (folder / "config.json").write_text("{}", "utf-8")
        (folder / "training_args.bin").write_bytes(b"\x80\x02")
    assert "no weights here" in str(answer(folder)) or what == "missing"


# writing


@pytest.mark.parametrize("shard_bytes", [1, 60, 200, 2**30])
def test_written_shards_are_read_by_us_and_by_the_formats_library(tmp_path: Path, shard_bytes: int) -> None:
    expected = tensors()
    expected["turned"] = expected["embedding.weight"].T
    expected["part"] = expected["embedding.weight"][2:5]
    expected["tied"] = expected["embedding.weight"]
    write_weights(tmp_path / "model", expected, shard_bytes, {"config": {"model_type": "é"}})
    assert same(open_weights(tmp_path / "model"), {name: t.contiguous() for name, t in expected.items()})
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    read = {name: t for file in files for name, t in load_file(file).items()}
    assert same(read, {name: t.contiguous() for name, t in expected.items()})
    assert (len(files) == 1) == (shard_bytes == 2**30) == (files[0].name == SINGLE)
    assert "é" in (tmp_path / "model" / "config.json").read_text("utf-8")


def test_transformers_reads_what_was_written(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    net = BertModel(config)
    write_weights(tmp_path / "bert", net.state_dict(), 2000, {"config": config.to_dict()})
    again = BertModel.from_pretrained(tmp_path / "bert")
    assert len(list((tmp_path / "bert").glob("*.safetensors"))) > 1
    assert same(again.state_dict(), net.state_dict())


def test_shards_are_as_large_as_they_may_be(tmp_path: Path) -> None:
    write_shards(tmp_path, {f"t{i}": torch.zeros(10) for i in range(10)}, 120)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    assert json.loads((tmp_path / INDEX).read_text("utf-8"))["metadata"]["total_size"] == 400
    with pytest.raises(ValueError, match="1 or more"):
        write_shards(tmp_path, {}, 0)


def test_a_failed_export_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_weights(tmp_path / "model", tensors(), 60)
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    with pytest.raises(TypeError):
        write_weights(tmp_path / "model", {"a": torch.zeros(1)}, 60, {"config": {"a": object()}})
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(ValueError, match="untouched"):
        write_weights(tmp_path / "model", {"a": torch.zeros(1)}, 60)
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_dtype_of_ours_is_the_formats() -> None:
    from safetensors import torch as official

    assert {name: official._TYPES[name] for name in header.DTYPES} == header.DTYPES


def test_more_than_300_mutated_sources_were_tried(request: pytest.FixtureRequest) -> None:
    """Last in the file: counts what the tests above opened, where all of them ran."""
    if request.config.option.keyword or any("::" in arg for arg in request.config.args):
        pytest.skip("not all tests of this file were selected")
    assert len(MUTATIONS) >= 300
