"""Tiny models that read, with tokenizers made on the spot: for the tests of what one does with a model."""

from __future__ import annotations

import copy
import json
import string
from pathlib import Path
from typing import Any

import torch
from published import oracle
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from headway import families
from headway import models as kinds
from headway.hub import Loaded
from headway.image import ImageSpec
from headway.loaded import Facts
from headway.vocabulary import PublishedTokenizer

WORDS = [
    "the",
    "a",
    "of",
    "is",
    "in",
    "and",
    "cat",
    "dog",
    "paris",
    "anna",
    "lives",
    "house",
    "who",
    "where",
    "what",
    "red",
    "blue",
    "photo",
    "green",
    "on",
    "at",
    "to",
    "was",
    "are",
    "not",
    "two",
    "it",
    "he",
]
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def write_tokenizer(folder: Path) -> None:
    """BERT's tokenizer over some words and all letters, 99 ids; "cats" is cat ##s."""
    letters = list(string.ascii_lowercase)
    vocab = [*SPECIALS, *string.digits, ".", ",", "?", "'", *WORDS, *letters, *(f"##{c}" for c in letters)]
    core = Tokenizer(models.WordPiece({text: i for i, text in enumerate(vocab)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    core.decoder = decoders.WordPiece()
    core.add_special_tokens(SPECIALS)
    core.save(str(folder / "tokenizer.json"))
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    told = {"tokenizer_class": "BertTokenizerFast", "do_lower_case": True, "model_max_length": 40, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))


def published(folder: Path, architecture: str, family: str = "bert", **config: Any) -> Any:
    """transformers' tiny model of an architecture, in `folder` with a tokenizer; `config` is set in its config."""
    tiny = families.family(family).tiny()
    case = family, next(i for i, one in enumerate(tiny) if one["architectures"] == [architecture])
    theirs = copy.deepcopy(oracle(case))
    for name, value in config.items():
        setattr(theirs.config, name, value)
    theirs.save_pretrained(folder)
    write_tokenizer(folder)
    return theirs


def tokenizer(folder: Path) -> PublishedTokenizer:
    write_tokenizer(folder)
    return PublishedTokenizer.from_folder(folder)


BLOCK = {"mixer": {"name": "attention", "heads": 2}, "feedforward": {"hidden": 32}}
PROJECT = {"pool": "first", "outputs": 8, "bias": False}


def dual(folder: Path) -> Loaded:
    """Two towers, for texts and for pictures of 8 x 8."""
    text = {"kind": "encoder", "width": 16, "vocab": 99, "heads": {"project": PROJECT},
            "stack": {"blocks": [BLOCK], "positions": {"name": "learned", "length": 40}}}  # fmt: skip
    image = {"kind": "vision", "width": 16, "patches": {"image": [8, 8], "patch": 4}, "heads": {"project": PROJECT},
             "stack": {"blocks": [BLOCK], "positions": {"name": "none"}}}  # fmt: skip
    spec = {"kind": "dual", "towers": {"text": text, "image": image}}
    torch.manual_seed(0)
    net = kinds.build(spec)
    return Loaded(net, spec, tokenizer(folder), facts=Facts(max_tokens=40, pad=0), image=ImageSpec(size=(8, 8)))


def vision(**head: Any) -> Loaded:
    """Of pictures of 8 x 8, with a head that tells three kinds apart."""
    spec = {"kind": "vision", "width": 16, "patches": {"image": [8, 8], "patch": 4},
            "heads": {"classify": {"pool": "first", "outputs": 3, "labels": ["cat", "dog", "cow"], **head}},
            "stack": {"blocks": [BLOCK], "positions": {"name": "none"}}}  # fmt: skip
    torch.manual_seed(0)
    return Loaded(kinds.build(spec), spec, facts=Facts(pooling="first"), image=ImageSpec(size=(8, 8)))
