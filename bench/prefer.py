"""Prefer: SmolLM2 learns from pairs of answers to prefer the short one (recipe `prefer`: DPO, a LoRA adapter).

On held-out pairs: how often the chosen answer gained more than the rejected one (the bar: above 90%; before, nothing
has gained), how often it is the likelier one, before and after, and what the model then answers. Writes
`results/prefer.json`; about 8 minutes on two cores. The run is `runs/prefer`, and one that was stopped goes on.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import save

import headway
from headway import recipe as recipes
from headway.data.batches import IGNORE
from headway.data.examples import Examples
from headway.hub import Loaded
from headway.objectives._preferences import log_p
from headway.recipe import Recipe
from headway.train.data import Prepared, prepare

ANSWERED, TOKENS = 32, 48  # prompts that are answered greedily, and tokens of an answer at most
TOLD = ("preference_accuracy", "margin", "kl", "test_rows", "preference_accuracy_baseline", "baseline", "parameters",
        "steps", "tokens", "valid_loss", "seconds", "peak_memory_bytes")  # fmt: skip


@torch.no_grad()
def likelier(model: Loaded, prepared: Prepared, recipe: Recipe) -> dict[str, float]:
    """How often the chosen answer of a held-out pair is the likelier one: as a whole, and by the mean of its tokens."""
    rows = prepared.objective.asked(prepared.splits.test, recipe.test_limit)
    examples = Examples(example for row in rows for example in prepared.objective.encode(row, prepared.tools))
    order = prepared.objective.order(examples, tokens=recipe.batch_tokens, length=recipe.max_tokens, seed=0)
    whole, mean = [], []
    for i in range(len(order)):
        batch = order.batch(i)
        each = log_p(model.net, batch)
        for found, values in ((whole, each), (mean, each / batch.labels.ne(IGNORE).sum(1))):
            chosen, rejected = values.chunk(2)
            found += (chosen > rejected).tolist()
    return {"whole": statistics.mean(whole), "by_token": statistics.mean(mean)}


def answered(model: Loaded, prompts: list[str]) -> dict[str, Any]:
    """The length of what it answers, and how often it comes to an end by itself."""
    texts = model.generate(prompts, max_tokens=TOKENS)
    return {
        "tokens": statistics.mean(len(text.ids) for text in texts),
        "ended": statistics.mean(text.finish == "end" for text in texts),
        "examples": [prompt + text.text for prompt, text in zip(prompts[:3], texts, strict=False)],
    }


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--dry", action="store_true", help="a few steps and rows, and writes no results")
    asked.add_argument("--busy", action="store_true", help="says that the seconds were measured beside other work")
    asked.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the recipe, to try; not saved")
    given = asked.parse_args()
    overrides = ["budget.steps=4", "test_limit=8", "data.held_out=2"] if given.dry else given.set
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run" if overrides else Path("runs/prefer")
        result = headway.train("prefer", out=out, overrides=overrides, resume=(out / "recipe.json").is_file())
        model, recipe = headway.load(out, "cpu"), recipes.read("prefer", overrides)
        prepared = prepare(recipe)
        print({key: result[key] for key in TOLD}, flush=True)
        figures: dict[str, Any] = {key: result[key] for key in TOLD}
        figures["saved_bytes"] = sum(path.stat().st_size for path in (out / "model").iterdir())
    prompts = [row[0] for row in prepared.splits.test][: 4 if given.dry else ANSWERED]
    figures["likelier"] = {"after": likelier(model, prepared, recipe)}
    figures["answers"] = {"after": answered(model, prompts)}
    model.unpack()
    with headway.adapt.bare(model):
        figures["likelier"]["before"] = likelier(model, prepared, recipe)
        figures["answers"]["before"] = answered(model, prompts)
    figures["beside_other_work"] = given.busy
    print(figures) if overrides else save("prefer", figures)


if __name__ == "__main__":
    main()
