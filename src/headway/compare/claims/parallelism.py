"""Parallelism: whether the tokens of a sequence wait for each other; the longest chain of a traced graph, and time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from headway.compare.claims import FAILS, HOLDS, PARTLY, Found, How, Line, Plot, Table
from headway.compare.claims._layers import ATTENTION, CONV, GRU, LSTM, SSM, caller, causal, drawn, layer, own, seconds
from headway.compare.growth import fit

SECTION = "A"
TITLE = "All tokens at once, or one after the other"
SAID = "Attention and convolutions work on all tokens at once; a recurrent layer works step by step."
METHOD = (
    "The longest chain of operations that wait for one another, in the graph traced forward and back; and time at "
    "the same number of tokens, in few long rows or many short ones."
)
FLAT, STEEP = 0.2, 0.8
RULE = (
    f"Chains grow as length^b. It holds where b is at most {FLAT:g} for attention and the convolution and at least "
    f"{STEEP:g} for LSTM and GRU; in part where only the recurrent ones are as said."
)
SECONDS = (20.0, 240.0)
WIDTH = 64


def measure(how: How) -> Found:
    """Chains by length, and times a token by length at equal tokens."""
    traced = (8, 16, 32) if how.quick else (8, 16, 32, 64, 128)
    lengths = (32, 64, 128, 256, 512, 1024) if how.quick else tuple(2**i for i in range(5, 14))
    few = {
        "attention": ATTENTION,
        "LSTM": LSTM,
        "GRU": GRU,
        "convolution of 3": CONV,
        "state space": SSM,
        **own(how.mixers),
    }
    chains, times = {}, {}
    for i, (title, named) in enumerate(few.items()):
        how.tell(title, i / len(few))
        net, one_way = layer(named, WIDTH, seed=how.seed), causal(named, WIDTH)
        chains[title] = {n: float(chain(caller(net, one_way), n)) for n in traced}
        times[title] = {n: trained(net.to(how.device), one_way, n, lengths[-1], how) for n in lengths}
    growth = {title: found.exponent for title, curve in chains.items() if (found := fit(curve)) is not None}
    step = all(growth[t] >= STEEP for t in ("LSTM", "GRU"))
    flat = all(growth[t] <= FLAT for t in ("attention", "convolution of 3"))
    slower = {title: curve[lengths[-1]][0] / curve[lengths[0]][0] for title, curve in times.items()}
    return Found(
        verdict=HOLDS if step and flat else PARTLY if step else FAILS,
        because="; ".join(
            f"{t}: chain of {c[traced[-1]]:.0f} operations at {traced[-1]} tokens, growing as length^{growth[t]:.2f}"
            for t, c in chains.items()
            if t in ("attention", "LSTM", "convolution of 3")
        )
        + f". The same {lengths[-1]:,} tokens in one row instead of {lengths[-1] // lengths[0]} take the GRU "
        f"{slower['GRU']:.1f} times as long, the LSTM, whose kernel is fused, {slower['LSTM']:.1f} times, and "
        f"attention {slower['attention']:.1f} times.",
        tables=(
            Table(
                title="Operations in the longest chain, forward and back, by length",
                columns=("", *(f"{n}" for n in traced), "grows as length^"),
                rows=tuple((t, *c.values(), round(growth[t], 2)) for t, c in chains.items()),
            ),
            Table(
                title="Microseconds a token, forward and back, by length of a row",
                columns=("", *(f"{n:,}" for n in lengths)),
                rows=tuple((t, *(1e6 * s[0] / lengths[-1] for s in c.values())) for t, c in times.items()),
                spread={
                    f"{r},{k + 1}": (1e6 * s[1] / lengths[-1], 1e6 * s[2] / lengths[-1])
                    for r, c in enumerate(times.values())
                    for k, s in enumerate(c.values())
                },
            ),
        ),
        plots=(
            Plot(
                title="The longest chain",
                sentence="What rises with length has to be done one token after the other.",
                x="tokens",
                y="operations",
                log_x=True,
                log_y=True,
                lines=tuple(
                    Line(name=t, points=tuple((float(n), float(k)) for n, k in c.items())) for t, c in chains.items()
                ),
            ),
            Plot(
                title="Time a token at the same number of tokens",
                sentence="Fewer, longer rows leave a recurrent layer less to do at once; attention pays for its "
                "pairs instead.",
                x="tokens a row",
                y="microseconds a token",
                log_x=True,
                log_y=True,
                lines=tuple(
                    Line(name=t, points=tuple((float(n), 1e6 * s[0] / lengths[-1]) for n, s in c.items()))
                    for t, c in times.items()
                ),
            ),
        ),
        notes=(
            "Fused kernels for recurrent layers are switched off while a graph is traced: they hide the chain, they "
            "do not shorten it.",
            "On a machine of few cores little can be done at once, so times differ less than they would on a GPU.",
        ),
        settings={
            "width": WIDTH,
            "traced lengths": traced,
            "lengths": lengths,
            "tokens": lengths[-1],
            "seed": how.seed,
        },
    )


def chain(call: Callable[[torch.Tensor], torch.Tensor], length: int) -> int:
    """Operations on the longest path of the graph of a call and its way back."""
    import warnings

    from torch.fx.experimental.proxy_tensor import make_fx

    def both(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(call(x).sum(), x)[0]

    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")  # PyTorch warns of TF32 on GPUs that it was not built for
        with torch.backends.mkldnn.flags(enabled=False):  # type: ignore[no-untyped-call]
            traced = make_fx(both)(drawn(1, length, WIDTH))
    deep: dict[torch.fx.Node, int] = {}
    for node in traced.graph.nodes:
        deep[node] = (node.op == "call_function") + max((deep[a] for a in node.all_input_nodes), default=0)
    return max(deep.values())


def trained(net: nn.Module, one_way: bool, length: int, tokens: int, how: How) -> tuple[float, float, float]:
    """Seconds of a call and its way back, over `tokens` tokens in rows of `length`."""
    call = caller(net, one_way)
    x = drawn(tokens // length, length, WIDTH).to(how.device).requires_grad_()  # a layer may have no weights

    def run() -> None:
        with torch.enable_grad():
            call(x).sum().backward()

    return seconds(run, 0.15 if how.quick else 2.0, how.device)
