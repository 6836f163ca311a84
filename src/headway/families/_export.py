"""Export: a model of a published family as a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from headway import families
from headway.families._sentence import sentence_files
from headway.heads import HeadSpec
from headway.image import to_published
from headway.loaded import Loaded
from headway.spec import convert
from headway.transfer import published
from headway.vocabulary import PublishedTokenizer
from headway.weights import write_weights


def export(model: Loaded, folder: Path) -> None:
    """A folder that transformers loads, atomically."""
    if not model.facts.family:
        raise ValueError("save: this model is of no published family, so transformers cannot load it: format='headway'")
    spec = msgspec.to_builtins(model.spec)
    family = families.family(model.facts.family)
    config = family.write(spec, model.facts)
    found = families.read(config, "config.json")
    _same_heads(spec.get("heads", {}), msgspec.to_builtins(found.spec).get("heads", {}), config)
    files = {"config.json": config}
    if isinstance(model.source, PublishedTokenizer):
        files |= model.source.files()
    if model.kind in ("encoder", "decoder"):
        files |= sentence_files(model.facts, spec["width"])
    if model.image is not None:
        files["preprocessor_config.json"] = to_published(model.image)
    records = {name.removesuffix(".json"): record for name, record in files.items()}
    write_weights(folder, published(model.net, found.rules), records=records)


def _same_heads(ours: dict[str, Any], theirs: dict[str, Any], config: dict[str, Any]) -> None:
    """Refuses a new head that the other library would compute otherwise; what its outputs are called is the user's."""
    for name, head in ours.items():
        own, other = (msgspec.structs.asdict(convert(one, HeadSpec, name)) for one in (head, theirs.get(name, {})))
        wrong = {key: value for key, value in other.items() if key != "labels" and own[key] != value}
        if wrong:
            needs = ", ".join(f"{key}={value!r}" for key, value in wrong.items())
            raise ValueError(f"save: transformers' {config['architectures'][0]} has a head {name!r} with {needs}: "
                             "give the new head that form, or save with format='headway'")  # fmt: skip
