"""Pictures in examples: the pixels of a built-in set, or the path of a file, decoded when its batch is made."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headway.image import ImageSpec, check_file, levels, pixels
from headway.objectives import Unfit


def stored(picture: Any) -> list[int]:
    """A picture as integers: height, width, channels, then its values 0 to 255; or 0, then the bytes of its path."""
    if isinstance(picture, str | os.PathLike):
        try:
            check_file(Path(picture))  # before anything is trained on it
        except ValueError as fault:
            raise Unfit(str(fault)) from None
        return [0, *os.fsencode(picture)]
    array = np.asarray(picture)
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise ValueError(f"a picture of {array.dtype} and shape {array.shape}: give uint8, height x width (x channels)")
    return [*array.shape[:2], *(array.shape[2:] or (1,)), *array.ravel().tolist()]


def restored(values: Sequence[int] | np.ndarray) -> np.ndarray | str:
    """What `stored` was given: `UInt8[H W c]`, or a path."""
    if values[0] == 0:
        return os.fsdecode(bytes(int(value) for value in values[1:]))
    return np.asarray(values[3:], np.uint8).reshape([int(size) for size in values[:3]])


def batch_of(fields: Sequence[Sequence[int] | np.ndarray], spec: ImageSpec) -> Float[Tensor, "B 3 H W"]:
    """Pictures as the model reads them; what has its size already is looked up at once, not one by one by Pillow."""
    shapes = {tuple(int(size) for size in values[:3]) for values in fields}
    if len(shapes) > 1 or spec.crop is not None or shapes not in ({(*_pair(spec), 1)}, {(*_pair(spec), 3)}):
        return pixels([restored(values) for values in fields], spec)
    shape = shapes.pop()
    values = np.stack([np.asarray(values[3:]) for values in fields]).reshape(len(fields), *shape)
    table = levels(spec)
    return torch.from_numpy(np.stack([table[c][values[..., c % shape[2]]] for c in range(3)], 1))


def _pair(spec: ImageSpec) -> tuple[int, int]:
    return (spec.size[0], spec.size[1]) if isinstance(spec.size, tuple) else (0, 0)


def spec_for(models: Sequence[Mapping[str, Any]]) -> ImageSpec | None:
    """What pictures become for models that are made anew: RGB of the size that their `patches` or `image` tell."""
    sizes = {size for model in models for size in _sizes(model)}
    if not sizes:
        return None
    if len(sizes) > 1:
        told = " and ".join(f"{height} x {width}" for height, width in sorted(sizes))
        raise ValueError(f"models of one recipe read the same pictures, and these are for {told}: make them equal")
    return ImageSpec(size=sizes.pop())


def _sizes(model: Mapping[str, Any]) -> list[tuple[int, int]]:
    if model.get("kind") == "dual":
        return [size for tower in model.get("towers", {}).values() for size in _sizes(tower)]
    size = model.get("image") or model.get("patches", {}).get("image")
    return [] if size is None else [(int(size[0]), int(size[1]))]
