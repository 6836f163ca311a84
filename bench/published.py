"""Published checkpoints beside their peers: decoding, prefill, embedding, int8's quality, start and memory.

Every side is a process of its own that loads once and then waits; rounds go in turn (A B A B ...), so that a drifting
machine hits all of them. GPT-2's weights are random (speed does not depend on them; none can be had offline), SmolLM2's
and MiniLM's are real. `--only PART` runs one part of: gpt2, smollm2, minilm, quality, start, profile.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import RESULTS, save
from sides import SMOL, TEXTS, cache, gpt2_folder, minilm, prompt, prose, site

SIDES = Path(__file__).parent / "sides.py"
NEW = 128  # tokens that a round writes
ROUNDS, MOST, SECONDS = 3, 9, 30.0  # at least and at most, as many as these seconds hold: this machine's pace changes


class Side:
    """A worker at the other end of two pipes."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, str(SIDES), *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.mib = 0.0
        self._answer()
        self.process.send_signal(signal.SIGSTOP)

    def ask(self, **what: Any) -> float:
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        found = self._answer()
        self.process.send_signal(signal.SIGSTOP)  # threads that wait for work by spinning would slow the other side
        self.mib = found["mib"]
        return found["seconds"]

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.process.args}: ended with {self.process.wait()}")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.close()
        self.process.wait()


def contest(
    what: str, ours: list[str], theirs: list[str], ask: dict[str, Any], units: float, bar: float
) -> dict[str, Any]:
    """Both sides in turn; units a second, medians and the range of the ratios, round by round."""
    sides = [Side(*ours), Side(*theirs)]
    warm = sum(side.ask(**ask) for side in sides)
    rounds = min(MOST, max(ROUNDS, int(SECONDS / warm)))
    seconds = [
        list(column) for column in zip(*[[side.ask(**ask) for side in sides] for _ in range(rounds)], strict=True)
    ]
    for side in sides:
        side.close()
    pairs = [b / a for a, b in zip(*seconds, strict=True)]
    mine, other = (statistics.median(s) for s in seconds)
    row = {
        "what": what, "peer": theirs[0].split("_")[0] + " " + " ".join(a for a in theirs[2:] if a != "none"),
        "ours_per_second": units / mine, "peer_per_second": units / other, "ratio": other / mine,
        "ratio_range": [min(pairs), max(pairs)], "rounds": rounds, "bar": bar,
        "met": other / mine >= bar,
        "ours_mib": sides[0].mib, "peer_mib": sides[1].mib,
    }  # fmt: skip
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def decoding(model: str, source: str, cases: list[tuple[str, list[str], list[str], int, int, int, float]]) -> list[Any]:
    return [
        contest(
            f"{model}, {what}", [ours[0], source, *ours[1:]], [theirs[0], source, *theirs[1:]],
            {"run": [rows, length, new]}, rows * (new or length), bar,
        )
        for what, ours, theirs, rows, length, new, bar in cases
    ]  # fmt: skip


def gpt2() -> list[Any]:
    ours, hf, ct2 = "headway_lm", "transformers_lm", "ctranslate2_lm"
    fp32, bf16, int8 = [ours, "float32", "none"], [ours, "bfloat16", "none"], [ours, "float32", "int8"]
    return decoding("GPT-2 124M", str(gpt2_folder()), [
        ("fp32, batch 1", fp32, [hf, "float32"], 1, 64, NEW, 1.6),
        ("bf16, batch 1", bf16, [hf, "bfloat16"], 1, 64, NEW, 1.8),
        ("fp32, batch 8", fp32, [hf, "float32"], 8, 64, NEW, 2.5),
        ("fp32, batch 1", fp32, [ct2, "float32"], 1, 64, NEW, 1.0),
        ("int8, batch 1", int8, [ct2, "int8"], 1, 64, NEW, 1.5),
        ("int8, batch 8", int8, [ct2, "int8"], 8, 64, NEW, 1.4),
    ])  # fmt: skip


