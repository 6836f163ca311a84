"""Style: SmolLM2 tuned on Python's documentation (recipe `style`) by LoRA, upon a frozen base in fp32 and in 8 bits.

Bits per byte of held-out topics before and after, and the bytes of the weights held. The bars: the int8 base within 1%
of the fp32 one, at half the memory. Writes `results/style.json`; about 8 minutes on two cores, in parts if need be:
the runs are in `runs/style-...`, and one that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from common import save

import headway
from headway import recipe as recipes
from headway.quantize import nbytes
from headway.train.data import prepare

SIDES = {"fp32": "null", "int8": "int8"}


def tuned(overrides: list[str], out: Path) -> dict[str, Any]:
    """Bits per byte of the base alone and of what it became, on the same topics."""
    if (done := out / "figures.json").is_file():
        return json.loads(done.read_text("utf-8"))
    result = headway.train("style", out=out, overrides=overrides, resume=(out / "recipe.json").is_file())
    model, recipe = headway.load(out, "cpu"), recipes.read("style", overrides)
    prepared = prepare(recipe)
    rows = prepared.objective.asked(prepared.splits.test, recipe.test_limit)
    with headway.adapt.bare(model):
        before = prepared.objective.score(model, rows, prepared.tools, recipe).metrics["bits_per_byte"]
    found = {
        "bits_per_byte_before": before,
        "bits_per_byte": result["bits_per_byte"],
        "weight_bytes": nbytes(model.net),
        "saved_bytes": sum(path.stat().st_size for path in (out / "model").iterdir()),
        **{key: result[key] for key in ("test_bytes", "valid_loss", "steps", "tokens", "seconds", "peak_memory_bytes")},
    }
    done.write_text(json.dumps(found), "utf-8")
    return found


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--dry", action="store_true", help="a few steps, and writes no results")
    asked.add_argument("--busy", action="store_true", help="says that the seconds were measured beside other work")
    given = asked.parse_args()
    few = ["budget.tokens=1500", "evaluations=1", "test_limit=1"] if given.dry else []
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, base in SIDES.items():
            out = Path(folder if given.dry else "runs") / f"style-{name}"
            figures[name] = tuned([f"adapt.quantize={base}", *few], out)
            print(name, figures[name], flush=True)
    for key in ("bits_per_byte", "weight_bytes"):
        figures[f"int8_against_fp32_{key}"] = figures["int8"][key] / figures["fp32"][key]
    figures["beside_other_work"] = given.busy
    print(figures) if given.dry else save("style", figures)


if __name__ == "__main__":
    main()
