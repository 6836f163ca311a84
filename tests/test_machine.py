"""Claims about the machine: memory is measured, not guessed, and figures say where they come from."""

from __future__ import annotations

import sys

import pytest
import torch

from headway.machine import Peak, device, fast_bf16, hardware, versions

MIB = 2**20


def resident() -> int:
    """Bytes of this process in memory now, by another file than the one `Peak` reads."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.skipif(not sys.platform.startswith("linux") or torch.cuda.is_available(), reason="the CPU's, on Linux")
class TestPeak:
    def test_200_mib_are_seen_even_after_they_are_given_back(self) -> None:
        peak = Peak()
        before = resident()
        held = torch.ones(200 * MIB // 4)
        del held
        assert peak.bytes - before == pytest.approx(200 * MIB, rel=0.1)

    def test_what_was_held_before_is_forgotten(self) -> None:
        old = torch.ones(300 * MIB // 4)
        high = Peak().bytes
        del old
        assert high - Peak().bytes > 250 * MIB

    def test_it_never_falls(self) -> None:
        peak = Peak()
        seen = [peak.bytes]
        for size in (50, 10, 1):
            torch.ones(size * MIB // 4)
            seen.append(peak.bytes)
        assert seen == sorted(seen)


def test_fast_bf16_is_yes_or_no() -> None:
    assert isinstance(fast_bf16(), bool)


def test_a_device_is_one_that_computes() -> None:
    assert torch.ones(2, device=device()).sum().item() == 2


def test_hardware_and_versions_say_where_a_figure_comes_from() -> None:
    found = hardware()
    assert found.keys() == {"cpu", "cores", "memory_bytes", "device"}
    assert found["cpu"] and isinstance(found["cpu"], str)
    assert 1 <= found["cores"] <= 4096
    assert found["memory_bytes"] > 100 * MIB
    assert versions().keys() == {"headway", "torch", "python"}
    assert versions()["torch"] == torch.__version__
