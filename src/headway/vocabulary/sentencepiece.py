"""SentencePiece's model files (arXiv:1808.06226), read without its library: T5's, XLM-R's and Llama's.

The file is a protobuf message: a sequence of (field << 3 | wire type, value). Fields not named here are passed over.
Unigram takes the pieces and scores as they are. BPE joins, at each step, the neighbours whose joined piece scores
best; so the merges are every way to cut a piece in two, best score first.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from headway.vocabulary.facts import Told
from headway.vocabulary.older import CONVERT, frame, specials

if TYPE_CHECKING:
    import tokenizers

UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
LONGEST, LETTERS = 256, 2**23  # characters of a piece, and of all: the merges take their product in time
SPACE = "\u2581"


class Piece(NamedTuple):
    text: str
    score: float
    kind: int


class Model(NamedTuple):
    """What of a model file bears on tokens."""

    pieces: list[Piece]
    kind: int
    byte_fallback: bool
    charsmap: bytes  # Unicode normalisation as a trie, for the tokenizers library to read
    dummy_prefix: bool
    squeeze: bool  # runs of spaces count as one


def build(told: Told, data: bytes, usual: str) -> "tokenizers.Tokenizer":
    """The tokenizer of a model file; `usual` is the family that a file of its name belongs to."""
    model = read(data)
    family = str(told.config.get("tokenizer_class") or usual).removesuffix("Fast").removesuffix("Tokenizer")
    first = [piece.text for piece in model.pieces[:3]]
    # kind, squeezing and the first three pieces of each family
    if family == "T5" and (model.kind, model.squeeze, first) == (UNIGRAM, True, ["<pad>", "</s>", "<unk>"]):
        return _t5(told, model)
    if family == "XLMRoberta" and (model.kind, model.squeeze, first) == (UNIGRAM, True, ["<unk>", "<s>", "</s>"]):
        return _xlm_roberta(model)
    if family == "Llama" and (model.kind, model.squeeze, first) == (BPE, False, ["<unk>", "<s>", "</s>"]):
        core = bpe(model.pieces, "<unk>", model.dummy_prefix, model.byte_fallback)
        frame(core, "<s>" if told.flag("add_bos_token", True) else None, None)
        return core
    raise ValueError(f"SentencePiece of {family[:40]} that begins with {str(first)[:60]} is not read: {CONVERT}")


def read(data: bytes) -> Model:
    """A serialized sentencepiece.ModelProto, every length checked."""
    pieces: list[Piece] = []
    kind: bytes | int = UNIGRAM
    byte_fallback, charsmap, dummy, squeeze = False, b"", True, True
    for field, value in _fields(data):
        if field == 1:
            pieces.append(_piece(value, len(pieces)))
        elif field == 2:
            trainer = dict(_fields(value))
            kind, byte_fallback = trainer.get(3, UNIGRAM), bool(trainer.get(35, 0))
        elif field == 3:
            normalizer = dict(_fields(value))
            dummy, squeeze = bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1))
            charsmap = _bytes(normalizer.get(2, b""))
    if len({piece.text for piece in pieces}) < max(len(pieces), 1):
        raise ValueError(f"{len(pieces)} pieces, {len({piece.text for piece in pieces})} of them different")
    return Model(pieces, kind if isinstance(kind, int) else 0, byte_fallback, charsmap, dummy, squeeze)


def bpe(pieces: Sequence[Piece], unk: str | None, dummy_prefix: bool, fallback: bool) -> "tokenizers.Tokenizer":
    """SentencePiece's BPE: a space is a letter; what no piece covers becomes its bytes, where `fallback`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    vocab = {piece.text: i for i, piece in enumerate(pieces)}
    core = Tokenizer(
        models.BPE(vocab=vocab, merges=_merges(pieces), unk_token=unk, fuse_unk=True, byte_fallback=fallback)
    )
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    tail: list[decoders.Decoder] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if dummy_prefix:
        steps.insert(0, normalizers.Prepend(SPACE))
        tail.append(decoders.Strip(" ", left=1))
    core.normalizer = normalizers.Sequence(steps)
    core.decoder = decoders.Sequence(tail)
    specials(core, *(piece.text for piece in pieces if piece.kind in (UNKNOWN, CONTROL)))
    core.add_tokens([AddedToken(p.text, normalized=False) for p in pieces if p.kind == USER_DEFINED])
    return core


