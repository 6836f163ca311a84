"""A LoRA step beside PEFT's: the same weights, targets, ranks, batch and optimizer; tokens a second and peak memory.

Each side lives in a process of its own, which holds its model and answers when asked; the sides take turns, so that a
drifting machine hits both. A decoder's loss is each library's own, as its users train: the objective `causal`, and what
transformers gives for `labels`; an encoder's is the same squared error. Peak memory (VmHWM) is of a whole process after
its steps, and above what it held with the model loaded. Bars: 1.1 times PEFT's tokens a second, 0.95 of its peak.
`--dry`: few steps of few rows on one core, and nothing is written.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))
from sides import cache, minilm

RANK, ALPHA, RATE, THREADS = 8, 16.0, 1e-3, 2
CASES = {  # model: rows, tokens a row
    "minilm": (32, 128),
    "smollm2": (4, 256),
}
TARGETS = {  # ours, and PEFT's for each model
    "queries and values": (
        "blocks.*.mixer.{q,v}",
        {"minilm": ["query", "value"], "smollm2": ["q_proj", "v_proj"]},
    ),
    "all linears": (
        ["blocks.*.mixer.{q,k,v,o}", "blocks.*.feedforward.{gate,up,leave}"],
        {"minilm": "all-linear", "smollm2": "all-linear"},
    ),
}
Step = Callable[[int], float]


def smollm2() -> Path:
    """A decoder of SmolLM2-135M's sizes with random weights, as transformers writes it."""
    folder = cache() / "smollm2"
    if not (folder / "config.json").exists():
        import torch
        import transformers

        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, tie_word_embeddings=True, rms_norm_eps=1e-5, max_position_embeddings=8192,
        )  # fmt: skip
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def ours(case: str, targets: str) -> tuple[Any, Callable[..., Any]]:
    """A network without dropout, and what gives its loss, or an encoder's states."""
    import torch.nn.functional as F

    import headway
    from headway import objectives
    from headway.data.batches import IGNORE
    from headway.layers import Dropout
    from headway.objectives._tokens import Tokens

    model = headway.load(minilm() if case == "minilm" else smollm2())
    given: Any = TARGETS[targets][0]
    if case == "minilm" and targets == "all linears":
        given = ["blocks.*.mixer.{q,k,v,o}", "blocks.*.feedforward.{enter,leave}"]
    headway.adapt(model, "lora", rank=RANK, alpha=ALPHA, targets=given)
    net = model.net.train()
    for module in net.modules():
        if isinstance(module, Dropout):
            module.p = 0.0
    if case == "minilm":
        return net, net
    objective = objectives.build({"name": "causal"})

    def loss(ids: Any) -> Any:
        labels = F.pad(ids[:, 1:], (0, 1), value=IGNORE)
        batch = Tokens(ids=ids, labels=labels, valid=None, tokens=ids.numel(), targets=ids[:, 1:].numel())
        return objective(net, batch).total / batch.targets

    return net, loss


def theirs(case: str, targets: str) -> tuple[Any, Callable[..., Any]]:
    import transformers
    from peft import LoraConfig, get_peft_model

    if case == "minilm":
        off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        net = transformers.AutoModel.from_pretrained(minilm(), add_pooling_layer=False, **off)
    else:
        net = transformers.AutoModelForCausalLM.from_pretrained(smollm2())
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS[targets][1][case])
    net = get_peft_model(net, config).train()
    if case == "minilm":
        return net, lambda ids: net(input_ids=ids).last_hidden_state
    return net, lambda ids: net(input_ids=ids, labels=ids, use_cache=False).loss


