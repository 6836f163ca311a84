"""Pairs of a source and a target as a batch: the encoder reads source + EOS, the decoder BOS + target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Bool, Int
from torch import Tensor

from headway.data.batches import IGNORE, Batch, padded
from headway.data.examples import Example
from headway.text import BOS, EOS, PAD


@dataclass(frozen=True, kw_only=True)
class Pairs(Batch):
    """`source_valid` is None when no source is padded; `tokens` counts the real ones of source and target, EOS too."""

    source: Int[Tensor, "B S"]
    source_valid: Bool[Tensor, "B S"] | None
    target_in: Int[Tensor, "B T"]
    target_out: Int[Tensor, "B T"]


def collate(examples: Sequence[Example], bos: int = BOS, eos: int = EOS, pad: int = PAD) -> Pairs:
    """Pad to the right: source + EOS, BOS + target (what the decoder reads), target + EOS (what it should say)."""
    return shifted([([*source, eos], [*target, eos]) for source, target in examples], bos, pad)


def shifted(examples: Sequence[Example], start: int, pad: int) -> Pairs:
    """The same for pairs that have their ends: the decoder reads `start` and all of the target but its last token."""
    if not examples:
        raise ValueError("cannot collate 0 examples")
    source, source_valid = padded([source for source, _ in examples], pad)
    target_in, _ = padded([[start, *target[:-1]] for _, target in examples], pad)
    target_out, target_valid = padded([target for _, target in examples], IGNORE)
    targets = int(target_valid.sum())
    return Pairs(
        source=source,
        source_valid=None if bool(source_valid.all()) else source_valid,
        target_in=target_in,
        target_out=target_out,
        tokens=int(source_valid.sum()) + targets,
        targets=targets,
    )
