"""Growth: the exponent of a cost that grows with length, and the length from which one cost is below another.

time ~ a * length^b, by least squares on logarithms. Fixed costs of a call bend the curve at short lengths, so only the
upper half of the measured lengths is fitted, three at least where there are three.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Curve = Mapping[int, float]  # what each length costs


@dataclass(frozen=True)
class Fit:
    """exponent: b. error: its standard error, None of two points. shortest, longest, points: what it was fitted to."""

    exponent: float
    error: float | None
    shortest: int
    longest: int
    points: int


def fit(curve: Curve) -> Fit | None:
    """The growth of a curve's upper half; None of fewer than two lengths."""
    lengths = sorted(curve)
    used = lengths[-max(3, (len(lengths) + 1) // 2) :]
    if len(used) < 2:
        return None
    x, y = [math.log(n) for n in used], [math.log(curve[n]) for n in used]
    middle, level = sum(x) / len(x), sum(y) / len(y)
    breadth = sum((a - middle) ** 2 for a in x)
    exponent = sum((a - middle) * (b - level) for a, b in zip(x, y, strict=True)) / breadth
    error = None
    if len(used) > 2:
        missed = sum((b - level - exponent * (a - middle)) ** 2 for a, b in zip(x, y, strict=True))
        error = math.sqrt(missed / (len(used) - 2) / breadth)
    return Fit(exponent, error, used[0], used[-1], len(used))


@dataclass(frozen=True)
class Crossover:
    """Where one curve is below another. `shortest` to `longest` are the lengths at which both were measured.

    kind: "always", "never", "from" a `length` on, only "until" a `length`, or "unknown" where they share no length.
    """

    kind: str
    length: float | None = None
    shortest: int | None = None
    longest: int | None = None

    def __str__(self) -> str:
        match self.kind:
            case "always":
                return f"always, from {self.shortest:,}"
            case "from":
                return f"from {_rounded(self.length):,}"
            case "until":
                return f"only until {_rounded(self.length):,}"
            case "never":
                return f"never up to {self.longest:,}"
        return "unknown: no length was measured for both"


def crossover(one: Curve, other: Curve) -> Crossover:
    """The length from which `one` is below `other`, interpolated between lengths on the logarithms of both."""
    shared = sorted(one.keys() & other.keys())
    if not shared:
        return Crossover("unknown")
    ends = (shared[0], shared[-1])
    ahead = [math.log(other[n] / one[n]) for n in shared]  # above zero where `one` costs less
    if all(gap > 0 for gap in ahead):
        return Crossover("always", None, *ends)
    if all(gap <= 0 for gap in ahead):
        return Crossover("never", None, *ends)
    last = max(i for i in range(len(shared) - 1) if (ahead[i] > 0) != (ahead[i + 1] > 0))
    share = ahead[last] / (ahead[last] - ahead[last + 1])
    length = shared[last] * (shared[last + 1] / shared[last]) ** share
    return Crossover("from" if ahead[-1] > 0 else "until", length, *ends)


def foretold(points: Sequence[tuple[int, int | float]], length: int) -> float | None:
    """What a longer length will cost, from the last one or two; growth is taken to lie between linear and square."""
    known = sorted((n, cost) for n, cost in points if cost > 0)
    if not known:
        return None
    (n, cost), exponent = known[-1], 2.0
    if len(known) > 1:
        before, less = known[-2]
        exponent = min(max(math.log(cost / less) / math.log(n / before), 1.0), 2.0)
    return cost * (length / n) ** exponent


def _rounded(length: float | None) -> int:
    """Two figures: more would pretend to a precision that an interpolation between doublings has not."""
    assert length is not None
    return int(float(f"{length:.1e}"))