def stepper(side: str, case: str, targets: str) -> tuple[Step, int]:
    """What takes so many steps and gives the last loss; and how many numbers train."""
    import torch
    import torch.nn.functional as F

    torch.manual_seed(0)
    net, run = (ours if side == "headway" else theirs)(case, targets)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, fused=True)
    rows, length = size(case)
    ids = torch.randint(1000, 30000, (rows, length), generator=torch.Generator().manual_seed(1))
    wanted = torch.randn(rows, length, 384, generator=torch.Generator().manual_seed(2)) if case == "minilm" else None

    def loss() -> Any:
        return run(ids) if wanted is None else F.mse_loss(run(ids), wanted)

    def steps(count: int) -> float:
        value = 0.0
        for _ in range(count):
            one = loss()
            one.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            value = float(one.detach())
        return value

    return steps, sum(p.numel() for p in trained)


def serve(side: str, case: str, targets: str) -> None:
    """Answers each line, a number of steps, with seconds, the loss and memory."""
    import torch

    torch.set_num_threads(1 if "LIGHT" in os.environ else THREADS)
    steps, trained = stepper(side, case, targets)
    rest = memory("VmRSS")
    for line in sys.stdin:
        began = time.perf_counter()
        value = steps(int(line))
        told = {"seconds": time.perf_counter() - began, "loss": value, "trained": trained, "rest": rest}
        print(json.dumps({**told, "peak": memory("VmHWM")}), flush=True)


def size(case: str) -> tuple[int, int]:
    """Rows and tokens a row; few where it is only tried (LIGHT)."""
    rows, length = CASES[case]
    return (max(1, rows // 8), length) if "LIGHT" in os.environ else (rows, length)


def memory(key: str) -> int:
    """Bytes that this process holds, or held at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


class Side:
    """A side in a process of its own."""

    def __init__(self, name: str, case: str, targets: str) -> None:
        command = [sys.executable, __file__, "--side", name, case, targets]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, steps: int) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(steps, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compared(case: str, targets: str, rounds: int, steps: int) -> dict[str, Any]:
    """Both sides in turn; the first answers warm up, and their losses tell that it is the same model."""
    from common import spread

    tokens = math.prod(size(case)) * steps
    sides = {name: Side(name, case, targets) for name in ("headway", "peft")}
    first = {name: side.ask(1) for name, side in sides.items()}
    told: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            told[name].append(side.ask(steps))
    for side in sides.values():
        side.close()
    found: dict[str, Any] = {}
    for name, answers in told.items():
        last = answers[-1]
        found[name] = {"tokens_per_second": spread([tokens / one["seconds"] for one in answers]),
                       "peak_bytes": last["peak"], "above_the_model_bytes": last["peak"] - last["rest"],
                       "trained": last["trained"], "first_loss": first[name]["loss"]}  # fmt: skip
    us, them = found["headway"], found["peft"]
    return {**found,
            "speed": us["tokens_per_second"]["median"] / them["tokens_per_second"]["median"],
            "memory": us["peak_bytes"] / them["peak_bytes"],
            "memory_above_the_model": us["above_the_model_bytes"] / them["above_the_model_bytes"]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", nargs=3)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--case", choices=CASES)
    given = parser.parse_args()
    if given.side:
        return serve(*given.side)
    from common import save

    if given.dry:
        os.environ["LIGHT"] = "1"
    smollm2()
    found = {}
    for case in [given.case] if given.case else CASES:
        for targets in TARGETS:
            rounds, steps = (3, 1) if given.dry else (9, 4)
            found[f"{case}, {targets}"] = one = compared(case, targets, rounds, steps)
            print(f"{case}, {targets}: {one['speed']:.2f}x tokens/s, {one['memory']:.2f}x peak, "
                  f"{one['memory_above_the_model']:.2f}x above the model; losses "
                  f"{one['headway']['first_loss']:.6f} and {one['peft']['first_loss']:.6f}, trained "
                  f"{one['headway']['trained']} and {one['peft']['trained']}", flush=True)  # fmt: skip
    if not given.dry:
        save("adapt", {"rank": RANK, "cases": found})


if __name__ == "__main__":
    main()
