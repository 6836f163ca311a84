"""Header: what a safetensors file says of its tensors, checked before anything else reads the file.

length (8 bytes, little-endian) | JSON {name: {dtype, shape, data_offsets}} | the tensors' bytes, gapless
(https://github.com/huggingface/safetensors). A pickle is known by its name or its first bytes, and never opened.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch

MAX_HEADER = 100_000_000  # bytes; the format's own limit
MAX_NAME = 512  # characters of a tensor's name
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
FOREIGN = (".h5", ".hdf5", ".msgpack")
CONVERT = (
    "from safetensors.torch import save_file; import torch; "
    "save_file({{k: v.clone().contiguous() for k, v in "
    "torch.load({name!r}, map_location='cpu', weights_only=True).items()}}, 'model.safetensors', {{'format': 'pt'}})"
)


class Entry(NamedTuple):
    """One tensor of a file: its bytes are `begin` to `end`, counted from where the data begin."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(file: Path) -> dict[str, Entry]:
    """Every tensor of one file, once the header is known to be whole, consistent and that of safetensors."""
    refuse_pickle(file)
    try:
        with file.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            start = handle.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= length <= min(size - 8, MAX_HEADER):
                if start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
                    raise _Pickle
                raise ValueError(f"its header would take {length:,} bytes, and it has {size:,}")
            text = handle.read(length)
        if text[:1] != b"{":
            raise ValueError("its header is not a JSON object")
        return _entries(loads(text), file, size - 8 - length)
    except _Pickle:
        raise ValueError(_pickled(file)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not readable as safetensors ({error}); get the file again") from None


def loads(text: bytes) -> Any:
    """JSON in which no key stands twice."""
    return json.loads(text.decode("utf-8"), object_pairs_hook=_unique)


def refuse_pickle(file: Path) -> None:
    """Refuses formats that run code or are not ours by the file's name."""
    if file.suffix.lower() in PICKLES:
        raise ValueError(_pickled(file))
    if file.suffix.lower() in FOREIGN:
        raise ValueError(f"{file}: only safetensors is read here; have the library that wrote it save as safetensors")


def shown(name: str) -> str:
    """A name from a file, fit for one line."""
    return repr(name if len(name) <= 80 else name[:77] + "...")


class _Pickle(Exception):
    """The first bytes are those of a pickle or of PyTorch's zip of pickles."""


def _pickled(file: Path) -> str:
    safe = re.fullmatch(r"[A-Za-z0-9][\w.-]*", file.name, re.ASCII)  # the line will be pasted into a shell
    line = CONVERT.format(name=file.name if safe else "FILE")
    return f'{file}: a pickle can run code and is never opened; in a sandbox, convert it: python -c "{line}"'


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{shown(Counter(name for name, _ in pairs).most_common(1)[0][0])} stands twice")
    return found


def _entries(header: dict[str, Any], file: Path, size: int) -> dict[str, Entry]:
    """The tensors must cover the `size` bytes of data, each byte once."""
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ is not an object of texts")
    entries = {name: _entry(name, record, file) for name, record in header.items()}
    reached = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1][3:]):
        if entry.begin != reached:
            fault = "overlaps another" if entry.begin < reached else "leaves a hole before it"
            raise ValueError(f"tensor {shown(name)} begins at byte {entry.begin:,}, not {reached:,}: it {fault}")
        reached = entry.end
    if reached != size:
        raise ValueError(f"its tensors take {reached:,} bytes, and {size:,} are there")
    return entries


def _entry(name: str, record: Any, file: Path) -> Entry:
    if not (0 < len(name) <= MAX_NAME and name.isprintable()):
        raise ValueError(f"{shown(name)} is no name of a tensor: 1 to {MAX_NAME} printable characters")
    if not isinstance(record, dict) or record.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {shown(name)} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = record["dtype"], record["shape"], record["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"tensor {shown(name)} has dtype {shown(str(dtype))}; there is {', '.join(DTYPES)}")
    if not _counts(shape) or len(shape) > 16 or math.prod(max(n, 1) for n in shape) >= 2**60:
        raise ValueError(f"tensor {shown(name)} has no possible shape: {shown(str(shape))}")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"tensor {shown(name)} has no possible data_offsets: {shown(str(offsets))}")
    takes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != takes:
        raise ValueError(
            f"tensor {shown(name)} of shape {shape} in {dtype} takes {takes:,} bytes, not {offsets[1] - offsets[0]:,}"
        )
    return Entry(file, DTYPES[dtype], tuple(shape), *offsets)


def _counts(numbers: Any) -> bool:
    """Whether it is a list of whole numbers of which none is negative or beyond 63 bits (a bool is none)."""
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2**63 for n in numbers)