def _t5(told: Told, model: Model) -> "tokenizers.Tokenizer":
    count = told.config.get("extra_ids", 100)
    if type(count) is not int or not 0 <= count <= 10_000:
        raise ValueError(f"extra_ids is {count!r}, not a number from 0 to 10000")
    extra = [f"<extra_id_{i}>" for i in reversed(range(count))]
    vocab = [(piece.text, piece.score) for piece in model.pieces] + [(text, 0.0) for text in extra]
    core = _unigram(vocab, 2, model)
    specials(core, "<pad>", "</s>", "<unk>", *extra)
    frame(core, None, "</s>")
    return _one_segment(core, single="$A </s>", pair="$A </s> $B </s>")


def _xlm_roberta(model: Model) -> "tokenizers.Tokenizer":
    """Its ids are fairseq's: four specials in another order, then the pieces from the fourth on, then the mask."""
    first = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    rest = [(piece.text, piece.score) for piece in model.pieces[3:]]
    core = _unigram([*first, *rest, ("<mask>", 0.0)], 3, model)
    specials(core, "<s>", "<pad>", "</s>", "<unk>", mask="<mask>")
    return _one_segment(core, single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>")


def _unigram(vocab: list[tuple[str, float]], unk: int, model: Model) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    if not model.dummy_prefix:
        raise ValueError(f"it puts no space before the first word, which is not read: {CONVERT}")
    core = Tokenizer(models.Unigram(vocab, unk_id=unk, byte_fallback=model.byte_fallback))
    if model.charsmap:
        core.normalizer = normalizers.Precompiled(model.charsmap)
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    core.decoder = decoders.Metaspace()
    return core


def _one_segment(core: "tokenizers.Tokenizer", *, single: str, pair: str) -> "tokenizers.Tokenizer":
    """These models know no segments: every token of a pair is of the first."""
    from tokenizers.processors import TemplateProcessing

    tokens = [(text, core.token_to_id(text)) for text in ("<s>", "</s>") if text in pair.split()]
    core.post_processor = TemplateProcessing(single=single, pair=pair, special_tokens=tokens)
    return core


def _merges(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    if max((len(piece.text) for piece in pieces), default=0) > LONGEST or sum(len(p.text) for p in pieces) > LETTERS:
        raise ValueError(f"a piece of more than {LONGEST} characters, or more than {LETTERS} in all")
    known = {piece.text for piece in pieces if piece.kind == NORMAL}
    cuts = [
        (-piece.score, i, piece.text[:at], piece.text[at:])
        for i, piece in enumerate(pieces)
        if piece.kind == NORMAL
        for at in range(1, len(piece.text))
        if piece.text[:at] in known and piece.text[at:] in known
    ]
    return [(left, right) for _, _, left, right in sorted(cuts)]


def _piece(data: bytes | int, at: int) -> Piece:
    fields = dict(_fields(data))
    text, score, kind = fields.get(1, b""), fields.get(2, b"\0\0\0\0"), fields.get(3, NORMAL)
    if not isinstance(text, bytes) or not isinstance(score, bytes) or not isinstance(kind, int) or len(score) != 4:
        raise ValueError(f"piece {at} is not a text, a score and a kind")
    number = struct.unpack("<f", score)[0]
    if not text or not math.isfinite(number):
        raise ValueError(f"piece {at} is empty or its score {number} is not finite")
    return Piece(text.decode("utf-8"), number, kind)


def _fields(data: bytes | int) -> Iterator[tuple[int, bytes | int]]:
    """The fields of one message: numbers as int, the rest as bytes."""
    data = _bytes(data)
    at = 0
    while at < len(data):
        key, at = _number(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _number(data, at)
            yield key >> 3, value
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"byte {at} begins a field of the unknown wire type {wire}: not a SentencePiece model")
        size, at = _number(data, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
        if size > len(data) - at:
            raise ValueError(f"a field of {size} bytes at byte {at} goes beyond the end at {len(data)}")
        yield key >> 3, data[at : at + size]
        at += size


def _bytes(value: bytes | int) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number stands where bytes should: not a SentencePiece model")
    return value


def _number(data: bytes, at: int) -> tuple[int, int]:
    """A variable-length integer and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError(f"a number is cut off at the end, byte {at}")
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError(f"a number of more than ten bytes at byte {at - 10}: not a SentencePiece model")
