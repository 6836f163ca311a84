"""Ways to adapt MiniLM to one task: accuracy on held-out files, what trains, seconds, memory and bytes, side by side.

The task is the recipe `sentiment`'s: which package of Python's standard library a docstring is from. Every way has
the same tokens, in a process of its own, one after the other; `--rates` tries others on the validation rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import save

LORA = {"method": "lora", "targets": "blocks.*.mixer.{q,v}"}
WIDE = {"method": "lora", "targets": ["blocks.*.mixer.{q,k,v,o}", "blocks.*.feedforward.{enter,leave}"]}
# The recipe's `adapt`, and the rate of its AdamW. "tried": of `--rates` with 60,000 tokens and seed 0 the one of least
# validation loss. Full tuning: 3e-4 (0.92), 6e-4 (0.98), 1e-3 (1.18), 3e-3 (1.30), none below; with 6e-4 and 1e-3 more
# held-out rows were right than with 3e-4. All other rates are guesses.
WAYS: dict[str, tuple[dict[str, Any] | None, float]] = {
    "full tuning": (None, 3e-4),  # tried
    "LoRA, rank 2": ({**LORA, "rank": 2}, 3e-3),
    "LoRA, rank 8": ({**LORA, "rank": 8}, 1e-2),  # tried: 3e-3, 1e-2, 3e-2
    "LoRA, rank 4, all linears": ({**WIDE, "rank": 4}, 3e-3),  # tried: 3e-3, 1e-2
    "rsLoRA, rank 8": ({**LORA, "rank": 8, "rslora": True}, 3e-3),
    "DoRA, rank 2": ({**LORA, "rank": 2, "dora": True}, 3e-3),
    "Houlsby adapters, size 16": ({"method": "bottleneck", "kind": "houlsby", "size": 16}, 1e-2),  # tried: 3e-3, 1e-2
    "Pfeiffer adapters, size 16": ({"method": "bottleneck", "kind": "pfeiffer", "size": 16}, 3e-3),
    "parallel adapters, size 16": ({"method": "bottleneck", "kind": "parallel", "size": 16, "scale": 4.0}, 3e-3),
    "(IA)^3": ({"method": "ia3"}, 1e-2),
    "prefix, 8 a layer": ({"method": "prefix", "length": 8}, 1e-2),
    "prompt, 16 tokens": ({"method": "prompt", "length": 16}, 1e-2),
    "BitFit": ({"method": "bitfit"}, 3e-3),
    "linear probe": ({"method": "probe"}, 5e-2),  # tried: 1e-2, 5e-2
}
SEEDS = (0, 1, 2)


def recipe(way: str, rate: float, seed: int, tokens: int) -> dict[str, Any]:
    """The recipe `sentiment`, told how to adapt its model."""
    import msgspec

    from headway import recipe as recipes

    given: dict[str, Any] = msgspec.to_builtins(recipes.read("sentiment", [f"budget.tokens={tokens}", f"seed={seed}"]))
    given["optimizer"]["lr"] = rate
    given["evaluations"] = 1
    if (adapt := WAYS[way][0]) is not None:
        given["adapt"] = adapt
    return given


def run(way: str, rate: float, seed: int, tokens: int) -> dict[str, Any]:
    """One training, measured: in this process, which has done nothing else."""
    import headway

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        found = headway.train(recipe(way, rate, seed, tokens), out=out)
        model = headway.load(out)
        whole = sum(p.numel() for name, p in model.net.named_parameters() if not new(name))
        adapted = [
            (name, p) for name, p in model.net.named_parameters() if WAYS[way][0] is None or ".adapters." in name
        ]
        return {
            "way": way, "rate": rate, "seed": seed,
            "accuracy": found["accuracy"], "macro_f1": found["macro_f1"], "valid_loss": found["valid_loss"],
            "trained": sum(p.numel() for name, p in adapted if not name.startswith("heads.")),
            "head": sum(p.numel() for name, p in model.net.named_parameters() if name.startswith("heads.")),
            "base": whole, "seconds": found["seconds"], "tokens_per_second": found["train_tokens_per_second"],
            "peak_memory_bytes": found["peak_memory_bytes"],
            "file_bytes": sum(file.stat().st_size for file in (out / "model").glob("*.safetensors")),
        }  # fmt: skip


def new(name: str) -> bool:
    """Whether a parameter is not the checkpoint's."""
    return ".adapters." in name or name.startswith("heads.")


def apart(way: str, rate: float, seed: int, tokens: int) -> dict[str, Any]:
    """`run` in a process of its own, so that its memory is its own."""
    asked = [sys.executable, __file__, "--one", json.dumps([way, rate, seed, tokens])]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{way}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict[str, Any]]) -> str:
    """One line a way; accuracy is the mean of the seeds, and the head, which all of them train, is not counted."""
    lines = [f"{'':27} accuracy  spread  points  trained  share   s    peak MB  file MB"]
    full = mean(rows, "full tuning", "accuracy")
    for way in dict.fromkeys(row["way"] for row in rows):
        reached = mean(rows, way, "accuracy")
        own = [row["accuracy"] for row in rows if row["way"] == way]
        one = next(row for row in rows if row["way"] == way)
        lines.append(
            f"{way:27} {reached:8.1%} {max(own) - min(own):7.1%} {100 * (reached - full):+7.1f} "
            f"{one['trained']:8,} {one['trained'] / one['base']:6.2%} "
            f"{mean(rows, way, 'seconds'):5.0f} {one['peak_memory_bytes'] / 1e6:9.0f} {one['file_bytes'] / 1e6:8.2f}"
        )
    return "\n".join(lines)


def mean(rows: list[dict[str, Any]], way: str, what: str) -> float:
    found = [row[what] for row in rows if row["way"] == way]
    return sum(found) / len(found)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--one", help="one training, told as JSON; prints a line of JSON")
    asked.add_argument("--tokens", type=int, default=150_000, help="each way sees so many")
    asked.add_argument("--seeds", type=int, default=1, help="of 3; alone on two cores one takes ten minutes or so")
    asked.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    asked.add_argument("--rates", type=float, nargs="*", help="tries these, on one seed, and writes nothing")
    given = asked.parse_args()
    if given.one:
        print(json.dumps(run(*json.loads(given.one))))
        return
    rows = []
    for way in given.ways:
        for rate in given.rates or [WAYS[way][1]]:
            for seed in SEEDS[: 1 if given.rates else given.seeds]:
                rows.append(apart(way, rate, seed, given.tokens))
                told = "  ".join(f"{key} {rows[-1][key]:.4g}" for key in ("accuracy", "valid_loss", "seconds"))
                print(f"{way}  rate {rate:g}  seed {seed}  {told}", file=sys.stderr, flush=True)
    if given.rates:
        return
    print(table(rows))
    within = {way: mean(rows, way, "accuracy") - mean(rows, "full tuning", "accuracy") for way in given.ways}
    save("adapt_table", {"tokens": given.tokens, "rows": rows, "points_from_full_tuning": within})


if __name__ == "__main__":
    main()
