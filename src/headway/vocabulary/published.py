"""The tokenizer of a published checkpoint, over one `tokenizers.Tokenizer` (WordPiece, byte-level BPE, SentencePiece).

Text that spells a special token, "</s>" or "[MASK]", is ordinary text unless the caller honours it by name, so that
what a user types can never end a sequence or take a turn. Files are read as data; no code in them is ever run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from headway.spec import convert
from headway.vocabulary.facts import NAMES, Facts, naming, read_bytes, read_told

if TYPE_CHECKING:
    import tokenizers

_NEVER = "\ufdd0 {}\n"  # a spelling that no text can match: noncharacter, space and newline in one piece
_SPARE = 1024  # ids a vocabulary may leave unused; more is a mistake or an attack
_OPEN, _CLOSE = "\ufdd1", "\ufdd2"  # noncharacters around the number of a special that a message spells
_KEPT = 4  # sets of honoured specials whose tokenizer is kept


class Encoding(NamedTuple):
    """Token by token: id, segment, place in characters, the text it is of (0, 1, or None for an added special), and the
    number of its word in it."""

    ids: list[int]
    types: list[int]
    offsets: list[tuple[int, int]]
    sequence: list[int | None]
    words: list[int | None]


class PublishedTokenizer:
    """`encode` as the checkpoint was trained, specials included; `decode` and `chat` back.

    `vocab` counts the ids; `pad`, `bos`, `eos`, `unk`, `mask`, `cls` and `sep` are ids, None where there is none;
    `continues` is the mark of a piece that goes on with a word ("##"), None where there is none;
    `specials` are the spellings that `honour` takes; `max_tokens` and `padding_side` are what the checkpoint says.
    """

    pad: int | None
    bos: int | None
    eos: int | None
    unk: int | None
    mask: int | None
    cls: int | None
    sep: int | None

    def __init__(self, core: "tokenizers.Tokenizer", facts: Facts, where: Path | str = "tokenizer") -> None:
        with naming(where):
            self._core, self.facts = _checked(core, facts), facts
            ids = core.get_vocab()
            for name in NAMES:
                setattr(self, name, ids[facts.names[name]] if name in facts.names else None)
            special = {token.content: i for i, token in core.get_added_tokens_decoder().items() if token.special}
            self._specials, self.specials = special, frozenset(special)
            self._special_ids = frozenset(special.values())
            # what the model writes for the unknown is no forgery; Unigram knows its own by id, not by spelling
            self._forgeable = self.specials - {facts.names.get("unk"), getattr(core.model, "unk_token", None)}
            self._forgeable_ids = frozenset(special[text] for text in self._forgeable)
            self.vocab = max(ids.values()) + 1
            self.continues: str | None = getattr(core.model, "continuing_subword_prefix", None) or None
            self.max_tokens, self.padding_side = facts.max_tokens, facts.padding_side
            self._honouring: dict[tuple[frozenset[str], bool], tokenizers.Tokenizer] = {}
            self.encode("a b", "\u00e9")  # what cannot encode is refused now, not at the first text

    @classmethod
    def from_folder(cls, folder: str | Path) -> PublishedTokenizer:
        """From tokenizer.json and what is told beside it, or from the older files; a ValueError names the wrong one."""
        from headway.vocabulary import older

        folder = Path(folder)
        told = read_told(folder)
        file = folder / "tokenizer.json"
        if file.exists():
            core = _from_json(read_bytes(file), file)
            with naming(file):
                older.apply_flags(core, told)
        else:
            file, core = older.build(told)
        with naming(folder / "tokenizer_config.json"):
            facts = told.facts({t.content for t in core.get_added_tokens_decoder().values()})
        return cls(core, facts, file)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], where: Path | str = "GGUF") -> PublishedTokenizer:
        """From the metadata that `headway.gguf.read_gguf` gives; the vocabularies "gpt2" and "llama"."""
        from headway.vocabulary import ggml

        with naming(where):
            core, facts = ggml.build(metadata)
        return cls(core, facts, where)

    @classmethod
    def from_record(cls, record: Any, where: Path | str = "tokenizer record") -> PublishedTokenizer:
        """What `record` gave."""
        if not isinstance(record, dict) or record.keys() != {"tokenizer", "facts"}:
            raise ValueError(f"{where}: not the record of a published tokenizer (keys 'tokenizer' and 'facts')")
        with naming(where):
            facts = convert(record["facts"], Facts, "facts")
            text = json.dumps(record["tokenizer"])
        return cls(_from_json(text.encode(), where), facts, where)

    def record(self) -> dict[str, Any]:
        """Everything, as JSON for a Headway folder."""
        import msgspec

        return {"tokenizer": json.loads(self._core.to_str()), "facts": msgspec.to_builtins(self.facts)}

    def files(self) -> dict[str, dict[str, Any]]:
        """The same as transformers' files, by name; its generic class takes tokenizer.json as it stands."""
        names = {f"{name}_token": text for name, text in self.facts.names.items()}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.max_tokens if self.max_tokens is not None else int(1e30),
            "padding_side": self.padding_side,
            "clean_up_tokenization_spaces": self.facts.tidy,
            **names,
        }
        if self.facts.chat_template is not None:
            config["chat_template"] = self.facts.chat_template
        tokenizer = json.loads(self._core.to_str())
        return {"tokenizer.json": tokenizer, "tokenizer_config.json": config, "special_tokens_map.json": names}

    def encode(
        self, text: str, pair: str | None = None, *, specials: bool = True, honour: frozenset[str] = frozenset()
    ) -> Encoding:
        """Text, or a pair of texts, as tokens; with `specials`, those the checkpoint puts around them, too.

        `honour` are the spellings in the text that mean the special token: `frozenset(["[MASK]"])`, or all
        `specials` for a prompt that a chat template wrote. Nothing is cut: `max_tokens` is for the caller to heed.
        """
        found = self._run(self._honour(honour), text, pair, specials)
        if self._forged(found, honour):  # Unigram and odd merges reach a special through its letters
            found = self._run(self._honour(honour, strict=True), text, pair, specials)
        return found

    def encode_all(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """Ids and segments of many texts, as `encode` gives them, on all cores."""
        with naming("cannot encode"):
            _refuse_bytes(*texts)
            found = self._honour(frozenset()).encode_batch_fast(list(texts), add_special_tokens=True)
        pairs = [(one.ids, one.type_ids) for one in found]
        for i, (ids, _) in enumerate(pairs):
            if not self._forgeable_ids.isdisjoint(ids):  # perhaps through its letters: see `encode`
                whole = self.encode(texts[i])
                pairs[i] = (whole.ids, whole.types)
        return pairs

    def special(self, name: str) -> int | None:
        """The id of an added token by its spelling, None where there is none."""
        return next((i for i, t in self._core.get_added_tokens_decoder().items() if t.content == name), None)

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids of all specials."""
        return self._special_ids

    def decode(self, ids: Sequence[int], specials: bool = False) -> str:
        """The text of some ids; special tokens are left out unless `specials`."""
        ids = self._known(ids)
        text = self._core.decode(
            ids if specials else [i for i in ids if i not in self._special_ids], skip_special_tokens=False
        )
        suffix = getattr(self._core.model, "end_of_word_suffix", None)
        if suffix:  # CLIP's mark of a word's end, which its own decoder leaves in
            text = text.replace(suffix, " ").strip()
        tidy = self.facts.tidy and type(self._core.model).__name__ != "BPE"  # there, spaces are part of the text
        return _tidy(text) if tidy else text

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Each id as its vocabulary spells it: "##ing", "\u0120the", "\u2581the"; "" for an id without a token."""
        return [self._core.id_to_token(i) or "" for i in self._known(ids)]

    def labels(self, ids: Sequence[int]) -> list[str]:
        """Each id as a person reads it: " the" rather than "\u0120the" or "\u2581the"; "##ing" stays."""
        spelt = self.tokens(ids)
        if type(self._core.decoder).__name__ != "ByteLevel":
            return [token.replace("\u2581", " ") for token in spelt]
        return [
            token if i in self._special_ids else self._core.decode([i], skip_special_tokens=False)
            for i, token in zip(self._known(ids), spelt, strict=True)
        ]

    def chat(self, messages: Sequence[Any], *, add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation, [{"role": "user", "content": "hi"}, ...], by the checkpoint's own template.

        Encode it with `specials=False, honour=self.specials`: the template writes the specials itself. What
        messages spell is then honoured, too; `chat_ids` honours the template's alone. Needs `pip install jinja2`.
        """
        from headway.vocabulary.chat import render

        if self.facts.chat_template is None:
            raise ValueError("this tokenizer has no chat template: write the prompt as one text")
        values = {f"{name}_token": text for name, text in self.facts.names.items()}
        return render(self.facts.chat_template, messages, values, add_generation_prompt)

    def chat_ids(self, messages: Sequence[Any], *, add_generation_prompt: bool = True) -> list[int]:
        """The prompt as ids, in which the specials are the template's: what a message spells stays text."""
        spelt = re.compile("|".join(re.escape(text) for text in sorted(self.specials, key=len, reverse=True)) or "(?!)")
        written: list[str] = []

        def number(found: re.Match[str]) -> str:
            written.append(found[0])
            return f"{_OPEN}{len(written) - 1}{_CLOSE}"

        def hide(value: Any) -> Any:
            if isinstance(value, str):
                if _OPEN in value or _CLOSE in value:
                    raise ValueError("chat: a message holds the noncharacter U+FDD1 or U+FDD2: remove it")
                return spelt.sub(number, value)
            if isinstance(value, Mapping):
                return {key: hide(inner) for key, inner in value.items()}
            return [hide(inner) for inner in value] if isinstance(value, list | tuple) else value

        prompt = self.chat([hide(message) for message in messages], add_generation_prompt=add_generation_prompt)
        ids: list[int] = []
        for at, part in enumerate(re.split(f"{_OPEN}([0-9]+){_CLOSE}", prompt)):
            text, honour = (written[int(part)], frozenset[str]()) if at % 2 else (part, self.specials)
            ids += self.encode(text, specials=False, honour=honour).ids
        return ids

    def _honour(self, honour: frozenset[str], strict: bool = False) -> "tokenizers.Tokenizer":
        """The tokenizer that sees these specials in text, and, where `strict`, no other even letter by letter."""
        if not honour and not strict:
            return self._core
        if honour - self.specials:
            raise ValueError(
                f"cannot honour {sorted(honour - self.specials)[:3]}: no special tokens of this vocabulary"
            )
        core = self._honouring.get((honour, strict))
        if core is None:  # two threads may both make one, and neither is harmed
            core = self._variant(honour, strict)
            if len(self._honouring) >= _KEPT:
                self._honouring.clear()
            self._honouring[honour, strict] = core
        return core

    def _variant(self, honour: frozenset[str], strict: bool) -> "tokenizers.Tokenizer":
        """A copy for which the honoured are not "special", so that the library's switch leaves them whole."""
        record = json.loads(self._core.to_str())
        for token in record["added_tokens"]:
            token["special"] = token["special"] and token["content"] not in honour
        if strict:
            _unspell(record, {text: _NEVER.format(i) for i, text in enumerate(sorted(self._forgeable - honour))})
        core = _from_json(json.dumps(record).encode(), "tokenizer")
        core.encode_special_tokens = True
        return core

    def _run(self, core: "tokenizers.Tokenizer", text: str, pair: str | None, specials: bool) -> Encoding:
        with naming("cannot encode"):
            _refuse_bytes(text, pair)
            found = core.encode(text, pair, add_special_tokens=specials)
        return Encoding(found.ids, found.type_ids, found.offsets, found.sequence_ids, found.word_ids)

    def _forged(self, found: Encoding, honour: frozenset[str]) -> bool:
        """Whether a token of the text itself is a special that nobody honours."""
        banned = self._forgeable_ids - {self._specials[text] for text in honour}
        return not banned.isdisjoint(found.ids) and any(
            i in banned and of is not None for i, of in zip(found.ids, found.sequence, strict=True)
        )

    def _known(self, ids: Sequence[int]) -> list[int]:
        ids = [int(i) for i in ids]
        wrong = next((i for i in ids if not 0 <= i < self.vocab), None)
        if wrong is not None:
            raise ValueError(f"id {wrong} is outside this tokenizer's {self.vocab} ids (0 to {self.vocab - 1})")
        return ids


def _refuse_bytes(*texts: str | None) -> None:
    """Half a character, which is what a shell's bytes become where they are no UTF-8, has no bytes to be encoded."""
    for text in texts:
        if isinstance(text, str) and (found := re.search("[\ud800-\udfff]", text)):
            raise ValueError(f"character {found.start()} is half a character or a byte that is no UTF-8: leave it out")


def _from_json(data: bytes, where: Path | str) -> "tokenizers.Tokenizer":
    import tokenizers

    with naming(where):
        return tokenizers.Tokenizer.from_buffer(data)


def _checked(core: "tokenizers.Tokenizer", facts: Facts) -> "tokenizers.Tokenizer":
    """The core without the cutting and padding of its file, and with every named token special; or a ValueError."""
    from tokenizers import AddedToken

    core.no_truncation()  # a file's own would cut or stretch a text without a word
    core.no_padding()
    core.encode_special_tokens = True  # the JSON file does not keep this switch
    ids = core.get_vocab()
    if not ids:
        raise ValueError("its vocabulary is empty")
    if max(ids.values()) >= len(ids) + _SPARE:
        text = max(ids, key=lambda text: ids[text])
        raise ValueError(f"id {ids[text]} of {text[:40]!r} lies far beyond its {len(ids)} tokens")
    lost = {name: text for name, text in facts.names.items() if text not in ids}
    if lost:
        raise ValueError(f"its vocabulary lacks the tokens that its files name: {str(lost)[:200]}")
    special = {token.content for token in core.get_added_tokens_decoder().values() if token.special}
    core.add_special_tokens([AddedToken(t, special=True) for t in facts.names.values() if t not in special])
    added = core.encode("", "", add_special_tokens=True).ids
    if added and max(added) > max(ids.values()):
        raise ValueError(f"it puts id {max(added)} around a text, beyond its last id {max(ids.values())}")
    return core


def _unspell(record: dict[str, Any], never: dict[str, str]) -> None:
    """Renames specials in a tokenizer.json so that no text matches them; the ids stay."""
    model = record["model"]
    if isinstance(model["vocab"], list):
        model["vocab"] = [[never.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {never.get(piece, piece): i for piece, i in model["vocab"].items()}
    if "merges" in model:
        model["merges"] = [m for m in model["merges"] if not never.keys() & {*m, "".join(m)}]
    for token in record["added_tokens"]:
        token["content"] = never.get(token["content"], token["content"])


def _tidy(text: str) -> str:
    """English spacing, as transformers' `clean_up_tokenization_spaces`."""
    for wide, tight in ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"),
                        (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")):  # fmt: skip
        text = text.replace(wide, tight)
    return text
