"""The machine a run is on: what it is, which precision is fast on it, and how much memory was used at most."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
from contextlib import suppress
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


class Peak:
    """The most memory held since this was made: the process's on a CPU (`bytes`), the allocator's on a GPU."""

    def __init__(self) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return
        _give_back_freed_memory()
        with suppress(OSError):  # where it fails, the mark is that of the whole process, an upper bound
            Path("/proc/self/clear_refs").write_text("5", "utf-8")  # Linux forgets the highest mark

    @property
    def bytes(self) -> int:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
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
