"""The page of `headway lab`: what `compare.lab.lab` returns in, one self-contained HTML file out.

Wording and figures are computed here, layout in templates/lab.html.j2; style and markers are those of the other pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from headway.compare.claims import FAILS, HOLDS, OPEN, PARTLY
from headway.compare.figures import COLOURS, DASH, MARKERS, listed, number
from headway.compare.lab.drawing import picture
from headway.compare.report import COUNTED, filled, settings, when, write_page

SECTIONS = {
    "A": "Transformer, RNN, CNN",
    "B": "Self-attention against a convolution as long as the sequence",
    "C": "Self-attention against cross-attention",
    "D": "Encoder against decoder",
    "E": "Inside attention",
    "F": "Efficient attention: quality against cost",
    "G": "Blends",
}
KINDS = {HOLDS: "holds", PARTLY: "partly", FAILS: "fails", OPEN: "open"}  # the style's names
SHORT = {HOLDS: "holds", PARTLY: "in part", FAILS: "does not hold here", OPEN: "not decided"}
COUNT = {HOLDS: ("holds", "hold"), PARTLY: ("holds in part", "hold in part"),
         FAILS: ("does not hold here", "do not hold here"), OPEN: ("is not decided", "are not decided")}  # fmt: skip
FOLDED = 8  # rows beyond which a table is folded away

Record = Mapping[str, Any]


def write_lab_page(results: Record, path: Path) -> None:
    """Writes the page to `path`, whole or not at all."""
    write_page(render(results), path)


def render(results: Record) -> str:
    """The page as text."""
    claims = [card(record) for record in results["claims"]]
    return filled(
        "lab.html.j2",
        {
            "created": when(results["created"]),
            "what": what(results),
            "verdict": verdict(results["claims"]),
            "counts": counts(results["claims"]),
            "stopped": results["stopped"],
            "sections": [
                {"letter": letter, "title": SECTIONS.get(letter, ""), "claims": list(some)}
                for letter, some in groupby(claims, key=lambda claim: claim["section"])
            ],
            "colours": COLOURS,
            "markers": MARKERS,
            "settings": settings({k: results[k] for k in ("hardware", "versions")}, results["settings"]),
            "command": results["command"],
            "quick": results["settings"]["quick"],
        },
    )


def what(results: Record) -> str:
    """One sentence: where, when and how long."""
    hardware, on = results["hardware"], results["settings"]["device"]
    threads = f"{results['threads']} thread{'' if results['threads'] == 1 else 's'}"
    where = f"{hardware['cpu']} with {threads}" if on == "cpu" else hardware["device"]
    took = sum(record["seconds"] for record in results["claims"])
    spent = f"{took:.0f} seconds" if took < 120 else f"{took / 60:.0f} minutes"
    return f"Measured in {spent} on {where}, with PyTorch {results['versions']['torch']}."


def verdict(claims: Sequence[Record]) -> str:
    """One sentence that counts."""
    if not claims:
        return "No claim has been measured yet."
    said = [f"{_counted(n)} {COUNT[kind][n > 1]}" for kind, n in _tally(claims) if n]
    every = f"Of {_counted(len(claims))} common claims" if len(claims) > 1 else "Of one common claim"
    return f"{every}, {listed(said)}."


def counts(claims: Sequence[Record]) -> list[tuple[str, str, int]]:
    """(style, words, number) of each verdict that was reached, for the bar at the top."""
    return [(KINDS[kind], SHORT[kind], n) for kind, n in _tally(claims) if n]


def _tally(claims: Sequence[Record]) -> list[tuple[str, int]]:
    return [(kind, sum(claim["verdict"] == kind for claim in claims)) for kind in KINDS]


def _counted(n: int) -> str:
    return COUNTED[n] if n < len(COUNTED) else str(n)


def card(record: Record) -> dict[str, Any]:
    """What the page shows of a claim."""
    tables = [table(one) for one in record["tables"]]
    return {
        **{key: record[key] for key in ("name", "section", "title", "said", "method", "rule", "notes")},
        "because": record["because"][:1].upper() + record["because"][1:],
        "kind": KINDS.get(record["verdict"], "open"),
        "verdict": record["verdict"],
        "failed": record["failed"],
        "plots": [
            {"title": plot["title"], "sentence": plot["sentence"], "picture": drawn}
            for plot in record["plots"]
            if (drawn := picture(plot)) is not None
        ],
        "tables": tables,
        "folded": any(len(one["rows"]) > FOLDED for one in tables),
        "settings": flat(record["settings"]),
        "seconds": f"{record['seconds']:,.0f} s" if record["seconds"] >= 10 else f"{record['seconds']:.1f} s",
        "command": record["command"],
    }


def table(data: Record) -> dict[str, Any]:
    """Cells of (text, spread in words, whether it is a number)."""
    spread = data["spread"]
    rows = [[cell(value, spread.get(f"{r},{c}")) for c, value in enumerate(row)] for r, row in enumerate(data["rows"])]
    words = [bool(rows) and not any(row[c][2] for row in rows) for c in range(len(data["columns"]))]
    return {"title": data["title"], "columns": list(zip(data["columns"], words, strict=True)), "rows": rows}


def cell(value: Any, spread: Sequence[Any] | None) -> tuple[str, str, bool]:
    if isinstance(value, str):
        return value, "", False
    return shown(value), "" if spread is None else f"{shown(spread[0])} to {shown(spread[1])}", True


def shown(value: Any) -> str:
    """Whole numbers whole, others with three figures, what is missing as a dash."""
    known = number(value)
    if known is None:
        return DASH
    if known == int(known) and abs(known) < 1e15:
        return f"{int(known):,}"
    return f"{known:,.0f}" if abs(known) >= 1000 else f"{known:.3g}"


def flat(data: Any) -> list[tuple[str, str]]:
    """A claim's settings as (name, value): lists and records within are written as they would be in JSON."""
    import json

    return [(key.replace("_", " "), v if isinstance(v, str) else json.dumps(v)) for key, v in data.items()]
