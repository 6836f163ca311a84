"""Long classification of real text: bytes from the middle of a file of Python's standard library: of which package?

The bytes of code and prose as they stand, as Long Range Arena (2011.04006) reads film reviews byte by byte; there is no
network here to fetch those. Packages of many files, from each as many rows as from any other; files that are tested on
are not trained on.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Annotated, ClassVar, Literal

import numpy as np
from msgspec import Meta

from headway.compare.tasks import PAD, Batch, Task, of_rows
from headway.data.builtin.docstrings import OTHERS
from headway.data.builtin.library import stdlib, without_source

FILES, LEAST = 8, 100_000  # files and bytes of a package that is a class
TESTED = 5  # a file in so many is held out


class Sources(Task, frozen=True):
    """packages: the largest so many. part: of the files that rows are drawn from."""

    causal: ClassVar[bool] = False
    pooled: ClassVar[bool] = True
    PUBLISHED: ClassVar = {
        "attention": "64.3%",
        "attention, local": "53.0%",
        "linformer": "53.9%",
        "performer": "65.4%",
        "linear": "65.9%",
        "S4": "86.8%",
    }
    SETUP: ClassVar = "Long Range Arena's text: film reviews of up to 4,096 bytes, good or bad (chance 50%)"

    packages: Annotated[int, Meta(ge=2, le=64)] = 8
    part: Literal["train", "test"] = "train"

    @property
    def vocabulary(self) -> int:
        return 1 + 256

    @property
    def answers(self) -> int:
        return self.packages

    def held_out(self) -> Task:
        return Sources(packages=self.packages, part="test")

    def batch(self, random: np.random.Generator, rows: int, length: int) -> Batch:
        texts = list(_files(self.part).values())[: self.packages]
        if len(texts) < self.packages:
            raise ValueError(f"sources: this Python has {len(texts)} packages of {FILES} files: ask for no more")
        labels = random.integers(self.packages, size=rows)
        ids = np.full((rows, length), PAD, dtype=np.int64)
        for row, label in enumerate(labels):
            files, shares = texts[label]
            text = files[random.choice(len(files), p=shares)]
            start = random.integers(max(1, len(text) - length + 1))
            taken = text[start : start + length]
            ids[row, : len(taken)] = 1 + taken.astype(np.int64)
        return of_rows(ids, labels, ids != PAD)


@lru_cache
def _files(part: str) -> dict[str, tuple[list[np.ndarray], np.ndarray]]:
    """The files of each package as bytes, and the share of its bytes that each is; largest package first."""
    found: dict[str, dict[str, list[np.ndarray]]] = {}
    folder = stdlib()
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        if len(parts) < 2 or OTHERS.intersection(parts) or not (text := path.read_bytes()):
            continue
        tested = int.from_bytes(hashlib.sha256("/".join(parts).encode()).digest()[:4], "big") % TESTED == 0
        halves = found.setdefault(parts[0], {"train": [], "test": []})
        halves["test" if tested else "train"].append(np.frombuffer(text, dtype=np.uint8))
    if not found:
        raise without_source()
    sizes = {name: sum(len(text) for texts in halves.values() for text in texts) for name, halves in found.items()}
    large = [n for n, h in found.items() if len(h["train"]) >= FILES and h["test"] and sizes[n] >= LEAST]
    chosen = {name: found[name][part] for name in sorted(large, key=lambda name: -sizes[name])}
    return {n: (texts, np.array([len(t) for t in texts]) / sum(map(len, texts))) for n, texts in chosen.items()}
