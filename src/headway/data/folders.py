"""A folder of pictures as rows: what each is, by the folder that it lies in, or a caption, by the text beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif", ".jp2")


def pictures(folder: Path, roles: Sequence[str]) -> list[tuple[Any, ...]]:
    """The pictures below a folder, by name. "image" is a path, "label" the name of the folder that it lies in, "text" a
    file of the same name that ends in .txt."""
    paths = files_below(folder)
    if alien := [role for role in roles if role not in _VALUES]:
        raise ValueError(
            f"{folder}: a folder of pictures has no {alien[0]!r} (it has {', '.join(_VALUES)}): use a table"
        )
    if "label" in roles and (loose := next((path for path in paths if path.parent == folder), None)):
        raise ValueError(f"{loose}: lies in no folder that says what it is: move it into one, {folder}/LABEL/")
    return [tuple(_VALUES[role](path) for role in roles) for path in paths]


def files_below(folder: Path) -> list[Path]:
    """The pictures in a folder and those below it, by name."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES and path.is_file())
    if not paths:
        raise ValueError(f"{folder}: no pictures in this folder ({' '.join(PICTURES)})")
    return paths


def _caption(path: Path) -> str:
    beside = path.with_suffix(".txt")
    text = beside.read_text("utf-8", errors="replace").strip() if beside.is_file() else ""
    if not text:
        raise ValueError(f"{path}: has no caption beside it: write one into {beside.name}, or move the picture away")
    return text


_VALUES: dict[str, Callable[[Path], str]] = {"image": str, "label": lambda path: path.parent.name, "text": _caption}
