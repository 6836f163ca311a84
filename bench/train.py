"""Training: what the loop costs beside the bare step, a decoder beside its peers, skewed lengths beside padded batches.

    python bench/train.py [loop] [decoder] [skewed] [--rounds 5] [--dry]

Each part that is named (all, without names) is measured anew and put into `results/train.json`. All sides of a part
take turns in one process, on the same tokens, with the same optimiser (fused AdamW), and clip gradients at 1.
Peers: transformers (GPT2LMHeadModel, BertForMaskedLM), x-transformers, and the model of nanoGPT written anew in plain
PyTorch; each eager (as nanoGPT's published CPU settings have it), in fp32, under bf16 autocast and in pure bf16.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, interleave, save, spread
from nanogpt import NanoGPT
from sides import minilm, prose
from torch import Tensor, nn

from headway import recipe as recipes
from headway.machine import gemm_peak
from headway.recipe import Recipe
from headway.train.data import Prepared, prepare
from headway.train.loop import Trainer

LAYERS, WIDTH, HEADS, CONTEXT, ROWS, VOCAB = 6, 384, 6, 256, 16, 256
RATE, CLIP = 3e-4, 1.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALPHABET = [chr(c) for c in range(33, 33 + 400) if chr(c).isprintable() and not chr(c).isspace()]


# --- our side


def trainer(recipe: dict[str, Any] | Recipe, folder: Path, prepared: Prepared | None = None) -> Trainer:
    chosen = recipes.read(recipe) if isinstance(recipe, dict) else recipe
    assert chosen.model is not None
    found = Trainer(chosen, chosen.model, chosen.optimizer, prepared or prepare(chosen), folder)
    found.net.train()
    found.stream = found._stream().__enter__()
    return found


def decoder(folder: Path, **changed: Any) -> dict[str, Any]:
    """A recipe whose rows are exactly CONTEXT tokens, of a vocabulary of VOCAB."""
    draw = random.Random(0)
    letters = ALPHABET[: VOCAB - 4]  # beside four specials
    size = 8 * CONTEXT - 1  # with a token at either end, eight rows of input and target
    lines = [json.dumps({"text": "".join(draw.choices(letters, k=size))}) for _ in range(60)]
    (folder / "text.jsonl").write_text("\n".join(lines), "utf-8")
    block = {"mixer": {"name": "attention", "heads": HEADS, "bias": False}, "feedforward": {"bias": False}}
    return {
        "data": {"source": str(folder / "text.jsonl")},
        "tokenizers": {"input": {"kind": "characters"}},
        "objective": {"name": "causal"},
        "budget": {"steps": 10**6},
        "batch_tokens": ROWS * CONTEXT,
        "max_tokens": CONTEXT,
        "precision": "fp32",
        "optimizer": {"name": "adamw", "lr": RATE, "warmup": 0, "schedule": "constant", "clip": CLIP},
        "model": {
            "kind": "decoder",
            "width": WIDTH,
            "stack": {"positions": {"name": "learned", "length": CONTEXT}, "blocks": [block], "repeat": LAYERS},
        },
        **changed,
    }


# --- peers


def theirs() -> dict[str, Callable[[], tuple[nn.Module, Callable[[Tensor], Tensor]]]]:
    """Each peer's model, and its logits."""

    def transformers_side() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        import transformers

        config = transformers.GPT2Config(
            vocab_size=VOCAB, n_positions=CONTEXT, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None, use_cache=False,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
        return model, lambda ids: model(ids).logits

    def x_transformers_side() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        from x_transformers import Decoder, TransformerWrapper

        layers = Decoder(dim=WIDTH, depth=LAYERS, heads=HEADS, attn_dim_head=WIDTH // HEADS, attn_flash=True)
        model = TransformerWrapper(num_tokens=VOCAB, max_seq_len=CONTEXT, attn_layers=layers, tie_embedding=True)
        return model, model

    def plain_side() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        model = NanoGPT(VOCAB, CONTEXT, WIDTH, LAYERS, HEADS)
        return model, model

    return {"transformers": transformers_side, "x-transformers": x_transformers_side, "plain PyTorch": plain_side}


def peer_step(model: nn.Module, loss: Callable[[], Tensor], autocast: bool) -> Callable[[], None]:
    """One step as all write it."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# --- parts


def loop(rounds: int) -> dict[str, Any]:
    """Of two models: seconds of the loop's step beside the bare one's, and of a checkpoint beside a hundred steps."""
    with tempfile.TemporaryDirectory() as name:
        small = recipes.read("prose", ["precision=fp32", "budget.steps=1000000"])
        return {
            "decoder": overhead(trainer(decoder(Path(name)), Path(name) / "decoder"), rounds, 1),
            "prose": overhead(trainer(small, Path(name) / "prose"), rounds, 4),
        }


def overhead(ours: Trainer, rounds: int, steps: int) -> dict[str, Any]:
    """The bare step has the batches ready, and does nothing but what a step must."""
    ours.folder.mkdir(parents=True, exist_ok=True)
    batches = [ours.prepared.batches.batch(i) for i in range(steps)]
    step = 0

    def bare() -> None:
        for batch in batches:
            loss = ours.objective(ours.net, batch)
            (loss.total / batch.targets).backward()
            nn.utils.clip_grad_norm_(ours.net.parameters(), CLIP)
            for optimizer in ours.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    def looped() -> None:
        nonlocal step
        ours.progress.step = 0
        ours.stream = ours._stream().__enter__()
        for _ in range(steps):
            ours._step()
            ours.watch(ours._status())
        step += 1

    ours.flops_per_token = 0.0
    seconds = interleave({"bare": bare, "loop": looped}, rounds)
    saves = []
    for i in range(max(3, rounds)):
        ours.progress.step = 100 * (i + 1)
        began = time.perf_counter()
        ours.save()
        saves.append(time.perf_counter() - began)
    each = [b / a - 1 for a, b in zip(seconds["bare"], seconds["loop"], strict=True)]
    bare_step = statistics.median(seconds["bare"]) / steps
    return {
        "parameters": sum(p.numel() for p in ours.model.parameters()),
        "bare_step_seconds": spread([s / steps for s in seconds["bare"]]),
        "loop_step_seconds": spread([s / steps for s in seconds["loop"]]),
        "overhead": statistics.median(seconds["loop"]) / statistics.median(seconds["bare"]) - 1,
        "overhead_by_round": spread(each),
        "checkpoint_seconds": spread(saves),
        "checkpoint_overhead_every_100_steps": statistics.median(saves) / (100 * bare_step),
    }


def decoders(rounds: int) -> dict[str, Any]:
    """Tokens a second of the 10.8M decoder on every side, and the share of what this machine's products reach."""
    torch.manual_seed(0)
    ids = torch.randint(VOCAB, (ROWS, CONTEXT + 1))
    inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].flatten()
    sides: dict[str, Callable[[], None]] = {}
    parameters: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name:
        for precision, compiled in (("fp32", False), ("bf16", False), ("pure-bf16", False), ("fp32", True)):
            recipe = decoder(Path(name), precision=precision, compile=compiled)
            ours = trainer(recipe, Path(name))
            key = f"headway {precision}{' compiled' if compiled else ''}"
            sides[key] = lambda ours=ours: ours._step()
            parameters["headway"] = sum(p.numel() for p in ours.model.parameters())
        for peer, make in theirs().items():
            for precision in ("fp32", "bf16", "pure-bf16"):
                model, logits = make()
                model = model.to(torch.bfloat16) if precision == "pure-bf16" else model
                loss = lambda logits=logits: F.cross_entropy(logits(inputs).flatten(0, 1).float(), labels)
                sides[f"{peer} {precision}"] = peer_step(model, loss, precision == "bf16")
                parameters[peer] = sum(p.numel() for p in model.parameters())
        peaks = {key: gemm_peak(dtype=dtype) for key, dtype in DTYPES.items()}
        seconds = interleave(sides, rounds)
        peaks = {key: max(peaks[key], gemm_peak(dtype=dtype)) for key, dtype in DTYPES.items()}
    speed = {key: spread([ROWS * CONTEXT / s for s in found]) for key, found in seconds.items()}
    best = lambda ours, kind: max(
        (found["median"], key)
        for key, found in speed.items()
        if key.startswith("headway") == ours and ("bf16" in key) == (kind == "bf16")
    )
    figures: dict[str, Any] = {"batch": [ROWS, CONTEXT], "parameters": parameters, "tokens_per_second": speed}
    figures["gemm_peak_gflops"] = {key: peak / 1e9 for key, peak in peaks.items()}
    for kind, peak in peaks.items():
        (our_speed, our_side), (their_speed, their_side) = best(True, kind), best(False, kind)
        figures[kind] = {
            "ours": our_side,
            "fastest_peer": their_side,
            "ratio": our_speed / their_speed,
            "share_of_gemm_peak_6nd": 6 * parameters["headway"] * our_speed / peak,
            "share_of_fp32_gemm_peak_6nd": 6 * parameters["headway"] * our_speed / peaks["fp32"],
        }
    return figures


def skewed(rounds: int) -> dict[str, Any]:
    """Masked LM on MiniLM's sizes, texts of 5 to 256 tokens: our batches of like lengths beside padded random ones."""
    import transformers

    texts = prose() if STEPS > 1 else prose()[:150]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "texts.jsonl"
        source.write_text("\n".join(json.dumps({"text": text}) for text in texts), "utf-8")
        recipe = {
            "data": {"source": str(source)},
            "objective": {"name": "masked"},
            "budget": {"steps": 10**6},
            "batch_tokens": 4096,
            "max_tokens": 256,
            "model": {"load": str(minilm())},
            "optimizer": {"name": "adamw", "lr": RATE, "warmup": 0, "schedule": "constant", "clip": CLIP},
        }
        sides: dict[str, Callable[[], None]] = {}
        tokens: dict[str, list[int]] = {}
        for pack in (False, True):
            prepared = None
            for precision in ("fp32", "bf16", "pure-bf16"):
                given = {**recipe, "precision": precision, "objective": {"name": "masked", "pack": pack}}
                ours = trainer(given, Path(name), prepared)
                prepared = ours.prepared
                key = f"headway {precision}{' packed' if pack else ''}"
                sides[key] = our_epoch(ours, tokens.setdefault(key, []))
        rows = [[int(i) for i in ids] for ids, *_ in ours.prepared.batches._examples]  # the same texts, as the same ids
        lengths = sorted(map(len, rows))
        config = transformers.AutoConfig.from_pretrained(minilm())
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.1
        for precision in ("fp32", "bf16", "pure-bf16"):
            model = transformers.BertForMaskedLM(config)
            model = model.to(torch.bfloat16) if precision == "pure-bf16" else model
            key = f"transformers {precision}"
            sides[key] = their_batches(model, rows, precision == "bf16", tokens.setdefault(key, []))
        seconds = interleave(sides, rounds)
    speed = {key: spread([n / s for n, s in zip(tokens[key][1:], seconds[key], strict=True)]) for key in sides}
    top = lambda ours: max((v["median"], k) for k, v in speed.items() if k.startswith("headway") == ours)
    (our_speed, our_side), (their_speed, their_side) = top(True), top(False)
    middle = {q: lengths[int(q / 100 * (len(lengths) - 1))] for q in (0, 25, 50, 75, 100)}
    by = {kind: max(v["median"] for k, v in speed.items() if k.startswith("headway " + kind))
          / speed[f"transformers {kind}"]["median"] for kind in ("fp32", "bf16", "pure-bf16")}  # fmt: skip
    return {
        "texts": len(rows), "lengths_by_percentile": middle, "real_tokens_per_second": speed, "ours": our_side,
        "theirs": their_side, "ratio": our_speed / their_speed, "ratio_by_precision": by,
    }  # fmt: skip


STEPS = 6


def our_epoch(ours: Trainer, counted: list[int]) -> Callable[[], None]:
    def run() -> None:
        before = ours.progress.tokens
        for _ in range(STEPS):
            ours._step()
        counted.append(ours.progress.tokens - before)

    return run


def their_batches(model: nn.Module, rows: list[list[int]], autocast: bool, counted: list[int]) -> Callable[[], None]:
    """32 random rows, padded to the longest of them; 15% hidden, as transformers' collator does it."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm())
    collate = transformers.DataCollatorForLanguageModeling(tokenizer)
    draw = random.Random(0)
    batch: dict[str, Tensor] = {}
    step = peer_step(model, lambda: model(**batch).loss, autocast)

    def run() -> None:
        count = 0
        for _ in range(STEPS):
            chosen = draw.sample(rows, 32)
            count += sum(map(len, chosen))
            batch.update(collate([{"input_ids": ids} for ids in chosen]))
            step()
        counted.append(count)

    return run


PARTS: dict[str, Callable[[int], dict[str, Any]]] = {"loop": loop, "decoder": decoders, "skewed": skewed}

if __name__ == "__main__":
    asked = argparse.ArgumentParser()
    asked.add_argument("parts", nargs="*", help="loop, decoder, skewed")
    asked.add_argument("--rounds", type=int, default=5)
    asked.add_argument("--dry", action="store_true", help="one row a batch, one round, nothing saved: does it run?")
    given = asked.parse_args()
    if given.dry:
        ROWS, STEPS, given.rounds = 1, 1, 1
    if unknown := set(given.parts) - PARTS.keys():
        raise SystemExit(f"bench/train.py: no part {', '.join(sorted(unknown))}; there is {', '.join(PARTS)}")
    file = RESULTS / "train.json"
    figures = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    for part in given.parts or PARTS:
        figures[part] = PARTS[part](given.rounds)
        figures["peers"] = {name: version(name) for name in ("transformers", "x-transformers")}
        if given.dry:
            print(json.dumps(figures[part], indent=1))
            continue
        save("train", {key: value for key, value in figures.items() if key in (*PARTS, "peers")})
