"""The files from before tokenizer.json: vocab.txt (BERT), vocab.json with merges.txt (GPT-2, RoBERTa, CLIP), *.model.

WordPiece: arXiv:1609.08144; byte-level BPE: Radford et al. 2019. Which of them a folder holds is told by what its
vocabulary contains, and what fits none is refused: a tokenizer that is nearly right is wrong.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.vocabulary.facts import Told, naming, read_bytes, read_json, read_text

if TYPE_CHECKING:
    import tokenizers

CONVERT = "write tokenizer.json once: transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
SENTENCEPIECE = {"spiece.model": "T5", "sentencepiece.bpe.model": "XLMRoberta", "tokenizer.model": "Llama"}
# classes for which add_bos_token and add_eos_token decide; all others frame a text in a way of their own
_FLAGGED = ("Llama", "CodeLlama", "GPT2", "Gemma", "Qwen2", "PreTrainedTokenizerFast", "TokenizersBackend")
_BERT_FLAGS = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def build(told: Told) -> tuple[Path, "tokenizers.Tokenizer"]:
    """The tokenizer of a folder without tokenizer.json, and the file it came from."""
    folder = told.where
    if (folder / "vocab.txt").exists():
        file = folder / "vocab.txt"
        with naming(file):
            core = _wordpiece(told, read_text(file))
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        file = folder / "vocab.json"
        vocab, merges = read_json(file), _merges(folder / "merges.txt")
        with naming(file):
            core = _byte_level(told, vocab, merges)
    else:
        file = next((folder / name for name in SENTENCEPIECE if (folder / name).exists()), folder)
        if file == folder:
            raise ValueError(f"{folder}: no tokenizer here (tokenizer.json, vocab.txt, vocab.json and merges.txt, "
                             f"{', '.join(SENTENCEPIECE)})")  # fmt: skip
        from headway.vocabulary import sentencepiece

        data = read_bytes(file)
        with naming(file):
            core = sentencepiece.build(told, data, SENTENCEPIECE[file.name])
    _add_rest(core, folder / "added_tokens.json")
    with naming(folder / "tokenizer_config.json"):
        apply_flags(core, told)
    return file, core


def frame(core: "tokenizers.Tokenizer", before: str | None, after: str | None) -> None:
    """Puts a token before and after each text: [bos] A [eos] [bos] B [eos]."""
    from tokenizers.processors import TemplateProcessing

    parts = [f"{before}:{{0}}" if before else "", "${1}:{0}", f"{after}:{{0}}" if after else ""]
    first, second = (" ".join(part.format(*at) for part in parts if part) for at in ((0, "A"), (1, "B")))
    tokens = [(text, core.token_to_id(text)) for text in dict.fromkeys((before, after)) if text]
    core.post_processor = TemplateProcessing(single=first, pair=f"{first} {second}", special_tokens=tokens)


def apply_flags(core: "tokenizers.Tokenizer", told: Told) -> None:
    """What tokenizer_config.json says of letters, spaces and frame, where it differs from what the tokenizer does.

    It has the last word in transformers, too; null and what is not there change nothing.
    """
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import ByteLevel

    normalizer, words = core.normalizer, core.pre_tokenizer
    if isinstance(normalizer, BertNormalizer):
        for key, name in _BERT_FLAGS.items():
            if told.config.get(key) is not None:
                setattr(normalizer, name, told.flag(key, False))
        core.normalizer = normalizer
    if isinstance(words, ByteLevel):
        words.add_prefix_space = told.flag("add_prefix_space", words.add_prefix_space)
        core.pre_tokenizer = words
    if str(told.config.get("tokenizer_class") or _FLAGGED[0]).startswith(_FLAGGED):
        _apply_frame(core, told)


def _apply_frame(core: "tokenizers.Tokenizer", told: Told) -> None:
    if not {"add_bos_token", "add_eos_token"} & told.config.keys():
        return
    bos, eos = told.names.get("bos"), told.names.get("eos")
    first, last = (None if text is None else core.token_to_id(text) for text in (bos, eos))
    now = core.encode("", add_special_tokens=True).ids
    if set(now) - {first, last}:
        return
    before = told.flag("add_bos_token", first is not None and now[:1] == [first])
    after = told.flag("add_eos_token", last is not None and now[-1:] == [last])
    wanted = [first] * before + [last] * after
    if None in wanted:
        raise ValueError("add_bos_token or add_eos_token is true, and bos_token or eos_token names no known token")
    if now != wanted:
        frame(core, bos if before else None, eos if after else None)


def specials(core: "tokenizers.Tokenizer", *texts: str, mask: str | None = None) -> None:
    """Declares special tokens, those there are; a mask eats the space before it, as in RoBERTa's published files."""
    from tokenizers import AddedToken

    core.add_special_tokens([AddedToken(t, special=True) for t in texts if core.token_to_id(t) is not None])
    if mask is not None:
        core.add_special_tokens([AddedToken(mask, special=True, lstrip=True)])


