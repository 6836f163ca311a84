"""GGUF: llama.cpp's file of metadata and (mostly quantized) tensors, read with every number checked before it is used.

    header | key-value pairs | tensor infos | padding | tensor data
Our own walk over the bytes, because the `gguf` library's follows whatever counts a file claims; the arithmetic of
the quantizations is the library's. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import itertools
import math
import mmap
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

# type code -> struct format of one value; 8 is a string, 9 an array
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_NAMES = {0: "u8", 1: "i8", 2: "u16", 3: "i16", 4: "u32", 5: "i32", 6: "f32", 7: "bool", 8: "string", 9: "array"}
_SMALLEST_PAIR = 8 + 4 + 1  # a key's length, a type, one byte
_SMALLEST_INFO = 8 + 4 + 4 + 8  # a name's length, no dimension, a type, an offset
RUN = 2**20  # numbers that are read at once
MAX_DIMS, MAX_ALIGNMENT, MAX_NAME = 4, 2**20, 1024
MAX_ENTRIES = 2**22  # of a list; vocabularies and their merges have a tenth of it, and each becomes a Python object


class Gguf(NamedTuple):
    """What a file holds: plain Python values by key, and its tensors by llama.cpp's names."""

    metadata: dict[str, Any]
    tensors: GgufTensors


class _Info(NamedTuple):
    kind: int  # a gguf.GGMLQuantizationType
    shape: tuple[int, ...]  # outermost first, as PyTorch writes it
    start: int  # of the data, from the file's beginning
    size: int  # in bytes


class GgufTensors(Mapping[str, Tensor]):
    """Tensors by name, each read and dequantized when it is asked for and not kept.

    F32, F16 and BF16 come as they are stored; every quantized one as fp32. `shapes` costs no reading.
    """

    def __init__(self, path: Path, infos: dict[str, _Info]) -> None:
        self.path, self._infos = path, infos

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self._infos.items()}

    @property
    def kinds(self) -> dict[str, str]:
        """How each is stored: {"token_embd.weight": "Q8_0"}."""
        from gguf import GGMLQuantizationType

        return {name: GGMLQuantizationType(info.kind).name for name, info in self._infos.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name, 0, self._infos[name].shape[0])

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, int, Tensor]]:
        """(name, first row, rows) as the data lie in the file, a few megabytes at a time."""
        for name in sorted(names, key=lambda name: self._infos[name].start):
            shape = self._infos[name].shape
            step = max(1, RUN * shape[0] // math.prod(shape)) if len(shape) > 1 else shape[0]
            for start in range(0, shape[0], step):
                yield name, start, self._read(name, start, min(start + step, shape[0]))

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows. Read, not mapped: mapped pages count as memory of this process."""
        from gguf import GGMLQuantizationType, quants

        info = self._infos[name]
        kind, shape = GGMLQuantizationType(info.kind), (stop - start, *info.shape[1:])
        begin, end = (info.start + info.size * row // info.shape[0] for row in (start, stop))
        data = np.fromfile(self.path, np.uint8, end - begin, offset=begin)
        if len(data) < end - begin:
            raise ValueError(f"{self.path}: ends within tensor '{name}': it changed while it was read; get it again")
        if kind.name in ("F32", "F16", "BF16"):  # NumPy has no bf16: its bits are carried over
            plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind.name]
            return torch.from_numpy(data).view(plain).reshape(shape)
        with np.errstate(all="ignore"):  # a scale that is not finite is the file's, and shows in the numbers
            found = quants.dequantize(data.reshape(*shape[:-1], -1), kind)
        return torch.from_numpy(np.ascontiguousarray(found)).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)


def read_gguf(path: str | Path) -> Gguf:
    """The metadata and tensors of a GGUF file (versions 2 and 3, little-endian); nothing in it is executed.

    A truncated file, a count, dimension or offset that cannot be, overlapping tensors, and a quantization that is
    not known are a ValueError of one line that names the file. Needs `pip install gguf`.
    """
    path = Path(path)
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ValueError(f"{path}: reading GGUF needs the gguf library: pip install gguf") from None
    try:
        with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            metadata, infos = _parse(_Walk(data))
        return Gguf(metadata, GgufTensors(path, infos))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:  # mmap refuses an empty file so, too
        raise ValueError(f"{path}: not a whole GGUF file: {error}") from None


def unpermute(weight: Float[Tensor, "N ..."], heads: int) -> Float[Tensor, "N ..."]:
    """The rows of a Llama's q (or, with its own number of heads, k) projection as published checkpoints order them.

    llama.cpp rotates neighbours, (0, 1), (2, 3), ..., where others rotate halves, (0, D/2), (1, D/2+1), ...; its
    converter interleaves the rows of each head of the "llama" architecture, and this undoes it. Biases likewise.
    """
    rows = weight.shape[0]
    if heads < 1 or rows % (2 * heads):
        raise ValueError(f"cannot reorder {rows} rows as {heads} heads of an even width")
    return weight.reshape(heads, rows // heads // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


class _Walk:
    """A place in the bytes that only moves forward, and never beyond the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.end = data, 0, len(data)

    def take(self, count: int, what: str) -> bytes:
        if count > self.end - self.at:
            raise ValueError(f"{what} of {count} bytes at byte {self.at} goes beyond the end at {self.end}")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str, what: str) -> Any:
        raw = self.take(struct.calcsize("<" + form), what)
        if form == "?" and raw not in (b"\0", b"\1"):
            raise ValueError(f"{what} at byte {self.at - 1} is {raw[0]}, no truth value")
        return struct.unpack("<" + form, raw)[0]

    def strings(self, count: int, what: str) -> list[str]:
        """Strings in a row; one loop, because a vocabulary has a hundred thousand."""
        found, data, at, length = [], self.data, self.at, struct.Struct("<Q").unpack_from
        for _ in range(count):
            size = length(data, at)[0] if self.end - at >= 8 else self.end
            if size > self.end - at - 8:
                raise ValueError(f"{what} of {size} bytes at byte {at + 8} goes beyond the end at {self.end}")
            at += 8 + size
            try:
                found.append(data[at - size : at].decode("utf-8"))
            except UnicodeDecodeError:
                raise ValueError(f"{what} that ends at byte {at} is not UTF-8") from None
        self.at = at
        return found

    def value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self.strings(1, what)[0]
        if kind == _ARRAY:
            return self.array(what)
        if kind not in _SCALARS:
            raise ValueError(f"{what} has the unknown type {kind}")
        return self.number(_SCALARS[kind], what)

    def array(self, what: str) -> list[Any]:
        kind, count = self.number("I", what), self.number("Q", what)
        if kind == _ARRAY or (kind != _STRING and kind not in _SCALARS):
            raise ValueError(f"{what} is a list of the type {kind}, which is {_NAMES.get(kind, 'unknown')}")
        each = 8 if kind == _STRING else struct.calcsize("<" + _SCALARS[kind])
        if count > (self.end - self.at) // each:
            raise ValueError(f"{what} claims {count} entries; {self.end - self.at} bytes are left")
        if count > MAX_ENTRIES:
            raise ValueError(f"{what} has {count} entries, more than any list of a model ({MAX_ENTRIES})")
        if kind == _STRING:
            return self.strings(count, what)
        if kind == 7:
            return [self.number("?", what) for _ in range(count)]
        return list(struct.unpack(f"<{count}{_SCALARS[kind]}", self.take(count * each, what)))


