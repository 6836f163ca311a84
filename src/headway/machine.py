"""The machine a run is on: what it is, which precision is fast on it, and how much memory was used at most."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fast_bf16() -> bool:
    """Whether matrix products in bf16 are faster than in fp32 here. Without hardware for it they are 20x slower."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        flags = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return platform.machine() in ("arm64", "aarch64")
    return "avx512_bf16" in flags or "amx_bf16" in flags or " bf16" in flags


def hardware() -> dict[str, Any]:
    """Facts that a figure depends on."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def versions() -> dict[str, str]:
    """Versions that a figure depends on."""
    import headway

    return {"headway": headway.__version__, "torch": torch.__version__, "python": platform.python_version()}


def gemm_peak(on: torch.device | None = None, dtype: torch.dtype = torch.float32, rounds: int = 8) -> float:
    """FLOP/s of a large matrix product, the best of `rounds`: what this machine can do."""
    on = on or torch.device("cpu")
    size = 2048 if on.type == "cpu" else 8192
    a, seconds = torch.randn(size, size, device=on).to(dtype), []
    for _ in range(rounds + 1):
        synchronise(on)
        began = time.perf_counter()
        a @ a
        synchronise(on)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds[1:])


def synchronise(on: torch.device) -> None:
    """Waits until a GPU has done what it was told, which a clock must."""
    if on.type == "cuda":
        torch.cuda.synchronize(on)


def free_memory(on: torch.device) -> int | None:
    """Bytes that a process may still take without harm to others; None where the machine does not tell."""
    if on.type == "cuda":
        return torch.cuda.mem_get_info(on)[0]
    try:
        text = Path("/proc/meminfo").read_text("utf-8")
        return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


@contextmanager
def kept_for_the_way_back(own: Iterable[torch.Tensor]) -> Iterator[dict[int, int]]:
    """Bytes of each memory that autograd keeps of what runs inside, by where it lies; what is `own` is left out."""
    left_out = {t.untyped_storage().data_ptr() for t in own}
    kept: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if (at := t.untyped_storage().data_ptr()) not in left_out:
            kept[at] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        yield kept


class Peak:
    """The most memory held since this was made: the process's on a CPU (`bytes`), the allocator's on a GPU.

    `exact` tells whether the system forgot the process's earlier peak; where it cannot, `bytes` is an upper bound.
    """

    def __init__(self, on: torch.device | None = None) -> None:
        self.on = on or device()
        self.exact = True
        gc.collect()
        if self.on.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.on)
            return
        _give_back_freed_memory()
        try:
            Path("/proc/self/clear_refs").write_text("5", "utf-8")  # Linux forgets the highest mark
        except OSError:
            self.exact = False

    @property
    def bytes(self) -> int:
        if self.on.type == "cuda":
            return torch.cuda.max_memory_allocated(self.on)
        try:
            status = Path("/proc/self/status").read_text("utf-8")
            line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
            return int(line.split()[1]) * 1024
        except (OSError, StopIteration):
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return peak if sys.platform == "darwin" else peak * 1024


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
        return next(line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _give_back_freed_memory() -> None:
    with suppress(OSError, AttributeError):  # only glibc keeps freed memory to itself
        ctypes.CDLL("libc.so.6").malloc_trim(0)