def smollm2() -> list[Any]:
    int8, cpp = ["headway_lm", "float32", "int8"], ["llama_cpp_lm", "Q8_0"]
    return decoding("SmolLM2-135M", str(site(SMOL)), [
        ("int8, batch 1", int8, cpp, 1, 64, NEW, 0.6),
        ("int8, batch 8", int8, cpp, 8, 64, NEW, 1.1),
        ("int8, prefill of 512", int8, cpp, 1, 512, 0, 1.5),
    ])  # fmt: skip


def embedding() -> list[Any]:
    import numpy as np

    st, ct2 = "sentence_embed", "ctranslate2_embed"
    rows = []
    for what, mine, theirs, bar in (
        ("fp32", ["float32", "none"], [st, "-", "float32"], 1.2),
        ("bf16", ["bfloat16", "none"], [st, "-", "bfloat16"], 1.15),
        ("int8", ["float32", "int8"], [ct2, "-", "int8"], 1.0),
    ):
        row = contest(f"MiniLM, {what}, texts", ["headway_embed", "-", *mine], theirs, {}, TEXTS, bar)
        files = {}
        for name, side in (("ours", ["headway_embed", "-", *mine]), ("peer", theirs), ("fp32", [st, "-", "float32"])):
            worker = Side(*side)
            files[name] = str(cache() / f"{name}.npy")
            worker.ask(keep=files[name])
            worker.close()
        found = {name: np.load(file).astype(np.float32) for name, file in files.items()}
        for name in ("ours", "peer"):
            row[f"{name}_cosine"] = float((found[name] * found["fp32"]).sum(1).mean())
        rows.append(row)
    return rows


def quality() -> dict[str, Any]:
    """SmolLM2 on real text in windows of 512: perplexity, and how often the likeliest token is fp32's."""
    import torch

    import headway

    ids = headway.load(site(SMOL)).tokenizer.encode(" ".join(prose())).ids[: 512 * 24]
    rows = torch.tensor(ids).view(-1, 512)
    found: dict[str, Any] = {"tokens": rows.numel()}
    best: dict[str, Any] = {}
    for name, quantize, dtype in (("fp32", None, "float32"), ("bf16", None, "bfloat16"), ("int8", "int8", "float32")):
        model = headway.load(site(SMOL), quantize=quantize, dtype=dtype)
        total, best[name] = 0.0, []
        for row in rows:
            logits = model.logits(row[None]).float()[0]
            total += float(torch.nn.functional.cross_entropy(logits[:-1], row[1:], reduction="sum"))
            best[name].append(logits.argmax(-1))
        found[name] = {"perplexity": float(torch.tensor(total / (rows.numel() - len(rows))).exp())}
        agreement = torch.stack(best[name]) == torch.stack(best["fp32"])
        found[name]["greedy_agreement"] = float(agreement.float().mean())
        found[name]["perplexity_over_fp32"] = found[name]["perplexity"] / found["fp32"]["perplexity"]
    found["gpt2"] = "not measured: no trained weights of GPT-2 can be had offline"
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


STARTS = {
    "MiniLM: import, load, first vector": (
        "import headway; headway.load({m!r}).embed(['a first text'])",
        "import torch, transformers as t; k = t.AutoTokenizer.from_pretrained({m!r}); "
        "n = t.AutoModel.from_pretrained({m!r}); n(**k(['a first text'], return_tensors='pt'))",
    ),
    "GPT-2: import, load, first token": (
        "import headway; headway.load({g!r}).generate([[1, 2, 3]], max_tokens=1)",
        "import torch, transformers as t; n = t.AutoModelForCausalLM.from_pretrained({g!r}); "
        "n.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=1, pad_token_id=0)",
    ),
}


def start() -> list[Any]:
    rows = []
    for what, codes in STARTS.items():
        seconds: list[list[float]] = [[], []]
        for number in range(ROUNDS + 1):
            for code, kept in zip(codes, seconds, strict=True):
                command = [sys.executable, "-c", code.format(m=str(minilm()), g=str(gpt2_folder()))]
                began = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True)
                if number:
                    kept.append(time.perf_counter() - began)
        mine, other = (statistics.median(s) for s in seconds)
        rows.append({"what": what, "peer": "transformers", "ours_seconds": mine, "peer_seconds": other,
                     "share": mine / other, "most": 0.5, "met": mine / other <= 0.5})  # fmt: skip
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


