"""What the claims about single layers share: building, what depends on what, time, what is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headway import mixers
from headway.attend import forced
from headway.block import Stack
from headway.compare.contest import title_of
from headway.machine import kept_for_the_way_back, synchronise
from headway.mask import Mask
from headway.mixers import Mixer
from headway.positions import build_positions, positions_of
from headway.probe.influence import norms
from headway.spec import BlockSpec, PositionSpec, StackSpec, convert

Named = dict[str, Any]
Call = Callable[[Tensor], Tensor]

ATTENTION: Named = {"name": "attention", "heads": 1}
LSTM: Named = {"name": "rnn"}
GRU: Named = {"name": "rnn", "cell": "gru"}
CONV: Named = {"name": "conv", "kernel": 3}
SSM: Named = {"name": "ssm", "state_size": 16}


def layer(named: Named, width: int, positions: str = "none", seed: int = 0) -> Mixer:
    """A mixer by itself, with its first weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scheme = build_positions(scheme_of(positions), width, mixers.head_dim(named, width), mixers.heads(named))
        return mixers.build(named, width, scheme.inside).eval()


def stack(blocks: Sequence[Named], width: int, positions: str = "none", seed: int = 0) -> Stack:
    """Mixers above one another, each with its norm and its sum, and nothing else."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        spec = StackSpec(blocks=tuple(BlockSpec(mixer=one) for one in blocks), positions=scheme_of(positions))
        return Stack(spec, width).eval()


def causal(named: Named, width: int = 16) -> bool:
    """Whether a mixer goes one way only: what can look both ways is let."""
    return "bidirectional" not in layer(named, width).can


def scheme_of(name: str) -> PositionSpec:
    return convert({"name": name}, PositionSpec, "positions")


def caller(net: nn.Module, one_way: bool) -> Call:
    """The net as a function of tokens `Float[B T C]`."""

    def call(x: Tensor) -> Tensor:
        return net(x, mask=Mask(causal=one_way), pos=positions_of(None, x.shape[0], x.shape[1], x.device))

    return call


def dependence(call: Call, x: Float[Tensor, "1 T C"], rows: slice | None = None) -> Float[Tensor, "R T"]:
    """|d y_i / d x_j|, exactly: a row an output, a column an input."""
    with torch.enable_grad():
        return norms(call, x, x.shape[1], rows, "exact", None).map


def drawn(rows: int, length: int, width: int, seed: int = 0) -> Float[Tensor, "B T C"]:
    """Tokens of independent normal numbers."""
    return torch.randn(rows, length, width, generator=torch.Generator().manual_seed(seed))


def kept_bytes(call: Call, x: Tensor, own: nn.Module) -> int:
    """Bytes that autograd keeps for the way back, parameters and input left out."""
    with kept_for_the_way_back([*own.parameters(), *own.buffers(), x]) as kept:
        call(x.requires_grad_())
    return sum(kept.values())


def seconds(run: Callable[[], object], budget: float, device: str) -> tuple[float, float, float]:
    """Median, least and greatest of as many runs on a device as a budget of seconds allows, three at least, after one
    that does not count."""
    on, taken = torch.device(device), list[float]()

    def timed() -> float:
        start = time.perf_counter()
        run()
        synchronise(on)
        return time.perf_counter() - start

    timed()
    began = time.perf_counter()
    while len(taken) < 3 or (time.perf_counter() - began < budget and len(taken) < 50):
        taken.append(timed())
    return median(taken), min(taken), max(taken)


@contextmanager
def formed(whole: bool) -> Iterator[None]:
    """Attention by its definition, which forms the map of all pairs, where `whole`; else by the fastest kernel."""
    if not whole:
        yield
        return
    with forced("reference"):
        yield


def own(found: Sequence[Named]) -> Mapping[str, Named]:
    """The user's mixers by title."""
    return {title_of(one): one for one in found}


def power(letter: str, exponent: float) -> str:
    """n, n², or n^1.89."""
    whole = {1: letter, 2: f"{letter}²"}.get(round(exponent))
    return whole if whole and abs(exponent - round(exponent)) < 0.02 else f"{letter}^{exponent:.2f}"
