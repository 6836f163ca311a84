"""Training and decoding speed of the demo's Transformer beside `torch.nn.Transformer` of the same sizes.

Same process, same batches, fp32 on both sides, interleaved. The peer is a plain loop: forward, cross-entropy,
backward, clip, AdamW. Headway runs its own loop (`Trainer`), with AdamW and, as the demo does, with Muon.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from common import interleave, save, spread
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from headway import recipe as recipes
from headway.attend import forced
from headway.data.batches import IGNORE
from headway.data.pairs import Pairs
from headway.generate.search import greedy
from headway.hub import Loaded
from headway.machine import fast_bf16, gemm_peak
from headway.recipe import OptimizerSpec
from headway.text import BOS, EOS
from headway.train.data import prepare
from headway.train.loop import Trainer

STEPS, ROUNDS = 12, 5


class Peer(nn.Module):
    """`torch.nn.Transformer` with embeddings, learned positions and a head, pre-norm, as documented."""

    def __init__(self, source: int, target: int, dropout: float) -> None:
        super().__init__()
        self.source, self.target, self.places = (
            nn.Embedding(source, 128),
            nn.Embedding(target, 128),
            nn.Embedding(64, 128),
        )
        self.body = nn.Transformer(128, 4, 3, 3, 512, dropout, "gelu", batch_first=True, norm_first=True)
        self.head = nn.Linear(128, target)

    def encode(self, source: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        x = self.source(source) + self.places(torch.arange(source.shape[1]))
        return self.body.encoder(x, src_key_padding_mask=padding)

    def decode(self, target: torch.Tensor, memory: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        x = self.target(target) + self.places(torch.arange(target.shape[1]))
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        x = self.body.decoder(x, memory, tgt_mask=causal, tgt_is_causal=True, memory_key_padding_mask=padding)
        return self.head(x)

    def forward(self, batch: Pairs) -> torch.Tensor:
        padding = None if batch.source_valid is None else ~batch.source_valid
        return self.decode(batch.target_in, self.encode(batch.source, padding), padding)


def plain_loop(model: Peer, optimizer: torch.optim.Optimizer, batches: list[Pairs]) -> None:
    for batch in batches:
        logits = model(batch)
        loss = F.cross_entropy(
            logits.flatten(0, 1), batch.target_out.flatten(), ignore_index=IGNORE, label_smoothing=0.1
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.inference_mode()
def uncached(model: Peer, source: torch.Tensor, padding: torch.Tensor | None, length: int) -> None:
    """Greedy decoding without a cache: every step recomputes all tokens before it."""
    memory = model.encode(source, padding)
    target = source.new_full((len(source), 1), BOS)
    done = torch.zeros(len(source), dtype=torch.bool)
    for _ in range(length):
        token = model.decode(target, memory, padding)[:, -1].argmax(-1)
        target = torch.cat([target, token[:, None]], 1)
        done |= token == EOS
        if bool(done.all()):
            break


def training() -> dict[str, object]:
    demo = recipes.read("demo", ["precision=fp32"])
    prepared = prepare(demo)
    spec = demo.models["transformer"].model
    batches = [prepared.batches.batch(i) for i in range(STEPS)]
    tokens = sum(batch.tokens for batch in batches)
    sides = {}
    with tempfile.TemporaryDirectory() as folder:
        as_shipped = recipes.read("demo")  # its own precision: bf16 where that is fast
        setups = {
            "demo": (as_shipped, as_shipped.optimizer),
            **{name: (demo, OptimizerSpec(name=name, lr=1e-3)) for name in ("adamw", "muon")},
        }
        for name, (recipe, optimizer) in setups.items():
            trainer = Trainer(recipe, spec, optimizer, prepared, Path(folder))

            def steps(trainer: Trainer = trainer) -> None:
                trainer.progress.step = 0
                trainer.stream = trainer._stream()
                for _ in range(STEPS):
                    trainer._step()

            sides[f"headway {name}"] = steps
        # the counter does not see into the fused kernel
        with forced("reference"), FlopCounterMode(display=False) as counter:
            for batch in batches:
                trainer.objective(trainer.model, batch).total.backward()
        flops = counter.get_total_flops()
        trainer.model.zero_grad()
        for name, dropout in (("torch.nn.Transformer", 0.1), ("torch.nn.Transformer, no dropout", 0.0)):
            peer = Peer(prepared.tools.source.vocab, prepared.tools.target.vocab, dropout)
            adamw = torch.optim.AdamW(peer.parameters(), 1e-3, betas=(0.9, 0.98))
            sides[name] = lambda peer=peer, adamw=adamw: plain_loop(peer, adamw, batches)
        seconds = interleave(sides, ROUNDS)
    peak = gemm_peak()
    speed = {name: spread([tokens / s for s in found]) for name, found in seconds.items()}
    ours = {name: flops / statistics.median(seconds[name]) / peak for name in seconds if name.startswith("headway")}
    return {
        "tokens_per_second": speed,
        "gemm_peak_gflops": peak / 1e9,
        "share_of_gemm_peak": ours,
        "demo_in_bf16": fast_bf16(),
        "ratio_demo": speed["headway demo"]["median"] / speed["torch.nn.Transformer"]["median"],
        "ratio_adamw": speed["headway adamw"]["median"] / speed["torch.nn.Transformer"]["median"],
        "ratio_muon": speed["headway muon"]["median"] / speed["torch.nn.Transformer"]["median"],
    }


def decoding() -> dict[str, object]:
    """A briefly trained model on each side, so that answers have real lengths; words of the test split."""
    demo = recipes.read("demo", ["precision=fp32"])
    prepared = prepare(demo)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(demo, demo.models["transformer"].model, OptimizerSpec(), prepared, Path(folder))
        peer = Peer(prepared.tools.source.vocab, prepared.tools.target.vocab, 0.0)
        optimizer = torch.optim.AdamW(peer.parameters(), 2e-3, betas=(0.9, 0.98))
        trainer.stream = trainer._stream()
        for step in range(150):
            trainer._step()
            plain_loop(peer, optimizer, [prepared.batches.batch(step)])
    ours = Loaded(trainer.model, trainer.spec, prepared.tools.source, prepared.tools.target, max_tokens=48)
    peer.eval()
    words = sorted({word for word, _ in prepared.splits.test})[::12][:512]
    rows = sorted(([*prepared.tools.source.encode(word), EOS] for word in words), key=len)
    groups = []
    for i in range(0, len(rows), 256):
        part = rows[i : i + 256]
        width = max(map(len, part))
        source = torch.tensor([row + [0] * (width - len(row)) for row in part])
        valid = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in part])
        groups.append((source, valid))
    seconds = interleave(
        {
            "headway": lambda: [greedy(ours.net, source, valid, limit=49) for source, valid in groups],
            "torch.nn.Transformer": lambda: [uncached(peer, source, ~valid, 49) for source, valid in groups],
        },
        ROUNDS,
    )
    single = interleave({word: lambda word=word: ours.generate([word]) for word in words[::16]}, 5)
    each = [1000 * statistics.median(found) for found in single.values()]
    speed = {name: spread([len(words) / s for s in found]) for name, found in seconds.items()}
    return {
        "words_per_second": speed,
        "ratio": speed["headway"]["median"] / speed["torch.nn.Transformer"]["median"],
        "single_word_ms": spread(each),
    }


if __name__ == "__main__":
    save("speed", {"training": training(), "decoding": decoding()})
