"""The page: a record of attention in, one self-contained HTML file out; nothing is fetched, nothing else may run.

A weight w of a head whose largest is m is kept as round(255 sqrt(w / m)), a byte (signed maps: 127 and a sign), so it
is off by at most m / 255, and small ones by far less. Bytes are deflated a head and unpacked when the head is opened.
Where all maps would be too much, block means and the largest weights of each row stand in for a map.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from jaxtyping import Float, Integer, UInt8

from headway.probe.record import Array, Head, Record, block_means
from headway.store import write_text

try:
    import jinja2  # an extra, missed when this module is imported: before the model runs, not behind it
    from markupsafe import Markup
except ModuleNotFoundError:
    raise ValueError("the page needs the package jinja2: pip install 'headway[report]'") from None

HERE = Path(__file__).parent / "templates"
SHARED = Path(__file__).parents[1] / "compare" / "templates"  # the colours and type of all our pages
SCRIPTS = ("data.js", "draw.js", "lines.js", "matrix.js", "text.js", "tables.js", "heads.js", "page.js")
WHOLE_BYTES = 48 * 2**20  # what all maps of a page may take before they are deflated: 512 tokens with 192 heads
LONGEST_WHOLE = 1024
THUMB, BLOCKS, TOP = 32, 256, 8


def write_page(record: Record, path: Path) -> None:
    """Writes the page to `path`, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, render(record))


def render(record: Record) -> str:
    """The page as text. Weights that are not finite are a ValueError."""
    packed = list(_packed(record))
    style = "\n".join([_themes((SHARED / "style.css").read_text("utf-8")), (HERE / "look.css").read_text("utf-8")])
    script = '"use strict";\n' + "\n".join((HERE / name).read_text("utf-8") for name in SCRIPTS)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("look.html.j2").render(
        title=_plain(record.title),
        model=_plain(record.model),
        style=Markup(style),  # ours, and with their sums in the page's policy
        script=Markup(script),
        policy=Markup(_policy(style, script)),
        record=Markup(_json(_described(record, packed))),
        thumbs=_base64(np.stack([thumb for *_, thumb in packed]).tobytes()),
        heads=[blob for _, blob, _ in packed],
    )
    return page


# --- What the script reads


def _described(record: Record, packed: list[tuple[dict[str, Any], str, Array]]) -> dict[str, Any]:
    first, places = 0, []
    for place in record.places:
        places.append({**msgspec.to_builtins(place), "first": first})
        first += place.heads
    return {
        "title": record.title,
        "sides": [msgspec.to_builtins(side) for side in record.sides],
        "places": places,
        "heads": [
            {**_finite(head), **how} for head, (how, _, _) in zip(record.heads, packed, strict=True)
        ],
        "definitions": record.definitions,
        "thumb": THUMB,
    }  # fmt: skip


def _finite(head: Head) -> dict[str, Any]:
    """Figures that are no numbers are left out: JSON has no word for them."""
    values = msgspec.to_builtins(head)
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}


def _packed(record: Record) -> Iterator[tuple[dict[str, Any], str, Array]]:
    """Of each head: how it is kept, its bytes, its thumbnail."""
    total = sum(place.heads for place in record.places)
    for index, place in enumerate(record.places):
        rows, columns = record.size(place)
        whole = max(rows, columns) <= LONGEST_WHOLE and rows * columns * total <= WHOLE_BYTES
        for head in range(place.heads):
            where = f"look: {place.stack} layer {place.layer} head {head}"
            yield _whole(record, index, head, where) if whole else _sparse(record, index, head, total, where)


def _whole(record: Record, place: int, head: int, where: str) -> tuple[dict[str, Any], str, Array]:
    weights = _checked(record.maps.map(place, head), record.size(record.places[place]), where)
    levels, scale, signed = quantized(weights)
    return {"scale": scale, "signed": signed}, _base64(levels.tobytes()), _thumbnail(weights)


def _sparse(record: Record, index: int, head: int, total: int, where: str) -> tuple[dict[str, Any], str, Array]:
    """Block means as bytes, then the columns of the largest weights of each row (32 bits each), then their bytes."""
    rows, columns = record.size(record.places[index])
    size = math.ceil(max(rows, columns) / BLOCKS)
    k = max(1, min(TOP, columns, WHOLE_BYTES // (5 * rows * total)))
    means = record.maps.blocks(index, head, size)
    at, weights = record.maps.top(index, head, k)
    _checked(means, (math.ceil(rows / size), math.ceil(columns / size)), where)
    _checked(weights, (rows, k), where)
    kept, scale, signed = quantized(weights)
    ground, ground_scale, ground_signed = quantized(means)
    data = ground.tobytes() + at.astype("<u4").tobytes() + kept.tobytes()
    how = {
        "scale": scale,
        "signed": signed,
        "size": size,
        "k": k,
        "ground": ground_scale,
        "groundSigned": ground_signed,
    }
    return how, _base64(data), _thumbnail(means)


def quantized(weights: Float[Array, "T S"]) -> tuple[Integer[Array, "T S"], float, bool]:
    """Bytes, the weight that the largest byte stands for, and whether bytes have a sign."""
    size = np.abs(weights)
    scale, signed = float(size.max(initial=0.0)), bool((weights < 0).any())
    root = np.sqrt(size / (scale or 1.0))
    if signed:
        return np.rint(127 * root * np.sign(weights)).astype(np.int8), scale, signed
    return np.rint(255 * root).astype(np.uint8), scale, signed


def _thumbnail(weights: Float[Array, "T S"]) -> UInt8[Array, "32 32"]:
    """At most THUMB x THUMB block means, the largest of them 255; small maps stay as they are, cells repeated."""
    size = np.abs(weights)
    means = block_means(size, max(1, math.ceil(max(size.shape) / THUMB)))
    rows, columns = (np.arange(THUMB) * n // THUMB for n in means.shape)
    return np.rint(255 * np.sqrt(means[rows][:, columns] / (means.max() or 1.0))).astype(np.uint8)


def _checked(weights: Float[Array, "T S"], shape: tuple[int, int], where: str) -> Float[Array, "T S"]:
    if weights.shape != shape:
        raise ValueError(f"{where}: a map of {weights.shape} for {shape[0]} x {shape[1]} tokens")
    if not np.isfinite(weights).all():
        raise ValueError(f"{where}: {int((~np.isfinite(weights)).sum()):,} weights are not finite: there is no map")
    return weights


# --- What keeps it safe


def _policy(style: str, script: str) -> str:
    """Only this style and this script, by their sums: whatever else got in would not run, and nothing is fetched."""
    sums = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; style-src 'sha256-{sums[0]}'; script-src 'sha256-{sums[1]}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _json(value: Any) -> str:
    """JSON that no HTML can end: every <, > and & is spelled as an escape, and so is all that is not ASCII."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.translate({ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&"})


def _plain(text: str) -> str:
    """Lone surrogates have no bytes."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _base64(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 6)).decode()


def _themes(style: str) -> str:
    """The shared style with a theme that can be chosen, where it follows the system alone."""
    light, dark = (re.search(rf"{start}:root \{{\n(.*?)\}}", style, re.S | re.M) for start in ("^", r"dark\) \{\n +"))
    assert light and dark, "style.css no longer begins with its colours"
    plain = light[1].replace("color-scheme: light dark;", "")
    return (
        f"{style}\n:root[data-theme=light] {{ color-scheme: light; {plain} }}"
        f"\n:root[data-theme=dark] {{ color-scheme: dark; {dark[1]} }}"
    )