def _wordpiece(told: Told, text: str) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    lines = [line.rstrip("\n") for line in io.StringIO(text, newline=None)]  # str.splitlines knows more ends of line
    vocab = {token: i for i, token in enumerate(lines)}
    unk, cls, sep = told.text("unk", "[UNK]"), told.text("cls", "[CLS]"), told.text("sep", "[SEP]")
    lost = [token for token in (unk, cls, sep) if token not in vocab]
    if lost:
        raise ValueError(f"{len(vocab)} tokens, none of them {lost[0]!r}: not a BERT vocabulary")
    core = Tokenizer(models.WordPiece(vocab, unk_token=unk, max_input_chars_per_word=100))
    core.normalizer = normalizers.BertNormalizer()  # apply_flags has the rest
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(prefix="##")
    core.post_processor = processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(cls, vocab[cls]), (sep, vocab[sep])],
    )
    specials(core, told.text("pad", "[PAD]"), unk, cls, sep, told.text("mask", "[MASK]"))
    return core


def _merges(file: Path) -> list[tuple[str, str]]:
    lines = read_text(file).split("\n")
    found = []
    for at, line in enumerate(lines, 1):
        left, gap, right = line.rstrip("\r").partition(" ")
        if line.startswith("#version") or not line.strip():
            continue
        if not left or not gap or not right or " " in right:
            raise ValueError(f"{file}: line {at} is not two pieces and a space between them")
        found.append((left, right))
    return found


def _byte_level(told: Told, vocab: Any, merges: list[tuple[str, str]]) -> "tokenizers.Tokenizer":
    """GPT-2's, RoBERTa's (also BART, Longformer, LED) or CLIP's, told apart by their special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    if not isinstance(vocab, dict) or not all(type(i) is int and 0 <= i < 2**24 for i in vocab.values()):
        raise ValueError("not an object of tokens and their ids from 0")
    if "<|startoftext|>" in vocab:
        return _clip(told, vocab, merges)
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    prefix = told.flag("add_prefix_space", False)
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    core.decoder = decoders.ByteLevel()
    if {"<s>", "</s>", "<pad>", "<mask>"} <= vocab.keys():
        _surround(core, told.text("sep", "</s>"), told.text("cls", "<s>"), trim=True, prefix=prefix)
        specials(core, "<s>", "<pad>", "</s>", "<unk>", mask=told.text("mask", "<mask>"))
    elif "<|endoftext|>" in vocab:
        specials(core, "<|endoftext|>")
    else:
        raise ValueError(f"a vocabulary of neither GPT-2 nor RoBERTa nor CLIP: {CONVERT}")
    return core


def _clip(told: Told, vocab: dict[str, int], merges: list[tuple[str, str]]) -> "tokenizers.Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    end = "<|endoftext|>"
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=end, end_of_word_suffix="</w>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_CLIP_WORDS), "removed", invert=True), pre_tokenizers.ByteLevel(False)]
    )
    core.decoder = decoders.ByteLevel()
    _surround(core, told.text("eos", end), told.text("bos", "<|startoftext|>"), trim=False, prefix=False)
    specials(core, "<|startoftext|>", end)
    return core


def _surround(core: "tokenizers.Tokenizer", sep: str, cls: str, *, trim: bool, prefix: bool) -> None:
    """<s> A </s>, and pairs as <s> A </s></s> B </s>."""
    from tokenizers.processors import RobertaProcessing

    last, first = core.token_to_id(sep), core.token_to_id(cls)
    if last is None or first is None:
        raise ValueError(f"its vocabulary lacks {sep!r} or {cls!r}")
    core.post_processor = RobertaProcessing((sep, last), (cls, first), trim_offsets=trim, add_prefix_space=prefix)


def _add_rest(core: "tokenizers.Tokenizer", file: Path) -> None:
    """added_tokens.json: tokens that came after the vocabulary, each with the id it must get."""
    if not file.exists():
        return
    rest = read_json(file)
    with naming(file):
        if not isinstance(rest, dict) or not all(type(i) is int for i in rest.values()):
            raise ValueError("not an object of tokens and ids")
        for text, i in sorted(rest.items(), key=lambda item: item[1]):
            if core.token_to_id(text) is None:
                core.add_tokens([text])
            if core.token_to_id(text) != i:
                raise ValueError(f"{text!r} would get the id {core.token_to_id(text)}, not {i}: {CONVERT}")
