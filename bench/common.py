"""What every bench shares: medians of interleaved runs, and a results file that says where it was measured."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from headway.machine import hardware, versions

RESULTS = Path(__file__).parent / "results"


def interleave(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side, in turn (A B A B ...), after one warm-up of each; so a drifting machine hits both."""
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def save(name: str, figures: dict[str, Any]) -> None:
    """Writes `results/NAME.json` and prints it."""
    RESULTS.mkdir(exist_ok=True)
    record = {"hardware": hardware(), "versions": versions(), "threads": torch.get_num_threads(), **figures}
    text = json.dumps(record, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n", "utf-8")
    print(text)
