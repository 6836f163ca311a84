"""Text to ids and back: characters, whitespace words or byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909).

A thin shell over one `tokenizers.Tokenizer`. The first four ids are always PAD, BOS, EOS, UNK, and text can never
produce the first three: a literal "<eos>" in the data is ordinary text.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from headway.spec import Strict

if TYPE_CHECKING:
    import tokenizers

PAD, BOS, EOS, UNK = 0, 1, 2, 3
SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>"]
_BYTES = 256  # byte-level BPE starts from every byte, so that nothing is unknown to it


class TokenizerSpec(Strict, frozen=True, kw_only=False):
    """What a token is. `vocab` is the size a BPE vocabulary grows to (default: 1000); only BPE takes it."""

    kind: Literal["characters", "whitespace", "bpe"] = "characters"
    vocab: int | None = None

    def __post_init__(self) -> None:
        if self.vocab is not None and self.kind != "bpe":
            raise ValueError(f"vocab is for bpe only, a {self.kind} tokenizer takes what the text holds: leave it out")


class Tokenizer:
    """One trained tokenizer: `encode` adds no specials, `decode` drops them and stops at EOS."""

    def __init__(self, core: "tokenizers.Tokenizer") -> None:
        core.encode_special_tokens = True  # "<eos>" in a text is text; the JSON file does not keep this switch
        core.no_truncation()  # that of a file from elsewhere would cut or stretch a text without a word
        core.no_padding()
        self._core = core

    @property
    def vocab(self) -> int:
        """How many ids there are, the four specials included."""
        return self._core.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        ids = self._core.encode(text, add_special_tokens=False).ids
        # a whitespace word spelt like a special would otherwise be found in the vocabulary
        return [max(token, UNK) for token in ids]

    def words(self, text: str) -> tuple[list[int], list[int]]:
        """As `encode`, and the word that each id is of: what is cut before the merges, or stands between spaces."""
        found = self._core.encode(text, add_special_tokens=False)
        words = [word or 0 for word in found.word_ids]
        if type(self._core.pre_tokenizer).__name__ == "Split":  # characters
            spaces = np.array([text[start].isspace() for start, _ in found.offsets], dtype=np.int64)
            words = (2 * spaces.cumsum() - spaces).tolist()
        return [max(token, UNK) for token in found.ids], words

    @property
    def special_ids(self) -> frozenset[int]:
        """The four, and those that it was trained with besides."""
        return frozenset(i for i, token in self._core.get_added_tokens_decoder().items() if token.special)

    def decode(self, ids: Sequence[int]) -> str:
        ids = self._checked(ids)
        end = ids.index(EOS) if EOS in ids else len(ids)
        return self._core.decode([token for token in ids[:end] if token > UNK])

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Each id as a readable piece of text, specials by name: labels for an axis."""
        return [SPECIALS[token] if token <= UNK else self._core.decode([token]) for token in self._checked(ids)]

    def save(self, path: Path) -> None:
        """Write the `tokenizers` library's own JSON, one file."""
        self._core.save(str(path))

    def record(self) -> dict[str, Any]:
        """The same as `save` writes, for a larger file to hold."""
        return json.loads(self._core.to_str())

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        import tokenizers

        if not Path(path).is_file():
            raise ValueError(f"{path}: no such tokenizer file")
        try:
            core = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no narrower one
            raise ValueError(f"{path}: not a tokenizer file ({error})") from None
        first = [core.id_to_token(i) for i in range(len(SPECIALS))]
        if first != SPECIALS:
            raise ValueError(f"{path}: its first ids are {first}, not {SPECIALS}; it was not saved by headway")
        if max(core.get_vocab().values()) >= core.get_vocab_size():
            raise ValueError(f"{path}: an id lies beyond its {core.get_vocab_size()} tokens; not saved by headway")
        return cls(core)

    def special(self, name: str) -> int:
        """The id of a special that it was trained with besides the four."""
        found = self._core.token_to_id(name)
        if found is None:
            raise ValueError(f"this tokenizer has no {name!r}: train it for an objective that asks for it")
        return found

    @classmethod
    def train(cls, spec: TokenizerSpec, texts: Iterable[str], extra: Iterable[str] = ()) -> "Tokenizer":
        """Learn the vocabulary of `texts`; the same texts in any order give the same ids (BPE: the same merges).

        `extra` specials get the last ids; text can never produce them, and `decode` leaves them out."""
        from tokenizers import AddedToken

        if spec.kind not in ("characters", "whitespace", "bpe"):
            raise ValueError(f"tokenizer kind {spec.kind!r} is unknown: use 'characters', 'whitespace' or 'bpe'")
        core = _train_bpe(texts, spec.vocab) if spec.kind == "bpe" else _collect(texts, spec.kind)
        if spec.kind != "bpe" and core.get_vocab_size() == len(SPECIALS):
            raise ValueError(f"cannot train a {spec.kind} tokenizer: the texts hold not one token")
        spaced = [AddedToken(name, lstrip=spec.kind == "bpe" and name == "<mask>", special=True) for name in extra]
        core.add_special_tokens(spaced)  # where a space is a part of the word behind it, a mask takes that, too
        return cls(core)

    def _checked(self, ids: Sequence[int]) -> list[int]:
        ids = [int(token) for token in ids]
        if ids and (min(ids) < 0 or max(ids) >= self.vocab):
            wrong = next(token for token in ids if not 0 <= token < self.vocab)
            raise ValueError(f"id {wrong} is outside this tokenizer's {self.vocab} ids (0 to {self.vocab - 1})")
        return ids


def _collect(texts: Iterable[str], kind: str) -> "tokenizers.Tokenizer":
    """A vocabulary of every character or word of the texts, sorted."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    if kind == "characters":
        split: pre_tokenizers.PreTokenizer = pre_tokenizers.Split(
            Regex(r"[\s\S]"), "isolated"
        )  # "." would drop the newline
        found = {character for text in texts for character in text}
    else:
        split = pre_tokenizers.WhitespaceSplit()
        found = {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    vocab = {token: i for i, token in enumerate(SPECIALS + sorted(found - set(SPECIALS)))}
    core = Tokenizer(models.WordLevel(vocab, unk_token=SPECIALS[UNK]))
    core.pre_tokenizer = split
    if kind == "characters":
        core.decoder = decoders.Fuse()  # without a decoder the library joins with a space
    core.add_special_tokens(SPECIALS)
    return core


def _train_bpe(texts: Iterable[str], vocab: int | None) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    vocab = 1000 if vocab is None else vocab
    if vocab < len(SPECIALS) + _BYTES:
        raise ValueError(f"vocab={vocab} is too small for bpe: {_BYTES} bytes and 4 specials need at least 260")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=vocab, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False),
    )
    return core
