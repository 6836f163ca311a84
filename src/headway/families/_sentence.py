"""What a folder of sentence-transformers (1908.10084) says beside the model: pooling, length, what texts begin with."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec

from headway.families import Config
from headway.loaded import Facts
from headway.store import read_json

MODES = {"mean": "mean", "mean_tokens": "mean", "cls": "first", "cls_token": "first", "lasttoken": "last"}


def with_sentence(facts: Facts, folder: Path) -> Facts:
    """`facts` with what modules.json and the files it names say; the same where there is none.

    A module or a way of pooling that `embed` would not do is a ValueError that names the file.
    """
    file = folder / "modules.json"
    if not file.is_file():
        return facts
    found = [_module(entry, file) for entry in read_json(file, list)]
    kinds = [kind for kind, _ in found]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ValueError(f"{file}: modules {', '.join(kinds)}; Headway knows Transformer, Pooling and Normalize, so")
    return msgspec.structs.replace(
        facts,
        pooling=_pooling(_config(folder / found[1][1] / "config.json")),
        normalize="Normalize" in kinds,
        max_tokens=_length(folder, facts.max_tokens),
        prefixes=_prompts(_config(folder / "config_sentence_transformers.json")),
    )


def sentence_files(facts: Facts, width: int) -> dict[str, Any]:
    """The way back: the files, by name, that say what `with_sentence` read; none where no pooling was told."""
    if facts.pooling not in MODES.values():
        return {}
    kinds = ["Transformer", "Pooling", *(["Normalize"] if facts.normalize else [])]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    flags = {"cls_token": "first", "mean_tokens": "mean", "lasttoken": "last"}
    pooling = {f"pooling_mode_{name}": ours == facts.pooling for name, ours in flags.items()}
    return {
        "modules.json": modules,
        "1_Pooling/config.json": {"word_embedding_dimension": width, **pooling, "include_prompt": True},
        "sentence_bert_config.json": {"max_seq_length": facts.max_tokens, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": facts.prefixes, "default_prompt_name": None},
    }


def _module(entry: Any, file: Path) -> tuple[str, str]:
    """The class of a module, and the folder of its configuration, which is inside."""
    kind, place = (entry.get("type"), entry.get("path")) if isinstance(entry, dict) else (None, None)
    if not isinstance(kind, str) or not isinstance(place, str) or not kind.startswith("sentence_transformers."):
        raise ValueError(f"{file}: {entry!r:.80} is no module of sentence-transformers")
    if not re.fullmatch(r"(\w[\w.-]*)?", place):
        raise ValueError(f"{file}: path {place!r:.80} leaves the folder")
    return kind.rpartition(".")[2], place


def _config(file: Path) -> Config:
    return Config(read_json(file, dict) if file.is_file() else {}, str(file))


def _pooling(config: Config) -> str:
    """One way of pooling: by name, or, in older files, by a row of flags."""
    config.ignore("word_embedding_dimension", "embedding_dimension")
    config.expect("include_prompt", True)
    flags = [name for name in config.data if name.startswith("pooling_mode_")]
    chosen = [name.removeprefix("pooling_mode_") for name in flags if config.take(name, False, bool)]
    told = config.take("pooling_mode", chosen or "mean", (str, list))
    modes = [told] if isinstance(told, str) else told
    config.finish()
    if len(modes) != 1 or modes[0] not in MODES:
        raise ValueError(f"{config.where}: pools by {', '.join(map(str, modes))}; Headway knows mean, cls or lasttoken")
    return MODES[modes[0]]


def _length(folder: Path, positions: int | None) -> int | None:
    """The least of what the positions, the tokenizer and an older file allow."""
    config = _config(folder / "sentence_bert_config.json")
    config.expect("do_lower_case", False)
    tokenizer = _config(folder / "tokenizer_config.json")
    told = config.size("max_seq_length") if config.data.get("max_seq_length") is not None else None
    longest = tokenizer.data.get("model_max_length")  # 1e30 says that there is none
    limits = [n for n in (positions, told, longest) if isinstance(n, int) and 1 <= n <= 2**24]
    return min(limits, default=None)


def _prompts(config: Config) -> dict[str, str]:
    """What texts begin with, by task; "" says nothing."""
    config.expect("default_prompt_name")
    found = config.take("prompts", {}, dict)
    if not all(isinstance(text, str) for text in found.values()):
        raise ValueError(f"{config.where}: prompts are texts by name, not {found!r:.60}")
    return {name: text for name, text in found.items() if text}
