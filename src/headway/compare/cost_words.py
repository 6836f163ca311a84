"""What the figures of `headway cost` say in words, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headway.compare.cost_subjects import CONTROL, KERNELS
from headway.compare.figures import DASH, listed

Record = Mapping[str, Any]


def verdict(records: Sequence[Record]) -> str:
    """Who overtakes full attention first, and who never does; controls and kernels aside, where there are others."""
    alternatives = [r for r in records if r["crossover"]]
    racing = [r for r in alternatives if r["group"] not in (CONTROL, KERNELS)] or alternatives
    ahead = sorted(
        (r["crossover"]["length"] or 0.0, r["title"], r["crossover"]["words"])
        for r in racing
        if r["crossover"]["kind"] in ("from", "always")
    )
    behind = [r for r in racing if r["crossover"]["kind"] in ("never", "until")]
    if not ahead and not behind:
        return "Nothing was measured at the same lengths as full attention."
    if not ahead:
        return f"Full attention is the fastest at {max(r['crossover']['longest'] for r in behind):,} tokens."
    named = "; ".join(f"{title}, {words}" for _, title, words in ahead[:3])
    more = f" {len(ahead) - 3} more follow." if len(ahead) > 4 else " One more follows." if len(ahead) > 3 else ""
    text = f"Faster than full attention here, first of {len(racing)}: {named}.{more}"
    if behind:
        text += f" Not faster at the longest length measured for both: {listed([r['title'] for r in behind])}."
    return text


def missing(records: Sequence[Record]) -> list[tuple[str, str, str]]:
    """What, at which lengths, and why it has no figures; one line a reason."""
    found: dict[tuple[str, str], list[int]] = {}
    for record in records:
        for point in record["points"]:
            for how in ("skipped", "refused", "failed"):
                if how in point:
                    found.setdefault((record["title"], f"{how}: {point[how]}"), []).append(point["length"])
    return [
        (title, f"{lengths[0]:,}" if len(lengths) == 1 else f"{lengths[0]:,} to {lengths[-1]:,}", reason)
        for (title, reason), lengths in found.items()
    ]


def measured(record: Record) -> dict[int, Mapping[str, Any]]:
    return {p["length"]: p for p in record["points"] if "seconds" in p}


def common_length(records: Sequence[Record]) -> int | None:
    """The longest length at which full attention was measured, and so the one to compare at."""
    reached = [max(measured(r)) for r in records if r["full"] and measured(r)]
    reached = reached or [max(measured(r)) for r in records if measured(r)]
    return min(reached, default=None)


def growth(record: Record) -> str:
    found = record["fit"]
    if found is None:
        return DASH
    return f"{found['exponent']:.2f}" + ("" if found["error"] is None else f" ± {found['error']:.2f}")


def times(record: Record, full: Record, length: int | None) -> str:
    """How many times faster than full attention, at a length."""
    if length is None:
        return DASH
    ratio = measured(full)[length]["seconds"]["median"] / measured(record)[length]["seconds"]["median"]
    return f"{ratio:.2g}x at {length:,}" if ratio < 9.95 else f"{ratio:,.0f}x at {length:,}"


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.0f}" if seconds >= 0.0995 else f"{1000 * seconds:.3g}"


def size(value: int | float) -> str:
    """Bytes in the unit that keeps three figures."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= unit:
            return f"{value / unit:.3g} {name}" if value < 999.5 * unit else f"{value / unit:,.0f} {name}"
    return f"{value:.0f} B"
