"""Looking inside beside transformers' `output_attentions=True`: what capture costs, and time and memory of maps.

MiniLM's sizes, random weights (neither time nor memory depends on them), one thread, a process a measurement.
Headway runs its fast kernel and computes the maps asked for; transformers runs its eager kernel, which forms them all.
Memory is the peak above the model at rest (VmHWM). Over LIMIT it is not tried but told. `--small`: to see it run.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import interleave, save, spread

from headway import look, models

WIDTH, HEADS, LAYERS = 384, 12, 6
SMALL = "--small" in sys.argv
LENGTHS = (128, 512) if SMALL else (512, 4096, 16384)
ROUNDS = 3 if SMALL else 15
LIMIT = 16 * 2**30  # bytes of maps that transformers is asked to hold
VOCAB = 1000


def ours(length: int, layers: int) -> Any:
    block = {"wiring": "post", "mixer": {"name": "attention", "heads": HEADS, "bias": True},
             "feedforward": {"hidden": 4 * WIDTH}}  # fmt: skip
    stack = {"positions": {"name": "learned", "length": length}, "blocks": [block], "repeat": layers}
    return models.build({"kind": "encoder", "width": WIDTH, "vocab": VOCAB, "stack": stack}).eval()


def theirs(length: int, layers: int) -> Any:
    import transformers

    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH, max_position_embeddings=length, attn_implementation="eager",
    )  # fmt: skip
    return transformers.BertModel(config, add_pooling_layer=False).eval()


def a_head(net: Any, ids: torch.Tensor) -> None:
    """One map, whole."""
    look(net, ids).map(len(net.stack.blocks) // 2, 3)


def a_summary(net: Any, ids: torch.Tensor) -> None:
    """One map, as far as a page shows it of a long text."""
    found, layer = look(net, ids), len(net.stack.blocks) // 2
    found.top(layer, 3, 8)
    found.blocks(layer, 3, max(1, ids.shape[1] // 256))


def a_layer_in_turn(net: Any, ids: torch.Tensor) -> None:
    """All maps of a layer, one at a time."""
    found = look(net, ids)
    for head in range(HEADS):
        found.map(0, head)


def a_layer_at_once(net: Any, ids: torch.Tensor) -> None:
    """All maps of a layer, all of them kept."""
    found = look(net, ids)
    kept = torch.empty(HEADS, ids.shape[1], ids.shape[1])
    for head in range(HEADS):
        kept[head] = found.map(0, head)


def all_of_theirs(net: Any, ids: torch.Tensor) -> None:
    with torch.no_grad():
        net(ids, output_attentions=True)


def plain_of_theirs(net: Any, ids: torch.Tensor) -> None:
    with torch.no_grad():
        net(ids)


def plain(net: Any, ids: torch.Tensor) -> None:
    with torch.no_grad():
        net(ids)


SIDES: dict[str, tuple[Callable[[int, int], Any], Callable[[Any, torch.Tensor], None]]] = {
    "headway: forward": (ours, plain),
    "headway: look, one map": (ours, a_head),
    "headway: look, one map summarised": (ours, a_summary),
    "headway: look, a layer's maps in turn": (ours, a_layer_in_turn),
    "headway: look, a layer's maps at once": (ours, a_layer_at_once),
    "transformers: eager forward": (theirs, plain_of_theirs),
    "transformers: output_attentions": (theirs, all_of_theirs),
}


def side(name: str, length: int, layers: int) -> None:
    """In a process of its own: seconds and MiB of one call."""
    torch.set_num_threads(1)
    build, run = SIDES[name]
    net, ids = build(length, layers), torch.randint(VOCAB, (1, length))
    run(net, ids[:, :16])  # what is loaded at the first call is no part of it
    before, began = peak(), time.perf_counter()
    run(net, ids)
    print(json.dumps({"seconds": time.perf_counter() - began, "mib": peak() - before}))


def peak() -> float:
    """MiB that this process held at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def measured(name: str, length: int, layers: int = LAYERS) -> dict[str, Any]:
    held = 4 * layers * HEADS * length**2
    if name.endswith("output_attentions") and held > LIMIT:
        return {"not_tried": f"its maps alone are {held / 2**30:.0f} GiB"}
    command = [sys.executable, __file__, "--side", name, str(length), str(layers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def overhead(length: int) -> dict[str, Any]:
    """A look, of which no map is asked, over a plain forward."""
    net, ids = ours(length, LAYERS), torch.randint(VOCAB, (1, length))
    seconds = interleave({"forward": lambda: plain(net, ids), "look": lambda: look(net, ids)}, ROUNDS)
    share = statistics.median(seconds["look"]) / statistics.median(seconds["forward"]) - 1
    return {"milliseconds": {name: spread([1000 * s for s in found]) for name, found in seconds.items()},
            "share_of_a_forward": share}  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    one = ["headway: forward", "headway: look, one map", "headway: look, one map summarised",
           "transformers: eager forward", "transformers: output_attentions"]  # fmt: skip
    layer = ["headway: look, a layer's maps in turn", "headway: look, a layer's maps at once",
             "transformers: output_attentions"]  # fmt: skip
    of_layer = {name: measured(name, 256 if SMALL else 2048, 1) for name in layer}
    theirs_mib = of_layer["transformers: output_attentions"].get("mib", 0.0)
    figures = {
        "overhead": {length: overhead(length) for length in (16, 128, 512)},
        "a_map_of_six_layers": {length: {name: measured(name, length) for name in one} for length in LENGTHS},
        "one_layer_of_2048_tokens": of_layer,
        "times_less_memory_for_one_layer": {name: theirs_mib / of_layer[name]["mib"] for name in layer[:2]},
    }
    if SMALL:
        print(json.dumps(figures, indent=1))
    else:
        save("look", figures)


if __name__ == "__main__":
    if "--side" in sys.argv:
        at = sys.argv.index("--side")
        side(sys.argv[at + 1], int(sys.argv[at + 2]), int(sys.argv[at + 3]))
    else:
        main()