def _parse(walk: _Walk) -> tuple[dict[str, Any], dict[str, _Info]]:
    if walk.take(4, "the magic number") != b"GGUF":
        raise ValueError("it does not begin with 'GGUF'")
    version = walk.number("I", "the version")
    if version not in (2, 3):
        raise ValueError(f"version {version} (big-endian files included) is not read, only 2 and 3: convert it anew")
    tensors, pairs = walk.number("Q", "the number of tensors"), walk.number("Q", "the number of keys")
    if pairs > walk.end // _SMALLEST_PAIR or tensors > walk.end // _SMALLEST_INFO:
        raise ValueError(f"it claims {pairs} keys and {tensors} tensors, more than its {walk.end} bytes can hold")
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = _name(walk, "a key", metadata)
        metadata[key] = walk.value(walk.number("I", f"the type of '{key}'"), f"'{key}'")
    claims: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(tensors):
        name, dims = _name(walk, "a tensor's name", claims), _dims(walk)
        kind, offset = walk.number("I", f"the type of '{name}'"), walk.number("Q", f"the offset of '{name}'")
        claims[name] = (tuple(reversed(dims)), kind, offset)
    return metadata, _place(claims, walk.at, walk.end, metadata.get("general.alignment", 32))


def _name(walk: _Walk, what: str, seen: Mapping[str, Any]) -> str:
    name = walk.strings(1, what)[0]
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise ValueError(f"{what} of {len(name)} characters before byte {walk.at} is empty, too long or not printable")
    if name in seen:
        raise ValueError(f"'{name}' is there twice")
    return name


def _dims(walk: _Walk) -> list[int]:
    count = walk.number("I", "a number of dimensions")
    if not 1 <= count <= MAX_DIMS:
        raise ValueError(f"a tensor has {count} dimensions, not 1 to {MAX_DIMS}")
    return [walk.number("Q", "a dimension") for _ in range(count)]


def _place(claims: dict[str, tuple[tuple[int, ...], int, int]], at: int, end: int, align: Any) -> dict[str, _Info]:
    """Where each tensor lies, once all are known to fit, by themselves and beside each other."""
    if type(align) is not int or not 1 <= align <= MAX_ALIGNMENT or align & (align - 1):
        raise ValueError(f"general.alignment is {align!r}, not a power of two up to {MAX_ALIGNMENT}")
    base = -(-at // align) * align
    infos = {}
    for name, (shape, kind, offset) in claims.items():
        size = _size(name, shape, kind)
        if offset % align:
            raise ValueError(f"tensor '{name}' begins at {offset}, no multiple of the alignment {align}")
        if base + offset + size > end:
            raise ValueError(
                f"tensor '{name}' of shape {list(shape)} ends at byte {base + offset + size}, the file at {end}"
            )
        infos[name] = _Info(kind, shape, base + offset, size)
    order = sorted(infos.items(), key=lambda item: item[1].start)
    for (name, one), (other, two) in itertools.pairwise(order):
        if one.start + one.size > two.start:
            raise ValueError(f"tensors '{name}' and '{other}' overlap at byte {two.start}")
    return infos


def _size(name: str, shape: tuple[int, ...], kind: int) -> int:
    """The bytes that a tensor of this shape and kind takes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    try:
        block, each = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise ValueError(f"tensor '{name}' has the unknown quantization {kind}; a newer gguf may know it") from None
    label = GGMLQuantizationType(kind).name
    if label not in ("F32", "F16", "BF16") and GGMLQuantizationType(kind) not in quants._type_traits:
        raise ValueError(f"tensor '{name}' is stored as {label}, which no weight is, or which gguf cannot dequantize")
    elements = 1
    for dim in shape:
        elements *= dim
    if elements < 1 or shape[-1] % block:
        raise ValueError(f"tensor '{name}' of shape {list(shape)} is empty or not in {label} blocks of {block}")
    return elements // block * each
