"""FlashAttention in Triton: the kernels for a GPU (2205.14135, 2307.08691). `tiled.py` tells the algorithm in PyTorch.

A program owns one tile of queries (forward, dq) or of keys (dk, dv) of one head and goes over the tiles it has to meet.
`back` and `forth` say how far a query sees, in positions; causal is forth = 0. Without given positions these are
indices: `reach` reckons the range of tiles, and those in its middle need no mask. With them (PLACED) the positions
themselves are compared, and `edges` bound the range. Scores are in base 2. Importing this file needs Triton.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from headway.kernels.triton import Plan

LOG2_E = 1.4426950408889634

# fmt: off


@triton.jit
@no_type_check
def load_rows(base, start, stride, there, D: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """SIZE rows of a matrix of width D, filled up with zeros to WIDTH; zeros where not `there`, which is never read."""
    dims = tl.arange(0, WIDTH)
    there = there[:, None]
    if D < WIDTH:
        there = there & (dims < D)[None, :]
    at = base + tl.cast(start, tl.int64) * stride + (tl.arange(0, SIZE)[:, None] * stride + dims[None, :])
    return tl.load(at, mask=there, other=0.0)


@triton.jit
@no_type_check
def store_rows(base, start, stride, there, value, D: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    dims = tl.arange(0, WIDTH)
    there = there[:, None]
    if D < WIDTH:
        there = there & (dims < D)[None, :]
    at = base + tl.cast(start, tl.int64) * stride + (tl.arange(0, SIZE)[:, None] * stride + dims[None, :])
    tl.store(at, value.to(base.dtype.element_ty), mask=there)


@triton.jit
@no_type_check
def place(table, at, end, PLACED: tl.constexpr):
    """The positions of tokens `at`; far below all others behind the end."""
    if PLACED:
        return tl.load(table + at, mask=at < end, other=-(2**30))
    return tl.where(at < end, at, -(2**30))


@triton.jit
@no_type_check
def allows(q, k, q_segment, k_segment, back, forth, BACK: tl.constexpr, FORTH: tl.constexpr, PACKED: tl.constexpr):
    """`Mask.allows`, on positions and segments that broadcast against each other; false behind either end."""
    allowed = (k >= 0) & (q > -(2**30))
    if BACK:
        allowed = allowed & (k >= q - back)
    if FORTH:
        allowed = allowed & (k <= q + forth)
    if PACKED:
        allowed = allowed & (q_segment == k_segment)
    return allowed


@triton.jit
@no_type_check
def reach(start, back, forth, end, SIZE: tl.constexpr, STEP: tl.constexpr, BACK: tl.constexpr, FORTH: tl.constexpr):
    """Where tokens [start, start + SIZE) see to: the first, from and until where each of them sees all, the end."""
    first, whole, until, last = 0, 0, end, end
    if BACK:
        first = tl.maximum(start - back, 0) // STEP * STEP
        whole = (tl.maximum(start + SIZE - 1 - back, 0) + STEP - 1) // STEP * STEP
    if FORTH:
        until = tl.minimum(start + forth + 1, end)
        last = tl.minimum(start + SIZE + forth, end)
    whole = tl.minimum(whole, (last + STEP - 1) // STEP * STEP)
    return first, whole, tl.maximum(until // STEP * STEP, whole), last


@triton.jit
@no_type_check
def bounds(edges, tile, grains, SIZE: tl.constexpr, STEP: tl.constexpr, GRAIN: tl.constexpr):
    """The same of a tile among given positions, where none is known to see all; `edges` are told by GRAIN tokens."""
    at = tile * (SIZE // GRAIN) + tl.arange(0, SIZE // GRAIN)
    first = tl.min(tl.load(edges + at, mask=at < grains, other=2**30), 0)
    last = tl.max(tl.load(edges + grains + at, mask=at < grains, other=0), 0)
    return first // STEP * STEP, last, last, last


@triton.jit
@no_type_check
def forward_kernel(
    q_base, k_base, v_base, y_base, logsum, q_places, k_places, q_segments, k_segments, edges,
    q_row, q_head, q_step, k_row, k_head, k_step, v_row, v_head, v_step, y_row, y_head, y_step,
    heads, group, queries, keys, grains, scale, back, forth,
    D: tl.constexpr, WIDTH: tl.constexpr, BACK: tl.constexpr, FORTH: tl.constexpr, PLACED: tl.constexpr,
    PACKED: tl.constexpr, HOLES: tl.constexpr, PRECISION: tl.constexpr, GRAIN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """y and the base-2 logarithm of the sum of each query's exponentials, of one tile of queries."""
    tiles = tl.cdiv(queries, ROWS)
    tile = tiles - 1 - tl.program_id(0) % tiles  # under a causal mask the last ones have most to do
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    row, head = pair // heads, pair % heads
    k_base += row * k_row + head // group * k_head
    v_base += row * v_row + head // group * v_head
    rows = tile * ROWS + tl.arange(0, ROWS)
    q = load_rows(q_base + row * q_row + head * q_head, tile * ROWS, q_step, rows < queries, D, WIDTH, ROWS)
    q_at = place(q_places + row * queries, rows, queries, PLACED)
    q_segment = tl.load(q_segments + row * queries + rows, mask=rows < queries, other=0) if PACKED else q_at
    if PLACED:
        first, whole, until, last = bounds(edges + 2 * row * grains, tile, grains, ROWS, COLS, GRAIN)
    else:
        first, whole, until, last = reach(tile * ROWS, back, forth, keys, ROWS, COLS, BACK, FORTH)

    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    # keys that some rows see, that all see, that some see; where positions are given all are of the first kind
    for phase in tl.static_range(0 if BACK or PLACED else 1, 1 if PLACED else 3):
        begin = first if phase == 0 else (whole if phase == 1 else until)
        end = whole if phase == 0 else (until if phase == 1 else last)
        for start in range(begin, end, COLS):
            cols = start + tl.arange(0, COLS)
            there = cols < keys
            if phase != 1:
                k_at = place(k_places + row * keys, cols, keys, PLACED)
                k_segment = tl.load(k_segments + row * keys + cols, mask=there, other=0) if PACKED else k_at
                allowed = allows(q_at[:, None], k_at[None, :], q_segment[:, None], k_segment[None, :],
                                 back, forth, BACK, FORTH, PACKED)
                there = k_at >= 0
                if HOLES:  # a key that no query sees is never read: NaN may stand there
                    there = tl.max(allowed.to(tl.int32), 0) > 0
            k = load_rows(k_base, start, k_step, there, D, WIDTH, COLS)
            v = load_rows(v_base, start, v_step, there, D, WIDTH, COLS)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            if phase != 1:
                scores = tl.where(allowed, scores, float("-inf"))
            more = tl.maximum(most, tl.max(scores, 1))
            pivot = tl.where(more == float("-inf"), 0.0, more)  # nothing seen so far: 2^(-inf - 0) = 0
            shares = tl.exp2(scores - pivot[:, None])
            shrink = tl.exp2(most - pivot)
            total = total * shrink + tl.sum(shares, 1)
            acc = tl.dot(shares.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
            most = more

    alive = tl.where(total == 0.0, 1.0, total)
    y = acc / alive[:, None]
    store_rows(y_base + row * y_row + head * y_head, tile * ROWS, y_step, rows < queries, y, D, WIDTH, ROWS)
    found = tl.where(total == 0.0, float("inf"), most + tl.log2(alive))  # 2^(s - inf) = 0: such a query has no weights
    tl.store(logsum + pair * queries + rows, found, mask=rows < queries)


@triton.jit
@no_type_check
def queries_kernel(
    q_base, k_base, v_base, y_base, dy_base, dq_base, logsum, delta, q_places, k_places, q_segments, k_segments, edges,
    q_row, q_head, q_step, k_row, k_head, k_step, v_row, v_head, v_step, y_row, y_head, y_step,
    dy_row, dy_head, dy_step, dq_row, dq_head, dq_step,
    heads, group, queries, keys, grains, scale, back, forth,
    D: tl.constexpr, WIDTH: tl.constexpr, BACK: tl.constexpr, FORTH: tl.constexpr, PLACED: tl.constexpr,
    PACKED: tl.constexpr, HOLES: tl.constexpr, PRECISION: tl.constexpr, GRAIN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """dq, and delta = rowsum(dy * y) for the kernel that comes behind, of one tile of queries."""
    tiles = tl.cdiv(queries, ROWS)
    tile = tiles - 1 - tl.program_id(0) % tiles
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    row, head = pair // heads, pair % heads
    k_base += row * k_row + head // group * k_head
    v_base += row * v_row + head // group * v_head
    rows = tile * ROWS + tl.arange(0, ROWS)
    q = load_rows(q_base + row * q_row + head * q_head, tile * ROWS, q_step, rows < queries, D, WIDTH, ROWS)
    y = load_rows(y_base + row * y_row + head * y_head, tile * ROWS, y_step, rows < queries, D, WIDTH, ROWS)
    dy = load_rows(dy_base + row * dy_row + head * dy_head, tile * ROWS, dy_step, rows < queries, D, WIDTH, ROWS)
    sums = tl.load(logsum + pair * queries + rows, mask=rows < queries, other=0.0)
    deltas = tl.sum(y.to(tl.float32) * dy.to(tl.float32), 1)
    tl.store(delta + pair * queries + rows, deltas, mask=rows < queries)
    q_at = place(q_places + row * queries, rows, queries, PLACED)
    q_segment = tl.load(q_segments + row * queries + rows, mask=rows < queries, other=0) if PACKED else q_at
    if PLACED:
        first, whole, until, last = bounds(edges + 2 * row * grains, tile, grains, ROWS, COLS, GRAIN)
    else:
        first, whole, until, last = reach(tile * ROWS, back, forth, keys, ROWS, COLS, BACK, FORTH)

    dq = tl.zeros([ROWS, WIDTH], tl.float32)
    for phase in tl.static_range(0 if BACK or PLACED else 1, 1 if PLACED else 3):
        begin = first if phase == 0 else (whole if phase == 1 else until)
        end = whole if phase == 0 else (until if phase == 1 else last)
        for start in range(begin, end, COLS):
            cols = start + tl.arange(0, COLS)
            there = cols < keys
            if phase != 1:
                k_at = place(k_places + row * keys, cols, keys, PLACED)
                k_segment = tl.load(k_segments + row * keys + cols, mask=there, other=0) if PACKED else k_at
                allowed = allows(q_at[:, None], k_at[None, :], q_segment[:, None], k_segment[None, :],
                                 back, forth, BACK, FORTH, PACKED)
                there = k_at >= 0
                if HOLES:
                    there = tl.max(allowed.to(tl.int32), 0) > 0
            k = load_rows(k_base, start, k_step, there, D, WIDTH, COLS)
            v = load_rows(v_base, start, v_step, there, D, WIDTH, COLS)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            if phase != 1:
                scores = tl.where(allowed, scores, float("-inf"))
            shares = tl.exp2(scores - sums[:, None])
            dscores = shares * (tl.dot(dy, tl.trans(v), input_precision=PRECISION) - deltas[:, None])
            dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)

    dq *= scale * 0.6931471805599453  # ln 2: the scores are in base 2
    store_rows(dq_base + row * dq_row + head * dq_head, tile * ROWS, dq_step, rows < queries, dq, D, WIDTH, ROWS)


@triton.jit
@no_type_check
def keys_kernel(
    q_base, k_base, v_base, dy_base, dk_base, dv_base, logsum, delta, q_places, k_places, q_segments, k_segments, edges,
    q_row, q_head, q_step, k_row, k_head, k_step, v_row, v_head, v_step, dy_row, dy_head, dy_step,
    dk_row, dk_head, dk_step, dv_row, dv_head, dv_step,
    heads, group, queries, keys, grains, scale, back, forth,
    D: tl.constexpr, WIDTH: tl.constexpr, BACK: tl.constexpr, FORTH: tl.constexpr, PLACED: tl.constexpr,
    PACKED: tl.constexpr, HOLES: tl.constexpr, PRECISION: tl.constexpr, GRAIN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """dk and dv of one tile of keys, summed over the heads that share them; all scores stand transposed, keys first."""
    tiles = tl.cdiv(keys, COLS)
    tile = tl.program_id(0) % tiles
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    groups = heads // group
    row, shared = pair // groups, pair % groups
    cols = tile * COLS + tl.arange(0, COLS)
    k = load_rows(k_base + row * k_row + shared * k_head, tile * COLS, k_step, cols < keys, D, WIDTH, COLS)
    v = load_rows(v_base + row * v_row + shared * v_head, tile * COLS, v_step, cols < keys, D, WIDTH, COLS)
    k_at = place(k_places + row * keys, cols, keys, PLACED)
    k_segment = tl.load(k_segments + row * keys + cols, mask=cols < keys, other=0) if PACKED else k_at
    if PLACED:
        first, whole, until, last = bounds(edges + 2 * row * grains, tile, grains, COLS, ROWS, GRAIN)
    else:  # a key is seen from as far behind it as queries see ahead, and the other way round
        first, whole, until, last = reach(tile * COLS, forth, back, queries, COLS, ROWS, FORTH, BACK)

    dk = tl.zeros([COLS, WIDTH], tl.float32)
    dv = tl.zeros([COLS, WIDTH], tl.float32)
    for member in range(group):
        head = shared * group + member
        q_own = q_base + row * q_row + head * q_head
        dy_own = dy_base + row * dy_row + head * dy_head
        told = (row * heads + head) * queries
        # queries behind the last are zeros and add nothing, so the tiles that see all may end there without a mask
        for phase in tl.static_range(0 if FORTH or PLACED else 1, 1 if PLACED else (3 if BACK else 2)):
            begin = first if phase == 0 else (whole if phase == 1 else until)
            end = whole if phase == 0 else (until if phase == 1 and BACK else last)
            for start in range(begin, end, ROWS):
                rows = start + tl.arange(0, ROWS)
                q = load_rows(q_own, start, q_step, rows < queries, D, WIDTH, ROWS)
                dy = load_rows(dy_own, start, dy_step, rows < queries, D, WIDTH, ROWS)
                sums = tl.load(logsum + told + rows, mask=rows < queries, other=0.0)
                deltas = tl.load(delta + told + rows, mask=rows < queries, other=0.0)
                scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
                if phase != 1:
                    q_at = place(q_places + row * queries, rows, queries, PLACED)
                    q_segment = q_at
                    if PACKED:
                        q_segment = tl.load(q_segments + row * queries + rows, mask=rows < queries, other=0)
                    allowed = allows(q_at[None, :], k_at[:, None], q_segment[None, :], k_segment[:, None],
                                     back, forth, BACK, FORTH, PACKED)
                    scores = tl.where(allowed, scores, float("-inf"))
                shares = tl.exp2(scores - sums[None, :])
                dv = tl.dot(shares.to(dy.dtype), dy, dv, input_precision=PRECISION)
                dscores = shares * (tl.dot(v, tl.trans(dy), input_precision=PRECISION) - deltas[None, :])
                if phase != 1:  # a value may be NaN where none of these queries sees it
                    dscores = tl.where(allowed, dscores, 0.0)
                dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)

    dk *= scale * 0.6931471805599453
    store_rows(dk_base + row * dk_row + shared * dk_head, tile * COLS, dk_step, cols < keys, dk, D, WIDTH, COLS)
    store_rows(dv_base + row * dv_row + shared * dv_head, tile * COLS, dv_step, cols < keys, dv, D, WIDTH, COLS)


# fmt: on
INTERPRETED = isinstance(forward_kernel, InterpretedFunction)
GRAIN = 16 if INTERPRETED else 32  # tokens to an edge; tiles are multiples of it
TILES = {  # queries, keys, warps, stages: candidates, timed on the first call; chosen for Hopper, not measured yet
    forward_kernel: ((128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3)),
    queries_kernel: ((128, 64, 8, 2), (128, 64, 8, 3), (64, 128, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2)),
    keys_kernel: ((64, 128, 8, 2), (64, 128, 8, 3), (64, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2)),
}


def tuned(kernel: Any) -> Any:
    """The kernel with its tiles: timed on a GPU, fixed and small under the interpreter."""
    choices = ((16, 16, 4, 1),) if INTERPRETED else TILES[kernel]
    configs = [triton.Config({"ROWS": r, "COLS": c}, num_warps=w, num_stages=s) for r, c, w, s in choices]
    key = ["WIDTH", "BACK", "FORTH", "PLACED", "PACKED", "HOLES"]
    prune = {"early_config_prune": fitting}
    return triton.autotune(configs, key=key, prune_configs_by=prune, cache_results=True)(kernel)


def fitting(configs: list[Any], named: dict[str, Any], **constants: Any) -> list[Any]:
    """The configurations whose tiles are of at most 32 KiB: in full precision the larger ones only spill."""
    row = constants["WIDTH"] * named["q_base"].element_size()
    return [config for config in configs if max(config.kwargs["ROWS"], config.kwargs["COLS"]) * row <= 32 * 1024]


tuned_forward, tuned_queries, tuned_keys = map(tuned, (forward_kernel, queries_kernel, keys_kernel))


def forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """The output, and the base-2 logarithm of the sum of each query's exponentials, `B H T`."""
    y, logsum = like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    grid = lambda meta: (triton.cdiv(q.shape[2], meta["ROWS"]) * q.shape[0] * q.shape[1],)
    tables = tables_of(plan, plan.q_edges, logsum)
    numbers, constants = facts_of(q, k, plan, plan.q_edges)
    tuned_forward[grid](q, k, v, y, logsum, *tables, *strides(q, k, v, y), *numbers, **constants)
    return y, logsum


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, logsum: Tensor, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv."""
    dq, dk, dv, delta = like(q), like(k), like(v), torch.empty_like(logsum)
    grid = lambda meta: (triton.cdiv(q.shape[2], meta["ROWS"]) * q.shape[0] * q.shape[1],)
    tables = logsum, delta, *tables_of(plan, plan.q_edges, logsum)
    numbers, constants = facts_of(q, k, plan, plan.q_edges)
    tuned_queries[grid](q, k, v, y, dy, dq, *tables, *strides(q, k, v, y, dy, dq), *numbers, **constants)

    grid = lambda meta: (triton.cdiv(k.shape[2], meta["COLS"]) * k.shape[0] * k.shape[1],)
    tables = logsum, delta, *tables_of(plan, plan.k_edges, logsum)
    numbers, constants = facts_of(q, k, plan, plan.k_edges)
    tuned_keys[grid](q, k, v, dy, dk, dv, *tables, *strides(q, k, v, dy, dk, dv), *numbers, **constants)
    return dq, dk, dv


def like(t: Tensor) -> Tensor:
    """An empty tensor laid out as `t`, its last dimension side by side."""
    empty = torch.empty_like(t)
    return empty if empty.stride(-1) == 1 else torch.empty_like(t, memory_format=torch.contiguous_format)


def strides(*tensors: Tensor) -> list[int]:
    return [stride for t in tensors for stride in t.stride()[:3]]


def tables_of(plan: Plan, edges: Tensor | None, nothing: Tensor) -> list[Tensor]:
    """Positions, segments and edges; what is not there is not read, and any tensor may stand for it."""
    tables = (plan.q_at, plan.k_at, plan.q_segments, plan.k_segments, edges)
    return [nothing if table is None else table for table in tables]


def facts_of(q: Tensor, k: Tensor, plan: Plan, edges: Tensor | None) -> tuple[tuple[int | float, ...], dict[str, Any]]:
    """What the kernels are told in numbers, and what they are compiled for."""
    heads, queries, keys = q.shape[1], q.shape[2], k.shape[2]
    grains = 0 if edges is None else edges.shape[-1]
    far = (0 if side is None else min(side, 2**30) for side in (plan.back, plan.forth))
    constants = {
        "D": q.shape[3],
        "WIDTH": max(16, triton.next_power_of_2(q.shape[3])),
        "BACK": plan.back is not None,
        "FORTH": plan.forth is not None,
        "PLACED": plan.q_at is not None,
        "PACKED": plan.q_segments is not None,
        "HOLES": plan.holes,
        "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
        "GRAIN": GRAIN,
        "enable_fp_fusion": True,
    }
    return (heads, heads // k.shape[1], queries, keys, grains, plan.scale * LOG2_E, *far), constants
