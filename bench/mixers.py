"""Mixers and kernels beside their peers: one run, both sides in one process and in turn, memory in its own process.

8 heads of width 64, one row, fp32. `--tiny` runs all of it at small sizes; such figures say nothing. `--only A,B` runs
the cases whose names hold one of the words again, and leaves the other figures as they are.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from common import RESULTS, interleave, save, spread
from torch import Tensor, nn

from headway import mixers, recurrence
from headway.attend import attend, forced, listening
from headway.compare.cost_subjects import everything
from headway.compare.cost_worker import Job, measure, prepare, step
from headway.compare.growth import crossover, fit
from headway.layers import initialise
from headway.mask import Mask
from headway.positions import Positions, positions_of

sys.path.append(str(Path(__file__).parent.parent / "tests"))  # the peers' weights by our names are written there

TINY = "--tiny" in sys.argv
HEADS, DIM = 8, 64
WIDTH = HEADS * DIM
WINDOW = 512 if not TINY else 32
FORWARD, BOTH = "forward", "forward and backward"
MIB = 2**20


def sized(length: int) -> int:
    return max(length // 32, 2 * WINDOW) if TINY else length


def rounds(count: int) -> int:
    return 2 if TINY else count


class Side(NamedTuple):
    """A computation, and the tensors that its way back leads to."""

    forward: Callable[[], Tensor]
    leaves: list[Tensor]


@dataclass
class Case:
    """Two sides that compute the same, ours first; `bars` by way: how many times faster than the peer ours must be.

    equal: the largest difference of outputs that is allowed; None where both compute another function.
    """

    what: str
    peer: str
    make: Callable[[int], tuple[Side, Side]]
    lengths: tuple[int, ...]
    bars: dict[str, float]
    ways: tuple[str, ...] = (FORWARD, BOTH)
    counts: tuple[int, int] = (5, 3)
    equal: float | None = None


# --- The sides


def heads(length: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, HEADS, length, DIM, requires_grad=True) for _ in range(3)]


def kernel(name: str, mask: Mask, leaves: list[Tensor]) -> Side:
    return Side(lambda: attend(*leaves, mask, backend=name), leaves)


def layer(mixer: nn.Module, x: Tensor, mask: Mask) -> Side:
    pos = positions_of(None, 1, x.shape[1], x.device)
    return Side(lambda: mixer(x, mask=mask, pos=pos), [x, *mixer.parameters()])


def ours(named: dict[str, Any], weights: dict[str, Tensor] | None = None) -> nn.Module:
    mixer = mixers.build(named, WIDTH, Positions())
    initialise(mixer, 1)
    if weights is not None:
        mixer.load_state_dict(weights)
    return mixer


def tokens(length: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(1, length, WIDTH, requires_grad=True)


def blocked_and_full(length: int) -> tuple[Side, Side]:
    leaves = heads(length)
    near = Mask(causal=True, window=(WINDOW, 0))
    return kernel("blocked", near, leaves), kernel("sdpa", Mask(causal=True), leaves)


def blocked_and_local(causal: bool) -> Callable[[int], tuple[Side, Side]]:
    def make(length: int) -> tuple[Side, Side]:
        from local_attention import LocalAttention

        leaves = heads(length)
        peer = LocalAttention(WINDOW, causal=causal, use_rotary_pos_emb=False, exact_windowsize=True)
        window = (WINDOW, 0 if causal else WINDOW)
        return kernel("blocked", Mask(causal=causal, window=window), leaves), Side(lambda: peer(*leaves), leaves)

    return make


def longformers(length: int) -> tuple[Side, Side]:
    from test_longformer import published, published_weights, run_published

    peer, out, x = published(WIDTH, HEADS, WINDOW), nn.Linear(WIDTH, WIDTH), tokens(length)
    named = {"name": "longformer", "heads": HEADS, "window": WINDOW // 2, "bias": True, "global_projections": True}
    mixer = ours(named, published_weights(peer, out))
    everyone = torch.ones(1, length, dtype=torch.bool)
    theirs = Side(lambda: out(run_published(peer, x, everyone, ~everyone)), [x, *peer.parameters(), *out.parameters()])
    return layer(mixer, x, Mask()), theirs


def performer_and_full(length: int) -> tuple[Side, Side]:
    x, causal = tokens(length), Mask(causal=True)
    full = ours({"name": "attention", "heads": HEADS})
    return layer(ours({"name": "performer", "heads": HEADS}), x, causal), layer(full, x, causal)


def performers(causal: bool) -> Callable[[int], tuple[Side, Side]]:
    def make(length: int) -> tuple[Side, Side]:
        with warnings.catch_warnings(action="ignore"), redirect_stdout(sys.stderr):  # it prints when it is imported
            from performer_pytorch import SelfAttention

            from headway.mixers.performer import from_performer_pytorch

            count, x = 256, tokens(length)
            peer = SelfAttention(
                WIDTH, heads=HEADS, dim_head=DIM, nb_features=count, causal=causal, attn_out_bias=False
            )
        mixer = ours(
            {"name": "performer", "heads": HEADS, "features": count}, from_performer_pytorch(peer.state_dict())
        )
        return layer(mixer, x, Mask(causal=causal)), Side(lambda: peer(x), [x, *peer.parameters()])

    return make


def linformer_and_full(length: int) -> tuple[Side, Side]:
    x = tokens(length)
    mixer = ours({"name": "linformer", "heads": HEADS, "rank": WINDOW // 2, "length": length})
    return layer(mixer, x, Mask()), layer(ours({"name": "attention", "heads": HEADS}), x, Mask())


def linformers(length: int) -> tuple[Side, Side]:
    from linformer import LinformerSelfAttention

    from headway.mixers.linformer import from_package

    peer, x = LinformerSelfAttention(WIDTH, length, k=WINDOW // 2, heads=HEADS), tokens(length)
    named = {"name": "linformer", "heads": HEADS, "rank": WINDOW // 2, "length": length}
    return layer(ours(named, from_package(peer.state_dict())), x, Mask()), Side(
        lambda: peer(x), [x, *peer.parameters()]
    )


def recurrences(named: dict[str, Any], whole: bool) -> Callable[[int], tuple[Side, Side]]:
    """A recurrence in chunks beside its definition token by token, on what the mixer gives it; `whole`: the layer."""

    def make(length: int) -> tuple[Side, Side]:
        mixer, x, causal = ours(named), tokens(length), Mask(causal=True)
        module = sys.modules[type(mixer).__module__]
        name = "delta" if named.get("kind") == "delta" else "recur"
        fast, seen = getattr(module, name), []

        def slow(*given: Any, chunk: int = 0, **more: Any) -> Any:
            seen.append((given, more))
            return getattr(recurrence, "delta_stepwise" if name == "delta" else "stepwise")(*given, **more)

        chunked, patched = layer(mixer, x, causal), mock.patch.object(module, name, slow)

        def stepwise() -> Tensor:
            with patched:
                return chunked.forward()

        if whole:
            return chunked, Side(stepwise, chunked.leaves)
        with torch.no_grad(), mock.patch.object(mixers, "RUN", length):  # all tokens in one call
            stepwise()
        given, more = ([t.requires_grad_() for t in seen[0][0]], dict(seen[0][1]))
        leaves = [*given, *(t.requires_grad_() for t in more.values() if isinstance(t, Tensor))]
        return Side(lambda: fast(*given, **more)[0], leaves), Side(lambda: slow(*given, **more)[0], leaves)

    return make


def streamed(named: dict[str, Any]) -> Callable[[int], tuple[Side, Side]]:
    """A whole layer on all tokens at once beside the same layer as it streams: a call a token, through its state."""

    def make(length: int) -> tuple[Side, Side]:
        mixer, x, causal = ours(named), tokens(length), Mask(causal=True)
        pos = positions_of(None, 1, length, x.device)

        def token_by_token() -> Tensor:
            state = mixer.init_state(1, length)
            steps = zip(x.split(1, 1), pos.split(1, 1), strict=True)
            return torch.cat([mixer(token, mask=causal, pos=at, state=state) for token, at in steps], 1)

        chunked = layer(mixer, x, causal)
        return chunked, Side(token_by_token, chunked.leaves)

    return make


KINDS = {f"linear, {kind}": {"name": "linear", "heads": HEADS, "kind": kind} for kind in
         ("plain", "retention", "gated", "delta")} | {"ssm": {"name": "ssm"}}  # fmt: skip
CASES = {
    "blocked": Case(
        "blocked, window 512, causal", "full causal SDPA", blocked_and_full, (16384,), {FORWARD: 5, BOTH: 5}
    ),
    "longformer": Case(
        "Longformer layer, window 512", "transformers' layer, same weights", longformers, (8192,),
        {FORWARD: 2.5, BOTH: 4}, equal=1e-4,
    ),
    "local causal": Case(
        "blocked, window 512, causal", "local-attention", blocked_and_local(True), (4096, 8192), {FORWARD: 4},
        equal=1e-4,
    ),
    "local": Case(
        "blocked, window 512 to both sides", "local-attention", blocked_and_local(False), (4096, 8192), {FORWARD: 2},
        equal=1e-4,
    ),
    "performer": Case(
        "Performer layer, causal", "full causal attention layer", performer_and_full,
        (512, 1024, 2048, 4096, 8192), {}, counts=(7, 3),
    ),
    "performer causal": Case(
        "Performer layer, causal, 256 features", "performer-pytorch, same weights", performers(True), (2048,),
        {FORWARD: 8},
    ),
    "performer both": Case(
        "Performer layer, bidirectional, 256 features", "performer-pytorch, same weights", performers(False), (8192,),
        {FORWARD: 1.5},
    ),
    "linformer full": Case(
        "Linformer layer, rank 256", "full attention layer", linformer_and_full, (8192,), {FORWARD: 4}
    ),
    "linformer": Case(
        "Linformer layer, rank 256", "linformer (PyPI), same weights", linformers, (8192,), {FORWARD: 1.2},
        equal=1e-4,
    ),
    **{
        name: Case(f"{name}, recurrence in chunks", "token by token", recurrences(named, False), (4096,),
                   {FORWARD: 20}, counts=(5, 2), equal=1e-3,
                   ways=(FORWARD,) if name == "ssm" else (FORWARD, BOTH))  # its way back takes 30 s and 6 GiB by token
        for name, named in KINDS.items()
    },
    **{
        f"{name}, layer": Case(f"{name}, whole layer in chunks", "token by token", recurrences(named, True), (4096,),
                               {}, ways=(FORWARD,), counts=(3, 0))
        for name, named in KINDS.items()
    },
    **{
        f"{name}, streamed": Case(f"{name}, layer in chunks", "layer streamed token by token", streamed(named), (4096,),
                                  {FORWARD: 20}, ways=(FORWARD,), counts=(3, 0), equal=1e-3)
        for name, named in KINDS.items()
    },
}  # fmt: skip


# --- Measuring


def timed(case: Case, length: int, way: str, sides: tuple[Side, Side]) -> dict[str, Any]:
    runs = {name: step(side.forward, side.leaves, way == BOTH) for name, side in zip("ab", sides, strict=True)}
    seconds = interleave(runs, rounds(case.counts[case.ways.index(way)]))
    pairs = [theirs / mine for mine, theirs in zip(seconds["a"], seconds["b"], strict=True)]
    ratio, bar = statistics.median(seconds["b"]) / statistics.median(seconds["a"]), case.bars.get(way)
    return {
        "what": case.what,
        "peer": case.peer,
        "length": length,
        "way": way,
        "ours_ms": spread([1000 * s for s in seconds["a"]]),
        "peer_ms": spread([1000 * s for s in seconds["b"]]),
        "ratio": ratio,
        "ratio_range": [min(pairs), max(pairs)],
        "bar": bar,
        "met": None if bar is None else ratio >= bar,
    }


def rows_of(case: Case) -> Iterator[dict[str, Any]]:
    """A row a length and way; one that says why where the peer is not installed."""
    for length in sorted({sized(n) for n in case.lengths}):
        try:
            sides = case.make(length)
        except ImportError as error:
            yield {"what": case.what, "peer": case.peer, "length": length, "not_measured": str(error)}
            continue
        with torch.no_grad():
            apart = difference(sides[0].forward(), sides[1].forward()) if case.equal else None
        for way in case.ways:
            row = timed(case, length, way, sides)
            yield {**row, "apart": apart, "equal": None if apart is None else apart <= (case.equal or 0)}


def difference(mine: Tensor, theirs: Tensor) -> float:
    """The largest between two outputs, in shares of the largest output where that is above one."""
    return ((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1)).item()


def memory(name: str, side: int, way: str) -> int:
    """Bytes that one run of a side adds, in a process of its own."""
    command = [sys.executable, __file__, "--memory", name, str(side), way, *(["--tiny"] if TINY else [])]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_memory(name: str, side: int, way: str) -> None:
    case = CASES[name]
    chosen = case.make(sized(case.lengths[-1]))[side]
    _, extra = measure(step(chosen.forward, chosen.leaves, way == BOTH), torch.device("cpu"), 0.0)
    print(extra)


def memories() -> dict[str, Any]:
    found: dict[str, Any] = {}
    alone = memory("blocked", 0, FORWARD) / MIB
    found["blocked, window 512, causal, 16384 tokens, forward"] = {"mib": alone, "most": 100, "met": alone <= 100}
    for way in (FORWARD, BOTH):
        mine, theirs = (memory("longformer", side, way) / MIB for side in (0, 1))
        found[f"Longformer layer, 8192 tokens, {way}"] = {
            "mib": mine, "peer_mib": theirs, "share": mine / theirs, "most": 1 / 3, "met": mine / theirs <= 1 / 3,
        }  # fmt: skip
    return found


def growth() -> dict[str, Any]:
    """The exponent of the blocked window, 4096 to 32768 tokens."""
    found = {}
    for way in (FORWARD, BOTH):
        curve = {}
        for length in sorted({sized(n) * (i + 1 if TINY else 1) for i, n in enumerate((4096, 8192, 16384, 32768))}):
            side = blocked_and_full(length)[0]
            seconds = interleave(
                {"run": step(side.forward, side.leaves, way == BOTH)}, rounds(5 if way == FORWARD else 3)
            )
            curve[length] = statistics.median(seconds["run"])
        fitted = fit(curve)
        assert fitted is not None
        found[way] = {
            "ms": {n: 1000 * s for n, s in curve.items()}, "exponent": fitted.exponent, "error": fitted.error,
            "lengths": [fitted.shortest, fitted.longest], "most": 1.1, "met": fitted.exponent <= 1.1,
        }  # fmt: skip
    return found


def wins_from(rows: list[dict[str, Any]]) -> dict[str, str]:
    """From which length the Performer is faster than full attention."""
    found = {}
    for way in (FORWARD, BOTH):
        mine, full = (
            {row["length"]: row[side]["median"] for row in rows if row["way"] == way} for side in ("ours_ms", "peer_ms")
        )
        found[way] = str(crossover(mine, full))
    return found


def short() -> list[dict[str, Any]]:
    """Every mixer that calls `attend`, at short lengths: the kernel taken beside the reference."""
    rows = []
    for subject in everything(Job({}), 512):
        if subject.job.kernel:
            continue
        for length in (64, 512) if TINY else (64, 128, 256, 512):
            for train in (False, True):
                job = Job(subject.job.named, causal=subject.job.causal, train=train)
                case = prepare(job, length)
                with listening() as heard:
                    case.run()
                if not heard:
                    continue
                rows.append({"what": subject.record()["title"], "length": length, **against_reference(case.run, train)})
    return rows


def against_reference(run: Callable[[], None], train: bool) -> dict[str, Any]:
    def plainly() -> None:
        with forced("reference"):
            run()

    seconds = interleave({"chosen": run, "reference": plainly}, rounds(41))
    ratio = statistics.median(seconds["reference"]) / statistics.median(seconds["chosen"])
    return {
        "way": BOTH if train else FORWARD,
        "chosen_ms": spread([1000 * s for s in seconds["chosen"]]),
        "reference_ms": spread([1000 * s for s in seconds["reference"]]),
        "ratio": ratio, "bar": 0.95, "met": ratio >= 0.95,
    }  # fmt: skip


def measured(names: list[str]) -> list[dict[str, Any]]:
    rows = []
    for name in names:
        for row in rows_of(CASES[name]):
            print(json.dumps(row), file=sys.stderr, flush=True)
            rows.append({"case": name, **row})
    return rows


def again(words: list[str]) -> None:
    """Some cases anew, in their places among the figures that are there."""
    figures = json.loads((RESULTS / "mixers.json").read_text("utf-8"))
    names = [name for name in CASES if any(word in name for word in words)]
    found = measured(names)
    kept = [row for row in figures["rows"] if row["case"] in CASES and row["case"] not in names]
    order = list(CASES)
    figures["rows"] = sorted([*kept, *found], key=lambda row: order.index(row["case"]))
    save("mixers", {**figures, "again": names})


def main() -> None:
    rows = measured(list(CASES))
    performer = [row for row in rows if row["case"] == "performer"]
    figures = {
        "heads": HEADS,
        "head_dim": DIM,
        "rows": rows,
        "blocked_growth": growth(),
        "performer_wins": wins_from(performer),
        "memory": memories(),
        "beside_reference": short(),
        "gpu": "not measured" if torch.cuda.is_available() else "not measured: there is none here",
    }
    if TINY:
        print(json.dumps(figures, indent=1))
    else:
        save("mixers", figures)


if __name__ == "__main__":
    if "--memory" in sys.argv:
        name, side, way = sys.argv[sys.argv.index("--memory") + 1 :][:3]
        print_memory(name, int(side), way)
    elif "--only" in sys.argv:
        again(sys.argv[sys.argv.index("--only") + 1].split(","))
    else:
        main()
