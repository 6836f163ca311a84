"""Pathfinder (1805.08315), as in Long Range Arena (2011.04006): two dots and some dashed curves in a picture, read
pixel by pixel. Does one curve join the dots?

Drawn here after the published description: two long curves of dashes, each turning a little from dash to dash, and
shorter ones that distract; none touches another. The dots are both ends of one curve, or an end of each. Pixels have
three levels (ground, dash, dot) where the published pictures have 256 greys.
"""

from __future__ import annotations

import math
import random as plain
from typing import Annotated, ClassVar

import numpy as np
from msgspec import Meta

from headway.compare.tasks import Batch, Task, of_rows

GROUND, DASH, DOT = 0, 1, 2
STEP, TURN = 2.0, 0.4  # pixels from dash to dash, half of them a gap; the most that a curve turns there, in radians
APART = 2  # pixels around a curve, as wide as its own gaps, that no other may enter
TURNS, TRIES, BEGUN = 6, 30, 1000  # of one dash; of a curve, before its picture is begun again; of a picture

Dash = tuple[int, int]  # its pixel


class Pathfinder(Task, frozen=True):
    """dashes: of a long curve; by default 14 in a picture of 32 x 32, as published, and fewer in smaller ones.
    distractors: curves of a third of that; by default 3 at 32 x 32."""

    causal: ClassVar[bool] = False
    pooled: ClassVar[bool] = True
    PUBLISHED: ClassVar = {
        "attention": "71.4%",
        "attention, local": "66.6%",
        "linformer": "76.3%",
        "performer": "77.1%",
        "linear": "75.3%",
        "S4": "94.2%",
    }
    SETUP: ClassVar = "Long Range Arena: 32 x 32 pixels, 160,000 rows; 1 layer of width 128, 62,400 steps of 512 rows"

    dashes: Annotated[int, Meta(ge=2, le=256)] | None = None
    distractors: Annotated[int, Meta(ge=0, le=64)] | None = None

    @property
    def vocabulary(self) -> int:
        return 3

    @property
    def answers(self) -> int:
        return 2

    def batch(self, random: np.random.Generator, rows: int, length: int) -> Batch:
        side = math.isqrt(length)
        if side * side != length or side < 12:
            raise ValueError(f"pathfinder: {length} tokens are no square of 12 x 12 pixels or more; 256 and 1,024 are")
        draw = plain.Random(int(random.integers(2**62)))
        labels = random.permutation(np.arange(rows) % 2)
        ids = np.stack([self.picture(draw, side, bool(label)) for label in labels]).reshape(rows, length)
        return of_rows(ids.astype(np.int64), labels)

    def picture(self, draw: plain.Random, side: int, joined: bool) -> np.ndarray:
        """One picture, `UInt8[side side]`."""
        dashes = self.dashes or max(3, round(14 * (side / 32) ** 1.5))
        distractors = round(3 * (side / 32) ** 2) if self.distractors is None else self.distractors
        wanted = (dashes, dashes, *(max(2, dashes // 3),) * distractors)
        curves = next((found for _ in range(BEGUN) if (found := _curves(draw, side, wanted))), None)
        if curves is None:
            raise ValueError(
                f"pathfinder: no {len(wanted)} curves of up to {dashes} dashes fit into {side} x {side} pixels: "
                "have fewer or shorter ones, or longer rows"
            )
        pixels = np.full((side, side), GROUND, dtype=np.uint8)
        for y, x in (dash for curve in curves for dash in curve):
            pixels[y, x] = DASH
        one, other = draw.sample([(curve[0], curve[-1]) for curve in curves[:2]], 2)
        for y, x in one if joined else (draw.choice(one), draw.choice(other)):
            pixels[y, x] = DOT
        return pixels


def _curves(draw: plain.Random, side: int, wanted: tuple[int, ...]) -> list[list[Dash]] | None:
    """A curve of each so many dashes, none near another; None where one found no room."""
    taken, curves = [[False] * side for _ in range(side)], []
    for dashes in wanted:
        curve = next((found for _ in range(TRIES) if (found := _curve(draw, side, dashes, taken))), None)
        if curve is None:
            return None
        curves.append(curve)
        for y, x in curve:
            for row in taken[max(0, y - APART) : y + APART + 1]:
                row[max(0, x - APART) : x + APART + 1] = [True] * len(row[max(0, x - APART) : x + APART + 1])
    return curves


def _curve(draw: plain.Random, side: int, dashes: int, taken: list[list[bool]]) -> list[Dash] | None:
    """One try at a curve that touches neither what is taken nor itself."""
    y, x, angle = draw.uniform(1, side - 2), draw.uniform(1, side - 2), draw.uniform(0, 2 * math.pi)
    curve: list[Dash] = []
    for _ in range(dashes):
        for _ in range(TURNS):
            turned = angle + draw.uniform(-TURN, TURN)
            down, right = math.sin(turned), math.cos(turned)
            a, b = dash = round(y + STEP * down), round(x + STEP * right)
            if 1 <= a < side - 1 and 1 <= b < side - 1 and not taken[a][b] and not _meets(curve, dash):
                break
        else:
            return None
        curve.append(dash)
        y, x, angle = y + STEP * down, x + STEP * right, turned
    return curve


def _meets(curve: list[Dash], dash: Dash) -> bool:
    """Whether a new dash comes near to any but the last two of its own curve."""
    a, b = dash
    return any(max(abs(a - y), abs(b - x)) <= APART for y, x in curve[:-2])