GROUPS = {"quantized::": "int8 products", "scaled_dot_product": "attention", "flash_attention": "attention",
          "layer_norm": "norms", "linear_pointwise": "packed products"}  # fmt: skip
INT8 = {**GROUPS, "aten::mm": "spreading of outliers"}
FULL = {**GROUPS, "aten::mm": "products", "aten::addmm": "products", "aten::mv": "products", "aten::linear": "products"}


def profiled() -> dict[str, Any]:
    """Where the time goes: shares of the operations' own time, by torch.profiler, beside the time of a step without it;
    and how long the weights take to be read once at the best speed that memory shows here."""
    import torch

    import headway
    from headway.generate.writer import writer_of
    from headway.quantize import nbytes

    large = torch.ones(2**28, dtype=torch.int8)
    view = large.view(torch.int64)
    read = min(timed(lambda: view.sum()) for _ in range(9))
    found: dict[str, Any] = {"read_gb_s": large.numel() / read / 1e9}
    step, eight, prefill = ("a step, batch 1", 1, 64), ("a step, batch 8", 8, 64), ("prefill of 512", 1, 512)
    for title, source, how, asked_for in (
        ("SmolLM2-135M int8", site(SMOL), {"quantize": "int8"}, (step, eight, prefill)),
        ("GPT-2 fp32", gpt2_folder(), {}, (step, eight)),
        ("GPT-2 bf16", gpt2_folder(), {"dtype": "bfloat16"}, (step,)),
    ):
        model = headway.load(source, **how)
        for what, rows, length in asked_for:
            asked = prompt(model.vocab or 0, rows, length)
            if length == 512:
                run: Callable[[], Any] = lambda asked=asked, model=model: writer_of(model, asked, 1).first()
            else:
                if not how.get("quantize"):
                    model.pack()
                writer = writer_of(model, asked, 256)
                writer.first()
                ids = torch.full((rows,), 7)
                run = lambda writer=writer, ids=ids: writer.next(ids)
            seconds = statistics.median(timed(run) for _ in range(20 if length < 512 else 5))
            found[f"{title}: {what}"] = {"ms": 1000 * seconds, "weights_mib": nbytes(model.net) / 2**20,
                                          **shares(run, INT8 if how.get("quantize") else FULL)}  # fmt: skip
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def shares(run: Callable[[], Any], groups: dict[str, str]) -> dict[str, Any]:
    """Of the time of one call, by what it goes to; and how many operations it is."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    spent: dict[str, float] = {}
    for event in seen.key_averages():
        group = next((name for key, name in groups.items() if key in event.key), "all else")
        spent[group] = spent.get(group, 0.0) + event.self_cpu_time_total
    total = sum(spent.values())
    return {"shares": {name: part / total for name, part in spent.items()},
            "operations": sum(event.count for event in seen.key_averages())}  # fmt: skip


def timed(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


PARTS: dict[str, Callable[[], Any]] = {
    "gpt2": gpt2, "smollm2": smollm2, "minilm": embedding, "quality": quality, "start": start, "profile": profiled,
}  # fmt: skip


def main() -> None:
    file = RESULTS / "published.json"
    chosen = sys.argv[sys.argv.index("--only") + 1].split(",") if "--only" in sys.argv else list(PARTS)
    before = json.loads(file.read_text()) if file.is_file() else {}
    figures = {name: before[name] for name in PARTS if name in before}
    for name in chosen:
        figures[name] = PARTS[name]()
    peers = ("transformers", "ctranslate2", "llama-cpp-python", "sentence-transformers")
    from importlib.metadata import version

    save("published", {"peers": {name: version(name) for name in peers}, "new_tokens": NEW, **figures})


if __name__ == "__main__":
    main()
