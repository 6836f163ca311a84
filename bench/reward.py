"""Reward: pronounce goes on from one start by likelihood and by its own metric (`speak`), each for the same seconds.

The start is `runs/pronounce` (trained here if it is not there yet, an hour). Likelihood goes on at the rates of its
recipe, and at a tenth of them, as it had come to rest. All sides then answer the same held-out words. Words that one
has right and the other wrong tell whether they differ: z is the difference over its deviation. Writes
`results/reward.json`; about 12 minutes on two cores: the runs are in `runs/reward-...`, and stopped ones go on.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import msgspec
from common import save

import headway
from headway import recipe as recipes
from headway.data.sources import fewer, load_splits, references
from headway.hub import Loaded
from headway.objectives._rates import Scored, evaluate, rates

RUN = Path("runs/pronounce")
GENTLE = ["optimizer.lr=5e-4", "optimizer.matrix_lr=2e-3"]
SIDES = {"likelihood": ("pronounce", []), "likelihood, gently": ("pronounce", GENTLE), "reward": ("speak", [])}


def recipe_of(name: str, seconds: float, more: list[str]) -> dict[str, Any]:
    """The recipe of a side: what differs is the objective, and the rates that suit it."""
    base, own = SIDES[name]
    read = recipes.read(base, [f"budget.seconds={seconds}", *own, *(more if name == "reward" else [])])
    found: dict[str, Any] = msgspec.to_builtins(read)
    del found["tokenizers"]
    return {**found, "model": {"load": str(RUN)}, "evaluations": 2, "test_limit": 64}


def measured(
    model: Loaded, listed: dict[str, list[str]], widths: list[int]
) -> tuple[dict[str, Any], dict[int, list[Scored]]]:
    """Error rates of what it writes, by greedy search and by beams."""
    scored = {beams: evaluate(model, listed, "whitespace", beams=beams)[0] for beams in widths}
    told = {beams: rates(rows) for beams, rows in scored.items()}
    return {called(beams): found._asdict() for beams, found in told.items()}, scored


def called(beams: int) -> str:
    return "greedy" if beams == 1 else f"beams {beams}"


def apart(one: list[Scored], other: list[Scored]) -> dict[str, float]:
    """How many words each alone has right, and the z of the difference (McNemar): above 0, the second is better."""
    pairs = [(a.edits == 0, b.edits == 0) for a, b in zip(one, other, strict=True)]
    first, second = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    return {"only_first": first, "only_second": second, "z": (second - first) / math.sqrt(max(1, first + second))}


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--seconds", type=float, default=120, help="of training, for each side")
    asked.add_argument("--words", type=int, help="held-out words that are answered (default: all)")
    asked.add_argument("--beams", type=int, nargs="*", default=[1, 4])
    asked.add_argument("--sides", nargs="*", default=list(SIDES), help="those alone")
    asked.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of `speak`, to try")
    asked.add_argument("--busy", action="store_true", help="says that the seconds were measured beside other work")
    asked.add_argument("--dry", action="store_true", help="writes no results, and keeps no runs")
    given = asked.parse_args()
    if not (RUN / "result.json").is_file():
        headway.train("pronounce", out=RUN, resume=(RUN / "recipe.json").is_file())
    listed = references(load_splits(recipes.read("pronounce").data).test)
    listed = {word: listed[word] for word, in fewer([(word,) for word in listed], given.words)}  # fmt: skip
    figures: dict[str, Any] = {}
    scored = {}
    figures["start"], scored["start"] = measured(headway.load(RUN), listed, given.beams)
    print(figures, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in given.sides:
            out = (Path(folder) if given.dry else Path("runs")) / f"reward-{name.replace(', ', '-')}"
            recipe = recipe_of(name, given.seconds, given.set)
            result = headway.train(recipe, out=out, resume=(out / "recipe.json").is_file())
            figures[name], scored[name] = measured(headway.load(out), listed, given.beams)
            figures[name] |= {key: result[key] for key in ("seconds", "steps", "tokens", "valid_loss")}
            figures[name] |= {"kl": result["kl"]} if "kl" in result else {}
            print(name, figures[name], [point["valid_loss"] for point in result["curve"]], flush=True)
    for beams in given.beams:
        for name in given.sides:
            for first in ("start", *(other for other in given.sides if other != name and name == "reward")):
                figures[f"{first} against {name}, {called(beams)}"] = apart(scored[first][beams], scored[name][beams])
    if given.sides == list(SIDES):
        figures["reward_falls_below_likelihood"] = all(
            figures["reward"][called(beams)]["wer"] < figures[name][called(beams)]["wer"]
            for beams in given.beams
            for name in SIDES
            if name != "reward"
        )
    figures["beside_other_work"] = given.busy
    print({name: value for name, value in figures.items() if "against" in name}) if given.dry else save(
        "reward", figures
    )


if __name__ == "__main__":
    main()
