"""Export: a model of a published family as a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from headway import families
from headway.families import Published
from headway.families._sentence import sentence_files
from headway.heads import HeadSpec
from headway.image import to_published
from headway.loaded import Loaded
from headway.mixers import options
from headway.spec import convert
from headway.transfer import published
from headway.vocabulary import PublishedTokenizer
from headway.weights import write_weights


def export(model: Loaded, folder: Path) -> None:
    """A folder that transformers loads, atomically."""
    found, config, spec = published_form(model)
    files = {"config.json": config}
    if isinstance(model.source, PublishedTokenizer):
        files |= model.source.files()
    if model.kind in ("encoder", "decoder"):
        files |= sentence_files(model.facts, spec["width"])
    if model.image is not None:
        files["preprocessor_config.json"] = to_published(model.image)
    records = {name.removesuffix(".json"): record for name, record in files.items()}
    write_weights(folder, published(model.net, found.rules), records=records)


def published_form(model: Loaded) -> tuple[Published, dict[str, Any], dict[str, Any]]:
    """What a model is as its family publishes it, its config.json, and its spec as plain data."""
    if not model.facts.family:
        raise ValueError("save: this model is of no published family, so transformers cannot load it: format='headway'")
    spec = msgspec.to_builtins(model.spec)
    try:
        config = families.family(model.facts.family).write(spec, model.facts)
    except KeyError:  # what a family's layers have, and those of other mixers have not
        raise _other_mixers(model.facts.family) from None
    found = families.read(config, "config.json")
    if _mixers_of(spec) != _mixers_of(msgspec.to_builtins(found.spec)):
        raise _other_mixers(model.facts.family)
    _same_heads(spec.get("heads", {}), msgspec.to_builtins(found.spec).get("heads", {}), config)
    return found, config, spec


def _mixers_of(spec: dict[str, Any]) -> list[Any]:
    """The options of every layer's mixer, those that are left out, too."""
    if "towers" in spec:
        return [_mixers_of(tower) for tower in spec["towers"].values()]
    stacks = [spec[name] for name in ("stack", "encoder", "decoder") if name in spec]
    blocks = [block for stack in stacks for block in [*stack["blocks"]] * stack.get("repeat", 1)]
    return [None if block.get("mixer") is None else _options_of(block["mixer"], spec["width"]) for block in blocks]


def _options_of(mixer: dict[str, Any], width: int) -> dict[str, Any]:
    """All options of a mixer, what is left out as it then is."""
    found = msgspec.to_builtins(options(mixer)[1])
    usual = {
        "kv_heads": found.get("heads"),
        "head_dim": width // found.get("heads", width),
        "out_bias": found.get("bias"),
    }
    return {"name": mixer["name"], **{k: usual.get(k) if value is None else value for k, value in found.items()}}


def _other_mixers(family: str) -> ValueError:
    return ValueError(f"save: some layers mix their tokens otherwise than transformers' {family} does, which would "
                      "compute something else: save with format='headway'")  # fmt: skip


def _same_heads(ours: dict[str, Any], theirs: dict[str, Any], config: dict[str, Any]) -> None:
    """Refuses a new head that the other library would compute otherwise; what its outputs are called is the user's."""
    for name, head in ours.items():
        own, other = (msgspec.structs.asdict(convert(one, HeadSpec, name)) for one in (head, theirs.get(name, {})))
        wrong = {key: value for key, value in other.items() if key != "labels" and own[key] != value}
        if wrong:
            needs = ", ".join(f"{key}={value!r}" for key, value in wrong.items())
            raise ValueError(f"save: transformers' {config['architectures'][0]} has a head {name!r} with {needs}: "
                             "give the new head that form, or save with format='headway'")  # fmt: skip
