"""The tokenizer that a GGUF file tells of in its metadata: "gpt2" (byte-level BPE) and "llama" (SentencePiece's BPE).

A file names how text is cut before the merges by one word, `tokenizer.ggml.pre`; a word that is not known is an
error, because cutting otherwise gives other ids. The words are llama.cpp's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from headway.vocabulary.facts import Facts, Name
from headway.vocabulary.older import frame, specials
from headway.vocabulary.sentencepiece import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Piece, bpe

if TYPE_CHECKING:
    import tokenizers
    from tokenizers.pre_tokenizers import PreTokenizer

_IDS: dict[Name, str] = {
    "bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator", "mask": "mask", "cls": "cls"
}  # fmt: skip
_DIGITS_ALONE = ("smollm", "starcoder", "refact", "command-r")
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_QWEN2 = ("qwen2", "deepseek-r1-qwen")
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build(metadata: Mapping[str, Any]) -> tuple["tokenizers.Tokenizer", Facts]:
    """The tokenizer and its facts, or a ValueError that names the key."""
    model = _get(metadata, "tokenizer.ggml.model", str)
    texts = _list(metadata, "tokenizer.ggml.tokens", str)
    kinds = _list(metadata, "tokenizer.ggml.token_type", int, len(texts), NORMAL)
    if len(set(texts)) < len(texts):
        raise ValueError(f"tokenizer.ggml.tokens: {len(texts)} tokens, {len(set(texts))} of them different")
    names = {name: text for name in _IDS if (text := _named(metadata, name, texts)) is not None}
    pre = metadata.get("tokenizer.ggml.pre")
    if model == "gpt2":
        core = _byte_level(texts, kinds, _list(metadata, "tokenizer.ggml.merges", str), pre)
    elif model == "llama":
        scores = _list(metadata, "tokenizer.ggml.scores", float, len(texts))
        pieces = [Piece(*piece) for piece in zip(texts, scores, kinds, strict=True)]
        core = bpe(pieces, names.get("unk"), _flag(metadata, "add_space_prefix", True), "<0x00>" in texts)
    else:
        raise ValueError(f"tokenizer.ggml.model is {model[:40]!r}; only 'gpt2' and 'llama' are read")
    specials(core, *names.values())
    bos = _flag(metadata, "add_bos_token", model == "llama" or pre in _LLAMA3) and names.get("bos")
    eos = _flag(metadata, "add_eos_token", False) and names.get("eos")
    if bos or eos:
        frame(core, bos or None, eos or None)
    architecture = metadata.get("general.architecture")
    facts = Facts(
        names=names,
        max_tokens=_limit(metadata, f"{architecture}.context_length"),
        chat_template=_get(metadata, "tokenizer.chat_template", str, optional=True),
    )
    return core, facts


def _byte_level(texts: list[str], kinds: list[int], merges: list[str], pre: Any) -> "tokenizers.Tokenizer":
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    pairs = [tuple(merge.split(" ")) for merge in merges]
    wrong = next((merge for merge, pair in zip(merges, pairs, strict=True) if len(pair) != 2), None)
    if wrong is not None:
        raise ValueError(f"tokenizer.ggml.merges: {wrong[:40]!r} is not two pieces")
    vocab = {text: i for i, text in enumerate(texts)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre in _LLAMA3))  # type: ignore[arg-type]
    core.pre_tokenizer = _cutting(pre)
    core.decoder = decoders.ByteLevel()
    if pre in _QWEN2:
        core.normalizer = normalizers.NFC()
    specials(core, *(text for text, kind in zip(texts, kinds, strict=True) if kind in (UNKNOWN, CONTROL)))
    whole = [text for text, kind in zip(texts, kinds, strict=True) if kind == USER_DEFINED]
    core.add_tokens([AddedToken(text, normalized=False) for text in whole])
    return core


def _cutting(pre: Any) -> "PreTokenizer":
    """How text is cut into words before the merges."""
    from tokenizers import Regex, pre_tokenizers

    if pre == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre in _DIGITS_ALONE:
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if pre in _LLAMA3 or pre in _QWEN2:
        words = Regex(_WORDS.replace("DIGITS", "{1,3}" if pre in _LLAMA3 else ""))
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
    known = ", ".join(("gpt-2", *_DIGITS_ALONE, *_LLAMA3, *_QWEN2))
    raise ValueError(f"tokenizer.ggml.pre is {str(pre)[:40]!r}, not one of {known}: use the model's own tokenizer.json")


def _get(metadata: Mapping[str, Any], key: str, kind: type, optional: bool = False) -> Any:
    value = metadata.get(key)
    if value is None and optional:
        return None
    if type(value) is not kind:
        raise ValueError(f"{key} is {'missing' if value is None else type(value).__name__}, not {kind.__name__}")
    return value


def _flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    value = _get(metadata, f"tokenizer.ggml.{key}", bool, optional=True)
    return default if value is None else value


def _list(metadata: Mapping[str, Any], key: str, kind: type, count: int | None = None, default: Any = None) -> Any:
    """A list of one kind of value, of `count` where that is given; `default` for each where the key is missing."""
    if key not in metadata and default is not None and count is not None:
        return [default] * count
    values = _get(metadata, key, list)
    if not all(type(value) is kind for value in values) or (count is not None and len(values) != count):
        raise ValueError(f"{key} is no list of {'' if count is None else f'{count} '}{kind.__name__}")
    return values


def _named(metadata: Mapping[str, Any], name: Name, texts: list[str]) -> str | None:
    key = f"tokenizer.ggml.{_IDS[name]}_token_id"
    i = _get(metadata, key, int, optional=True)
    if i is not None and not 0 <= i < len(texts):
        raise ValueError(f"{key} is {i}, beyond its {len(texts)} tokens")
    return None if i is None else texts[i]


def _limit(metadata: Mapping[str, Any], key: str) -> int | None:
    limit = _get(metadata, key, int, optional=True)
    if limit is not None and not 1 <= limit <= 2**24:
        raise ValueError(f"{key} is {limit}, not a number of tokens")
    return limit
