"""Locality: how much a layer takes from its neighbours before it has learnt anything."""

from __future__ import annotations

from headway.compare.claims import FAILS, HOLDS, PARTLY, Found, How, Line, Plot, Table
from headway.compare.claims._layers import ATTENTION, CONV, LSTM, SSM, Named, caller, dependence, drawn, layer, own

SECTION = "B"
TITLE = "A bias for what is near"
SAID = "A convolution is built to look nearby; attention has no such bias and must learn what is near."
METHOD = "The share of the last token's Jacobian (squared, itself left out) that lies within 8 tokens, before training."
RULE = (
    "Evenly spread, the share would be 8 in n. It holds where attention's is within a factor of 2 of that and that "
    "of the convolution of 3 is 100%; in part where only one of the two is so."
)
SECONDS = (1.0, 10.0)
WIDTH, NEAR = 16, 8


def measure(how: How) -> Found:
    """Shares near by mixer, over several first weights, and how size falls with distance."""
    length, seeds = (65, 5) if how.quick else (257, 20)
    conv = {"name": "conv", "kernel": length, "depthwise": True}
    few: dict[str, tuple[Named, str]] = {
        "attention, no positions": (ATTENTION, "none"),
        "attention, rotary": (ATTENTION, "rotary"),
        "attention, ALiBi": ({"name": "attention", "heads": 4}, "alibi"),
        "convolution of 3": (CONV, "none"),
        "long kernel": (conv, "none"),
        "long kernel that fades": ({**conv, "decay": True}, "none"),
        "LSTM": (LSTM, "none"),
        "state space": (SSM, "none"),
        **{title: (named, "none") for title, named in own(how.mixers).items()},
    }
    shares: dict[str, list[float]] = {}
    sizes: dict[str, list[float]] = {}
    for i, (title, (named, scheme)) in enumerate(few.items()):
        how.tell(title, i / len(few))
        curves = []
        for seed in range(how.seed, how.seed + seeds):
            net = layer(named, WIDTH, scheme, seed).double()
            one_way = "causal" in net.can
            found = dependence(caller(net, one_way), drawn(1, length, WIDTH, seed).double(), slice(length - 1, None))
            curves.append(found[0, :-1].flip(0).square())
        shares[title] = [100 * float(c[:NEAR].sum() / c.sum()) for c in curves if c.sum() > 0]
        sizes[title] = (sum(curves) / len(curves)).sqrt().tolist()  # type: ignore[union-attr,arg-type]
    even = 100 * NEAR / (length - 1)
    mean = {title: sum(some) / len(some) for title, some in shares.items() if some}
    free, near = even / 2 <= mean["attention, no positions"] <= 2 * even, mean["convolution of 3"] > 99.99
    return Found(
        verdict=HOLDS if free and near else PARTLY if free or near else FAILS,
        because=f"Of {length - 1} earlier tokens the nearest {NEAR} have {even:.0f}% if all count alike; of attention "
        f"they have {mean['attention, no positions']:.0f}%, with ALiBi {mean['attention, ALiBi']:.0f}%, of a kernel "
        f"of 3 {mean['convolution of 3']:.0f}%, of a kernel as long as the text {mean['long kernel']:.0f}%, of an "
        f"LSTM {mean['LSTM']:.0f}%.",
        tables=(
            Table(
                title=f"Share of the nearest {NEAR} of {length - 1} tokens, %",
                columns=("", "share"),
                rows=tuple((title, round(share, 1)) for title, share in mean.items()),
                spread={f"{r},1": (min(shares[t]), max(shares[t])) for r, t in enumerate(mean)},
            ),
        ),
        plots=(
            Plot(
                title="How much arrives, by distance",
                sentence="A flat line treats near and far alike; one that falls has its neighbours in view from the "
                "start.",
                x="tokens apart",
                y="size of the Jacobian",
                lines=tuple(Line(name=t, points=tuple(enumerate([0.0, *some]))[1:]) for t, some in sizes.items()),
                log_x=True,
                log_y=True,
            ),
        ),
        notes=(
            "A long kernel is a convolution without the bias: it comes from shortness, or from weights made to fade.",
        ),
        settings={"width": WIDTH, "length": length, "first weights": seeds, "seed": how.seed},
    )
