"""What a checkpoint tells of its tokenizer beside the vocabulary: names, limits, and the flags of older files."""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import msgspec

from headway.spec import Size, Strict

Name = Literal["pad", "bos", "eos", "unk", "mask", "cls", "sep"]
NAMES: tuple[Name, ...] = get_args(Name)
LARGEST = 2**27  # bytes of a file of text; the largest published tokenizer.json have a quarter of it
ENDLESS = 2**31  # a model_max_length beyond it (1e30 is usual) says that there is none

# what the classes of transformers fall back on where the files of a checkpoint name nothing; the first that fits whole
_CONVENTIONS: list[dict[Name, str]] = [
    {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
    {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>", "mask": "<mask>"},
    {"bos": "<|startoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>", "pad": "<|endoftext|>"},
    {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"},
    {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"},
    {"bos": "<s>", "eos": "</s>", "unk": "<unk>"},
]


class Facts(Strict, frozen=True):
    """`names`: how each special is spelt. `tidy`: decoding drops the space before punctuation, as some files ask."""

    names: dict[Name, str] = {}
    max_tokens: Size | None = None
    padding_side: Literal["left", "right"] = "right"
    tidy: bool = False
    chat_template: str | None = None


class Told(NamedTuple):
    """The files beside a vocabulary, as they are."""

    where: Path
    config: dict[str, Any]
    names: dict[Name, str]
    chat_template: str | None

    def facts(self, known: Container[str]) -> Facts:
        """The facts, with the names that are usual where none is told; `known` are the specials of the vocabulary."""
        names = self.names or next((c for c in _CONVENTIONS if all(text in known for text in c.values())), {})
        side = self.config.get("padding_side", "right")
        if side not in ("left", "right"):
            raise ValueError(f"padding_side is {side!r}, not 'left' or 'right'")
        return Facts(
            names=names,
            max_tokens=_limit(self.config.get("model_max_length")),
            padding_side=side,
            tidy=self.flag("clean_up_tokenization_spaces", False),
            chat_template=self.chat_template,
        )

    def flag(self, key: str, default: bool) -> bool:
        value = self.config.get(key)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{key} is {value!r}, not true or false")
        return default if value is None else value

    def text(self, name: Name, default: str) -> str:
        return self.names.get(name, default)


def read_told(folder: Path) -> Told:
    """tokenizer_config.json, special_tokens_map.json and chat_template.jinja of a folder, whichever there are."""
    config, names = {}, {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):  # the latter has the last word
        if not (folder / file).exists():
            continue
        record = read_json(folder / file)
        with naming(folder / file):
            if not isinstance(record, dict):
                raise ValueError("not an object")
            names.update(_spelt(record))
        config = record
    if not (folder / "tokenizer_config.json").exists():
        config = {}
    template = config.get("chat_template")
    if isinstance(template, list):  # several, each under a name
        template = next(
            (t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"), None
        )
    if (folder / "chat_template.jinja").exists():
        template = read_text(folder / "chat_template.jinja")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{folder / 'tokenizer_config.json'}: chat_template is no text")
    return Told(folder, config, names, template)


def _spelt(record: dict[str, Any]) -> dict[Name, str]:
    names: dict[Name, str] = {}
    for name in NAMES:
        value = record.get(f"{name}_token")
        value = value.get("content") if isinstance(value, dict) else value
        if value is not None and (not isinstance(value, str) or not value):
            raise ValueError(f"{name}_token is {value!r}, no text")
        if value:
            names[name] = value
    return names


def _limit(value: Any) -> int | None:
    if value is None or (isinstance(value, int | float) and value >= ENDLESS):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or not 1 <= value <= 2**24:
        raise ValueError(f"model_max_length is {value!r}, not a number of tokens")
    return int(value)


def read_bytes(file: Path) -> bytes:
    with naming(file):
        if file.stat().st_size > LARGEST:
            raise ValueError(f"{file.stat().st_size} bytes, more than any tokenizer ({LARGEST})")
        return file.read_bytes()


def read_text(file: Path) -> str:
    with naming(file):
        return read_bytes(file).decode("utf-8")


def read_json(file: Path) -> Any:
    with naming(file):
        return msgspec.json.decode(read_bytes(file))


@contextmanager
def naming(where: Path | str) -> Iterator[None]:
    """Whatever goes wrong inside is a ValueError of one line that begins with the file's name.

    The tokenizers library raises plain `Exception`, and lets a panic of its Rust through as a BaseException.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, RecursionError):
            reason = "nested too deeply"
        if isinstance(error, OSError):
            reason = error.strerror or reason
        start = f"{where}: "
        raise ValueError(reason if reason.startswith(start) else f"{start}{reason[:300]}") from None
