"""One mixer or kernel, measured in a process of its own: its memory is then its own, and its death nobody else's.

The first line of standard input is a `Job` as JSON, each further line a length; every length is answered by one line.
Time is wall time of warm runs; memory is what one run adds, at its highest, to what the process held before it.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headway import mixers
from headway.attend import Heard, attend, call_of, kept_bytes, listening
from headway.kernels import Call
from headway.layers import initialise
from headway.machine import Peak, synchronise
from headway.mask import Mask
from headway.positions import Positions, positions_of

LEAST, MOST = 5, 50  # timed runs of a point, as far as its seconds allow
ENOUGH = 0.5  # seconds of timed runs, after which there are no more than LEAST
SAMPLED = 256  # queries whose visible keys are counted
AT_LENGTH = "length"  # an option of this value is the length at hand: a kernel as long as the text, for one


@dataclass(frozen=True)
class Job:
    """What to measure. `named` is a mixer's {"name": ..., option: value}, or a kernel's name and its mask."""

    named: dict[str, Any]
    kernel: bool = False
    causal: bool = True
    width: int = 512
    heads: int = 8
    train: bool = False
    device: str = "cpu"
    seconds: float = 5.0

    def options(self, length: int) -> dict[str, Any]:
        """Its options, with those that follow the length, and the heads where it has heads and names none."""
        chosen = {key: length if value == AT_LENGTH else value for key, value in self.named.items()}
        if not self.kernel:
            known = inspect.signature(mixers.find(self.named["name"]).__init__).parameters
            filled = {"heads": self.heads, "length": length}
            chosen |= {key: value for key, value in filled.items() if key in known and key not in chosen}
        return chosen


class Case(NamedTuple):
    """A job at one length, ready to run. `cost` is what is stated; `streams` whether it has a state at all."""

    run: Callable[[], None]
    cost: mixers.Cost
    streams: bool


def prepare(job: Job, length: int) -> Case:
    """Weights and inputs of one point, always the same ones."""
    torch.manual_seed(0)
    return (_kernel if job.kernel else _mixer)(job, length, torch.device(job.device))


def _mixer(job: Job, length: int, on: torch.device) -> Case:
    mixer = mixers.build(job.options(length), job.width, Positions())
    initialise(mixer, 1)
    mixer.to(on).train(job.train)
    x = torch.randn(1, length, job.width, device=on, requires_grad=job.train)
    pos, mask = positions_of(None, 1, length, on), Mask(causal=job.causal)
    run = step(lambda: mixer(x, mask=mask, pos=pos), [x, *mixer.parameters()], job.train)
    form = {"causal": job.causal} if "causal" in inspect.signature(mixer.cost).parameters else {}  # it has two
    return Case(run, mixer.cost(length, **form), "stream" in mixer.can and job.causal)


def _kernel(job: Job, length: int, on: torch.device) -> Case:
    shape = (1, job.heads, length, job.width // job.heads)
    q, k, v = (torch.randn(shape, device=on, requires_grad=job.train) for _ in range(3))
    mask, name = kernel_mask(job.named, job.causal), job.named["name"]
    run = step(lambda: attend(q, k, v, mask, backend=name), [q, k, v], job.train)
    call = replace(call_of(q, k, v, mask), gradients=True)
    held = 4 * 4 * length * job.width + kept_bytes(call)  # queries, keys, values, output
    return Case(run, mixers.Cost(4 * length * length * job.width, 0, held), False)


def kernel_mask(named: dict[str, Any], causal: bool) -> Mask:
    """The mask a kernel is measured on: full, or a window of so many tokens to the left, and right if not causal."""
    window = named.get("window")
    if window is not None and (type(window) is not int or window < 0):
        raise ValueError(f"kernel:{named['name']}: window is a number of tokens, not {window!r}")
    return Mask(causal=causal, window=None if window is None else (window, 0 if causal else window))


def step(forward: Callable[[], Tensor], leaves: list[Tensor], train: bool) -> Callable[[], None]:
    """Forward, or forward and backward from one fixed gradient, as a run that leaves nothing behind."""
    if not train:

        def once() -> None:
            with torch.no_grad():
                forward()

        return once
    given: list[Tensor] = []

    def both() -> None:
        y = forward()
        if not given:
            given.append(torch.randn_like(y))
        y.backward(given[0])
        for leaf in leaves:
            leaf.grad = None

    return both


def measure(
    run: Callable[[], object], on: torch.device, seconds: float, warm: Callable[[], object] | None = None
) -> tuple[list[float], int | None]:
    """Seconds of each warm run, and the bytes that a run adds at most; None where the system does not tell.

    One run (`warm`, if given) to warm up, then at least LEAST, more while they take less than ENOUGH in all, and none
    that would end past `seconds`, the first excepted.
    """

    def timed(run: Callable[[], object] = run) -> float:
        synchronise(on)
        began = time.perf_counter()
        run()
        synchronise(on)
        return time.perf_counter() - began

    first = timed(warm or run)
    peak = Peak(on)
    before = peak.bytes
    taken = [timed()]
    extra = peak.bytes - before if peak.exact else None
    while len(taken) < MOST and (len(taken) < LEAST or sum(taken) < ENOUGH):
        if first + sum(taken) + statistics.median(taken) > seconds:
            break
        taken.append(timed())
    return taken, extra


def point(job: Job, length: int) -> dict[str, Any]:
    """The figures of one point; times in seconds."""
    case, on = prepare(job, length), torch.device(job.device)
    made: list[Heard] = []

    def warm() -> None:
        with listening() as heard:
            case.run()
        made.extend(heard)

    taken, extra = measure(case.run, on, job.seconds, warm)
    flops = (case.cost.flops - sum(_hidden_flops(one.call) for one in made)) * (
        3 if job.train else 1
    )  # the way back takes twice
    return {
        **timing(length, taken, extra),
        "flops": flops,
        "state_bytes": case.cost.state_bytes if case.streams else None,
        "activation_bytes": case.cost.activation_bytes,
        "kernels": sorted({f"{one.backend}: {one.why}" for one in made}),
    }


def timing(length: int, taken: Sequence[float], extra: int | None) -> dict[str, Any]:
    """What `measure` gave of one length, as a record."""
    middle = statistics.median(taken)
    return {
        "length": length,
        "seconds": {"median": middle, "min": min(taken), "max": max(taken)},
        "runs": len(taken),
        "tokens_per_second": length / middle,
        "peak_extra_bytes": extra,
    }


def _hidden_flops(call: Call) -> int:
    """FLOPs that `cost` states for pairs which the mask hides: it counts the definition, which computes them all."""
    mask = call.mask
    if call.queries != call.keys or mask.also or not mask.facts <= {"causal", "bidirectional", "window", "sinks"}:
        return 0
    step = max(1, call.queries // SAMPLED)
    q_pos = torch.arange(step // 2, call.queries, step)[None]
    visible = mask.allows(q_pos, torch.arange(call.keys)[None]).float().mean().item()
    dense = 2 * call.rows * call.heads * call.queries * call.keys * (call.head_dim + call.value_dim)
    return round(dense * (1 - visible))


def answer(job: Job, length: int) -> dict[str, Any]:
    """A point, or why there is none: `refused` by the mixer itself, or `failed` on the way."""
    try:
        return point(job, length)
    except ValueError as error:
        return {"length": length, "refused": " ".join(str(error).split())}
    except Exception as error:
        return {"length": length, "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def main() -> None:
    with suppress(OSError):  # should memory run out, it is this process that the system ends, none of the user's
        Path("/proc/self/oom_score_adj").write_text("1000", "utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not stand among the answers
    job = Job(**json.loads(sys.stdin.readline()))
    if "." in job.named["name"]:
        importlib.import_module(job.named["name"])  # a mixer of the user's own, which the user has named
    for line in sys.stdin:
        print(json.dumps(answer(job, int(line))), file=replies, flush=True)


if __name__ == "__main__":
    main()
