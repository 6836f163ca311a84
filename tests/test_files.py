"""Rows from wherever they lie: plain texts, folders, archives, more than the memory holds."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from headway.data import examples, rows
from headway.data.batches import Packed
from headway.data.examples import Examples
from headway.data.files import ending, reader, texts
from headway.data.rows import OnDisk, Rows
from headway.data.sources import DataSpec, Splits, load_splits

TEXT = "First line,\nsecond line.\n\n\nA paragraph of its own.\n\nThe last one"


def everything(source: Path, **more: object) -> list[str]:
    found = load_splits(DataSpec(str(source), **more), ("text",))  # type: ignore[arg-type]
    return sorted(row[0] for part in (found.train, found.valid, found.test) for row in part)


def write(folder: Path, count: int) -> Path:
    folder.mkdir()
    for i in range(count):
        (folder / f"{i}.txt").write_text(f"text {i}\n\nand more of {i}\n", "utf-8")
    return folder


def test_a_plain_text_is_read_by_paragraphs_lines_or_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(TEXT, "utf-8")
    paragraphs = ["First line,\nsecond line.", "A paragraph of its own.", "The last one"]
    many = tmp_path / "many.txt"
    many.write_text("\n\n".join(f"{p} {i}" for i in range(20) for p in paragraphs), "utf-8")
    assert everything(many) == sorted(f"{p} {i}" for i in range(20) for p in paragraphs)
    lines = [f"line {i}" for i in range(40)]
    many.write_text("\n\n".join(lines), "utf-8")
    assert everything(many, unit="line") == sorted(lines)
    assert everything(many, unit="file", test=str(path), valid=str(path)).count(TEXT) == 2


def test_many_texts_in_a_folder_are_documents_and_few_are_not(tmp_path: Path) -> None:
    few, many = write(tmp_path / "few", 5), write(tmp_path / "many", 30)
    assert everything(few) == sorted(text for i in range(5) for text in (f"text {i}", f"and more of {i}"))
    assert everything(many) == sorted(f"text {i}\n\nand more of {i}" for i in range(30))
    notes = load_splits(DataSpec(str(many)), ("text",)).notes
    assert notes[0] == f"{many}: each file of 30 plain texts is a row (data.unit)"


def test_a_folder_of_tables_is_all_of_them(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"a{i}"}) + "\n" for i in range(9)), "utf-8")
    (tmp_path / "below" / "b.csv").write_text("text\n" + "".join(f"b{i}\n" for i in range(9)), "utf-8")
    (tmp_path / "README.md").write_text("what this is", "utf-8")
    assert everything(tmp_path) == [f"{letter}{i}" for letter in "ab" for i in range(9)]


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_archives_are_read_as_what_is_in_them(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    plain = "text\n" + "".join(f"row {i}\n" for i in range(30))
    path = tmp_path / f"a.csv{suffix}"
    path.write_bytes(pack(plain.encode()))
    assert everything(path) == sorted(f"row {i}" for i in range(30))
    assert [text for _, text, _ in texts(path, "text")] == [f"row {i}" for i in range(30)]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"a\.csv\{suffix}: cannot be read") as fault:
        everything(path)
    assert "\n" not in str(fault.value)


def test_an_ending_is_told_without_the_compression() -> None:
    told = [ending(Path(name)) for name in ("a.TSV.GZ", "b.x.csv", "c.gz", "d.tar.parquet", "e")]
    assert told == [".tsv", ".csv", "", ".parquet", ""]
    assert reader(Path("a.txt.xz")) is None and reader(Path("a.jsonl.zst")) is reader(Path("a.jsonl"))


def test_a_class_may_be_a_number(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"t{i}", "label": i % 3}) + "\n" for i in range(40)), "utf-8")
    found = load_splits(DataSpec(str(path)), ("text", "label"))
    assert {row[1] for row in found.train} == {"0", "1", "2"}


# --- more than the memory holds


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept in memory is little, so that the disk is used."""
    monkeypatch.setattr(rows, "SPILL", 200)
    monkeypatch.setattr(examples, "SPILL", 64)


def test_rows_on_the_disk_are_the_same_rows(small: None) -> None:
    given = [(f"text {i}" * 3, str(i)) for i in range(100)]
    kept = Rows(given).rows
    assert isinstance(kept, OnDisk)
    assert list(kept) == given == kept[:] and kept[7] == given[7] and kept[-1] == given[-1] and len(kept) == 100
    with pytest.raises(IndexError):
        kept[100]


def test_a_source_is_the_same_whether_it_fits_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("text\n" + "".join(f"some text {i}\n" for i in range(500)), "utf-8")
    whole: Splits = load_splits(DataSpec(str(path)), ("text",))
    monkeypatch.setattr(rows, "SPILL", 200)
    spilled = load_splits(DataSpec(str(path)), ("text",))
    assert isinstance(spilled.train, OnDisk) and not isinstance(whole.train, OnDisk)
    assert list(spilled.train) == whole.train and list(spilled.test) == list(whole.test)


def test_examples_on_the_disk_are_the_same_examples(small: None) -> None:
    given = [(list(range(i % 9)), [i]) for i in range(200)]
    kept = Examples(given)
    assert [(a.tolist(), b.tolist()) for a, b in kept] == given
    assert kept.fingerprint() == Examples(given).fingerprint() != Examples(given[::-1]).fingerprint()


def test_a_file_larger_than_what_is_kept_takes_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "SPILL", 1 << 18)
    path = tmp_path / "a.txt"
    with path.open("w", encoding="utf-8") as file:
        for i in range(40_000):
            file.write(f"{i} " + "x" * 400 + "\n")
    tracemalloc.start()
    try:
        found = load_splits(DataSpec(str(path), unit="line"), ("text",))
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found.train) > 35_000
    assert most < path.stat().st_size / 5


# --- packing


def test_packed_rows_hold_every_example_once_and_little_padding() -> None:
    random = np.random.default_rng(0)
    sizes = random.integers(1, 100, (500, 1))
    given = Examples(([i] * int(size),) for i, (size,) in enumerate(sizes))
    order = Packed(given, sizes, tokens=512, length=128, seed=3, collate=lambda chosen, _: chosen)
    for epoch in (0, 2):
        batches = [order.batch(epoch * len(order) + i) for i in range(len(order))]
        held = [int(example[0][0]) for batch in batches for row in batch for example in row]
        assert sorted(held) == list(range(500))
        filled = [sum(len(example[0]) for example in row) for batch in batches for row in batch]
        assert max(filled) <= 128 and sum(filled) / (128 * len(filled)) > 0.95
    again = Packed(given, sizes, tokens=512, length=128, seed=3, collate=lambda chosen, _: chosen)
    one, other = order.batch(5), again.batch(5)
    assert [[int(e[0][0]) for e in row] for row in one] == [[int(e[0][0]) for e in row] for row in other]


def test_a_piece_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="example 0 has 9 tokens, and a row takes max_tokens=8"):
        Packed(Examples([([1] * 9,)]), np.array([[9]]), tokens=64, length=8, seed=0, collate=lambda chosen, _: chosen)
