"""Reward: pronounce goes on from one start by likelihood and by its own metric (`speak`), each for the same seconds.

The start is `runs/pronounce` (trained here if it is not there yet). Both sides then answer the same held-out words.
Words that one side has right and the other wrong tell whether they differ: z is the difference over its deviation.
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
from headway.data.sources import load_splits, references
from headway.hub import Loaded
from headway.objectives._rates import Scored, evaluate, rates

RUN = Path("runs/pronounce")


def sides(seconds: float) -> dict[str, dict[str, Any]]:
    """Recipes that go on from the start: what differs is the objective, and the rates that suit it."""
    speak: dict[str, Any] = msgspec.to_builtins(recipes.read("speak", [f"budget.seconds={seconds}"]))
    longer: dict[str, Any] = msgspec.to_builtins(recipes.read("pronounce", [f"budget.seconds={seconds}"]))
    given = {"model": {"load": str(RUN)}, "evaluations": speak["evaluations"], "test_limit": 256}
    longer.pop("tokenizers")
    speak.pop("tokenizers")
    return {"likelihood": {**longer, **given}, "reward": {**speak, **given}}


def measured(model: Loaded, listed: dict[str, list[str]]) -> tuple[dict[str, Any], dict[int, list[Scored]]]:
    """Error rates of what it writes by greedy search and by four beams."""
    scored = {beams: evaluate(model, listed, "whitespace", beams=beams)[0] for beams in (1, 4)}
    named = {1: "greedy", 4: "beams 4"}
    found = {}
    for beams, rows in scored.items():
        told = rates(rows)
        found[named[beams]] = {"per": told.per, "wer": told.wer, "words": told.words}
    return found, scored


def apart(one: list[Scored], other: list[Scored]) -> dict[str, float]:
    """How many words each alone has right, and the z of the difference (McNemar)."""
    pairs = [(a.edits == 0, b.edits == 0) for a, b in zip(one, other, strict=True)]
    first, second = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    return {"only_first": first, "only_second": second, "z": (second - first) / math.sqrt(max(1, first + second))}


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--seconds", type=float, default=200, help="of training, for each side")
    asked.add_argument("--dry", action="store_true", help="writes no results")
    given = asked.parse_args()
    if not (RUN / "result.json").is_file():
        headway.train("pronounce", out=RUN, resume=(RUN / "recipe.json").is_file())
    listed = references(load_splits(recipes.read("pronounce").data).test)
    figures, scored = {}, {}
    figures["start"], scored["start"] = measured(headway.load(RUN), listed)
    with tempfile.TemporaryDirectory() as folder:
        for name, recipe in sides(given.seconds).items():
            out = Path(folder) / name
            result = headway.train(recipe, out=out)
            figures[name], scored[name] = measured(headway.load(out), listed)
            figures[name] |= {key: result[key] for key in ("seconds", "steps", "tokens", "valid_loss")}
            figures[name] |= {"kl": result["kl"]} if "kl" in result else {}
            figures[name]["curve"] = [[point["seconds"], point["valid_loss"]] for point in result["curve"]]
    for beams, how in ((1, "greedy"), (4, "beams 4")):
        for first, second in (("start", "likelihood"), ("start", "reward"), ("likelihood", "reward")):
            figures[f"{first} against {second}, {how}"] = apart(scored[first][beams], scored[second][beams])
    figures["reward_falls_below_likelihood"] = all(
        figures["reward"][how]["wer"] < figures["likelihood"][how]["wer"] for how in ("greedy", "beams 4")
    )
    if given.dry:
        print({name: figures[name] for name in ("start", "likelihood", "reward")})
        print({name: value for name, value in figures.items() if "against" in name})
    else:
        save("reward", figures)


if __name__ == "__main__":
    main()
