"""The demo's figures: `headway demo` as it stands, with the learning curves left out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from common import save

import headway

if __name__ == "__main__":
    if "--from-run" in sys.argv:  # the figures of a demo that has just been run
        results = json.loads(Path("runs/demo/results.json").read_text("utf-8"))
    else:
        results = headway.compare("demo", overwrite=True)
    left_out = ("curve", "samples", "alignments", "hardware", "versions")
    models = [{key: value for key, value in model.items() if key not in left_out} for model in results["models"]]
    save("demo", {"budget": results["budget"], "data": results["data"], "models": models})
