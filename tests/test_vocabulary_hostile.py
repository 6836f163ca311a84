"""Hostile tokenizers: whatever a file or template holds, it works or is one line that names it; nothing is run."""

import contextlib
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from headway.vocabulary import PublishedTokenizer


@contextlib.contextmanager
def one_line(*words: str) -> Iterator[None]:
    start = time.perf_counter()
    with pytest.raises(ValueError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message and len(message) < 900, message
    assert all(word in message for word in words), message
    assert time.perf_counter() - start < 5


def tiny() -> dict[str, Any]:
    """A small tokenizer.json."""
    core = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.Fuse()
    core.add_special_tokens(["<unk>", "<pad>"])
    return json.loads(core.to_str())  # type: ignore[no-any-return]


def changed(**parts: Any) -> bytes:
    return json.dumps({**tiny(), **parts}).encode()


def model(**parts: Any) -> bytes:
    return changed(model={**tiny()["model"], **parts})


BAD_JSON = {
    "empty": b"",
    "not JSON": b"{",
    "cut": changed()[:-9],
    "a list": b"[]",
    "a number": b"1",
    "null": b"null",
    "not UTF-8": changed().replace(b'"a"', b'"\xff"'),
    "pickle": b"\x80\x04cos\nsystem\n.",
    "deep": b"[" * 10**6,
    "deep objects": b'{"model":' * 10**5,
    "no model": changed(model=None),
    "unknown model": model(type="Neural"),
    "vocabulary a list": model(vocab=[1, 2]),
    "id a text": model(vocab={"a": "x"}),
    "id below 0": model(vocab={"a": -1}),
    "id huge": model(vocab={"<unk>": 0, "a": 2**31}),
    "id beyond": model(vocab={"<unk>": 0, "a": 10**6}),
    "id of 64 bits": model(vocab={"<unk>": 0, "a": 2**63}),
    "nothing in it": changed(added_tokens=[], model={**tiny()["model"], "vocab": {}}),
    "unknown missing": model(unk_token="[UNK]", vocab={"b": 0}),
    "normalizer": changed(normalizer={"type": "Exec", "code": "import os"}),
    "broken regex": changed(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}
    ),
    "broken charsmap": changed(normalizer={"type": "Precompiled", "precompiled_charsmap": "!!"}),
    "unigram without pieces": changed(model={"type": "Unigram", "vocab": [], "unk_id": 0}),
    "unigram unknown beyond": changed(model={"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 7}),
    "merge of nothing": changed(model={"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}),
    "frame beyond": changed(post_processor={"type": "BertProcessing", "sep": ["</s>", 4000], "cls": ["<s>", 5000]}),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_a_hostile_tokenizer_json_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(BAD_JSON[name])
    with one_line("tokenizer.json: "):
        PublishedTokenizer.from_folder(tmp_path)


def test_the_tiny_file_is_fine_where_it_is_not_changed(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(changed())
    assert PublishedTokenizer.from_folder(tmp_path).encode("a c b").ids == [1, 0, 2]


def test_a_file_cut_anywhere_is_one_line(tmp_path: Path) -> None:
    whole = changed()
    for end in range(0, len(whole), 7):
        (tmp_path / "tokenizer.json").write_bytes(whole[:end])
        with one_line("tokenizer.json: "):
            PublishedTokenizer.from_folder(tmp_path)


BAD_CONFIG = {
    "a list": b"[]",
    "not JSON": b"{]",
    "not UTF-8": b'{"pad_token": "\xff"}',
    "deep": b'{"a":' * 10**5,
    "name a number": b'{"pad_token": 3}',
    "name without text": b'{"pad_token": {"content": null, "x": 1}, "unk_token": [1]}',
    "name unknown": b'{"pad_token": "[PAD]"}',
    "limit 0": b'{"model_max_length": 0}',
    "limit text": b'{"model_max_length": "9"}',
    "limit true": b'{"model_max_length": true}',
    "limit half": b'{"model_max_length": 1.5}',
    "side": b'{"padding_side": "up"}',
    "flag": b'{"clean_up_tokenization_spaces": 1}',
    "template": b'{"chat_template": 5}',
    "bos": b'{"add_bos_token": true}',
    "bos text": b'{"add_bos_token": "yes"}',
}


@pytest.mark.parametrize("name", BAD_CONFIG)
def test_a_hostile_config_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(changed())
    (tmp_path / "tokenizer_config.json").write_bytes(BAD_CONFIG[name])
    with one_line(str(tmp_path)):
        PublishedTokenizer.from_folder(tmp_path)


def test_code_that_a_config_names_is_not_looked_at(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(changed())
    (tmp_path / "tokenization_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config = {"auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}, "tokenizer_class": "Evil"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert PublishedTokenizer.from_folder(tmp_path).vocab == 4
    assert not (tmp_path / "ran").exists()


OLDER = {
    "nothing": {},
    "vocab alone": {"vocab.json": b"{}"},
    "no BERT": {"vocab.txt": b"a\nb\n"},
    "vocab empty": {"vocab.txt": b""},
    "vocab not UTF-8": {"vocab.txt": b"[UNK]\n\xff\n"},
    "no object": {"vocab.json": b"[]", "merges.txt": b""},
    "ids texts": {"vocab.json": b'{"a": "b"}', "merges.txt": b""},
    "id huge": {"vocab.json": b'{"<|endoftext|>": 99999999999}', "merges.txt": b""},
    "id far": {"vocab.json": b'{"<|endoftext|>": 5000000}', "merges.txt": b""},
    "merge of one": {"vocab.json": b'{"<|endoftext|>": 0}', "merges.txt": b"a\n"},
    "merge of three": {"vocab.json": b'{"<|endoftext|>": 0}', "merges.txt": b"a b c\n"},
    "merge unknown": {"vocab.json": b'{"<|endoftext|>": 0}', "merges.txt": b"a b\n"},
    "no family": {"vocab.json": b'{"a": 0}', "merges.txt": b""},
    "added with a gap": {"vocab.json": b'{"<|endoftext|>": 0}', "merges.txt": b"", "added_tokens.json": b'{"x": 7}'},
    "model empty": {"tokenizer.model": b""},
    "model text": {"spiece.model": b"hello world, this is no model"},
    "model pickle": {"tokenizer.model": b"\x80\x04cos\nsystem\n."},
    "model endless number": {"spiece.model": b"\xff" * 40},
    "model length": {"spiece.model": b"\x0a\xff\xff\xff\xff\x0f"},
    "model piece a number": {"spiece.model": b"\x08\x01"},
    "model of another family": {"spiece.model": b"\x0a\x03\x0a\x01a"},
    "model twice": {"spiece.model": b"\x0a\x03\x0a\x01a" * 2},
    "model not UTF-8": {"spiece.model": b"\x0a\x03\x0a\x01\xff"},
    "model score": {"spiece.model": b"\x0a\x08\x0a\x01a\x15" + struct.pack("<f", float("nan"))},
}


@pytest.mark.parametrize("name", OLDER)
def test_hostile_older_files_are_one_line(name: str, tmp_path: Path) -> None:
    for file, data in OLDER[name].items():
        (tmp_path / file).write_bytes(data)
    with one_line(str(tmp_path)):
        PublishedTokenizer.from_folder(tmp_path)


def field(number: int, value: bytes) -> bytes:
    """One length-delimited field of a protobuf message, of less than 128 bytes."""
    return bytes([number << 3 | 2, len(value)]) + value


def spiece() -> bytes:
    """T5's first three pieces and the letters, as its files write them."""
    texts = [b"<pad>", b"</s>", b"<unk>", b"\xe2\x96\x81", *(bytes([i]) for i in range(97, 123))]
    pieces = [field(1, text) + b"\x15" + struct.pack("<f", -i) for i, text in enumerate(texts)]
    return b"".join(field(1, piece) for piece in pieces) + field(2, b"\x18\x01") + field(3, b"\x18\x01\x20\x01")


def test_a_sentencepiece_model_cut_or_changed_anywhere_reads_or_is_one_line(tmp_path: Path) -> None:
    whole = spiece()
    (tmp_path / "spiece.model").write_bytes(whole)
    (tmp_path / "tokenizer_config.json").write_text('{"extra_ids": 2}')
    assert PublishedTokenizer.from_folder(tmp_path).encode("a b").ids == [3, 4, 3, 5, 1]
    cuts = [whole[:end] for end in range(0, len(whole), 3)]
    flips = [whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :] for at in range(0, len(whole), 2)]
    refused = 0
    for data in cuts + flips:
        (tmp_path / "spiece.model").write_bytes(data)
        try:
            PublishedTokenizer.from_folder(tmp_path)
        except ValueError as error:
            refused += 1
            assert "spiece.model: " in str(error) and "\n" not in str(error)
    assert refused > 50


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", "bert"),
        ("model", 3),
        ("tokens", "abc"),
        ("tokens", [1, 2]),
        ("tokens", ["a", "a"]),
        ("token_type", [1]),
        ("pre", "unheard-of"),
        ("pre", None),
        ("merges", ["a"]),
        ("merges", ["a b c"]),
        ("merges", ["zz yy"]),
        ("merges", 3),
        ("bos_token_id", 10**9),
        ("eos_token_id", -1),
        ("pad", None),
        ("add_bos_token", 3),
        ("padding_token_id", "x"),
    ],
)
def test_hostile_gguf_metadata_is_one_line(key: str, value: Any) -> None:
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"],
        "tokenizer.ggml.token_type": [3, *[1] * 257],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 0,
    }
    fine = PublishedTokenizer.from_gguf(metadata, "x.gguf")
    assert len(fine.encode("ab").ids) == 1 and fine.eos == 0
    if key == "pad":
        metadata["llama.context_length"] = 0
    metadata[f"tokenizer.ggml.{key}"] = value
    with one_line("x.gguf: "):
        PublishedTokenizer.from_gguf(metadata, "x.gguf")


def test_a_hostile_record_is_one_line() -> None:
    facts: dict[str, Any] = {"names": {"pad": "<pad>"}}
    fine = {"tokenizer": tiny(), "facts": facts}
    assert PublishedTokenizer.from_record(fine).pad == 3
    wrong = [{"name": 1}, {"names": {"pad": "[X]"}}, {"names": {"king": "a"}}, {"max_tokens": 0}, None]
    for record in (
        None,
        [],
        {},
        {**fine, "code": 1},
        {**fine, "tokenizer": {}},
        *({**fine, "facts": f} for f in wrong),
    ):
        with one_line("tokenizer record: "):
            PublishedTokenizer.from_record(record)
