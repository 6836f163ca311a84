"""What limits each figure of `bench/mixers.py` that is missed: where its time goes, by torch.profiler.

`python bench/limits.py` writes `results/limits.json`; `bench/tables.py` makes of it the table in `docs/limits.md`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator

import torch
from common import RESULTS, interleave, save
from mixers import BOTH, CASES, FORWARD, TINY, Case, Side, sized, step, timed
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

PRODUCTS = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::addbmm"}
SOLVES = {"aten::linalg_solve_triangular"}
COPIES = {"aten::copy_", "aten::cat", "aten::stack", "aten::clone", "aten::fill_", "aten::constant_pad_nd"}
POINTWISE = {
    *("exp", "mul", "add", "sub", "div", "addcmul", "neg", "pow", "sum", "cumsum", "amax", "maximum", "clamp", "where"),
    *("softmax", "sigmoid", "log_sigmoid", "silu", "elu", "masked_fill", "tril"),
}
KINDS = ("matrix products", "triangular solve", "copies", "elementwise", "calls and the rest")


def kind(name: str) -> str:
    if name in PRODUCTS:
        return KINDS[0]
    if name in SOLVES:
        return KINDS[1]
    if name in COPIES:
        return KINDS[2]
    plain = name.removeprefix("aten::").removesuffix("_forward").strip("_")
    return KINDS[3] if plain in POINTWISE else KINDS[4]


def shares(side: Side, both: bool) -> dict[str, float]:
    """The share of one warm run's own processor time that each kind of operation takes."""
    run = step(side.forward, side.leaves, both)
    run()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    time: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for event in seen.key_averages():
        time[kind(event.key)] += event.self_cpu_time_total
    return {name: spent / sum(time.values()) for name, spent in time.items()}


def product_flops(side: Side) -> int:
    with FlopCounterMode(display=False) as counter:
        side.forward()
    return int(counter.get_total_flops())


def peak() -> float:
    """FLOP/s of a large fp32 matrix product here, at its best: a limit is what no run passes."""
    a, b = torch.randn(2, 2048, 2048)
    return 2 * 2048**3 / min(interleave({"product": lambda: a @ b}, 7)["product"])


def asked() -> Iterator[tuple[str, Case, int, str]]:
    """Every bar that the last run of `bench/mixers.py` did not meet, or did not measure."""
    path = RESULTS / "mixers.json"
    rows = json.loads(path.read_text("utf-8"))["rows"] if path.is_file() else []
    met = {(row["case"], row["length"], row["way"]) for row in rows if row.get("met")}
    for name, case in CASES.items():
        for length in case.lengths:
            yield from ((name, case, length, way) for way in case.bars if (name, length, way) not in met)


def main() -> None:
    load = os.getloadavg()[0]
    best, found = peak(), []  # and the machine is warm before the first is timed
    for name, case, length, way in asked():
        sides = case.make(sized(length))
        row = timed(case, sized(length), way, sides)
        if row["met"]:
            continue
        row |= {"case": name, "shares": shares(sides[0], way == BOTH)}
        if way == FORWARD:
            row["product_flops"] = product_flops(sides[0])
        best = max(best, peak())
        print(json.dumps(row), file=sys.stderr, flush=True)
        found.append(row)
    for row in found:
        if "product_flops" in row:  # no run is faster than its products at the machine's peak
            row["least_ms"] = 1000 * row["product_flops"] / best
            row["most_ratio"] = row["peer_ms"]["median"] / row["least_ms"]
    figures = {"load_average": load, "gemm_peak_gflops": best / 1e9, "rows": found}
    if TINY:
        print(json.dumps(figures, indent=1))
    else:
        save("limits", figures)


if __name__ == "__main__":
    main()
