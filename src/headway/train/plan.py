"""Plan: whether a run fits on given GPUs and how long it takes, on paper.

One step is run on fake tensors, which have shapes and no memory: what it would hold at its peak and the FLOPs it would
take are counted, not estimated by formula. Times follow from data sheets and a stated share of the peak.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from headway import machine, models
from headway.block import Block
from headway.recipe import Recipe
from headway.spec import nearest
from headway.train import recompute
from headway.train.data import Prepared
from headway.train.network import spec_of
from headway.train.optim import build_optimizers
from headway.train.ranks import alone

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """Memory in bytes; dense FLOP/s in bf16 and in fp32 (TF32 where there is such); bytes a second to the GPUs of the
    same node and to others, for each GPU and direction. From NVIDIA's data sheets; networks as the makers' own systems
    have them (DGX: eight GPUs and eight adapters a node)."""

    memory: float
    bf16: float
    fp32: float
    inside: float
    outside: float
    node: int = 8


GPUS = {
    "a100": Gpu(80e9, 312e12, 156e12, 300e9, 25e9),
    "h100": Gpu(80e9, 989e12, 494e12, 450e9, 50e9),
    "h200": Gpu(141e9, 989e12, 494e12, 450e9, 50e9),
    "l4": Gpu(24e9, 121e12, 60e12, 32e9, 12e9),
    "rtx4090": Gpu(24e9, 165e12, 82e12, 32e9, 12e9, 4),
}


@dataclass(frozen=True)
class Step:
    """One step of one rank: bytes at its highest moment, by part, and FLOPs. `gathered`: weights that are whole at once
    where ranks cut them. `blocks`: how many the model has."""

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    gathered: int
    blocks: int
    flops: int
    tokens: int


@dataclass(frozen=True)
class Plan:
    """Bytes on each GPU, by part, and seconds a step: computing, exchanging, and what of that cannot be hidden behind
    computing. `bubble` is the share of a step in which a GPU waits for others; no pipeline is used, so all of it is
    the exchange."""

    gpu: str
    gpus: int
    parallel: str
    share: float
    parameters: int
    memory: dict[str, int]
    fits: bool
    capacity: int
    tokens_per_step: int
    flops_per_step: int
    bytes_exchanged: int
    compute_seconds: float
    exchange_seconds: float
    step_seconds: float
    bubble: float
    steps: int
    seconds: float
    tokens_per_second: float

    def record(self) -> dict[str, Any]:
        return asdict(self)


def plan(recipe: Recipe, prepared: Prepared, *, gpus: int, gpu: str, share: float) -> Plan:
    """`gpus` of kind `gpu`, which reach `share` of their peak while they compute."""
    if gpu not in GPUS:
        raise ValueError(f"--gpu {gpu}: not known (there is {', '.join(GPUS)}){nearest(gpu, GPUS)}")
    if recipe.accumulate % gpus:
        raise ValueError(f"a step of accumulate={recipe.accumulate} batches cannot be shared by {gpus} GPUs evenly: "
                         f"set accumulate={-(-recipe.accumulate // gpus) * gpus}")  # fmt: skip
    if not 0 < share <= 1:
        raise ValueError(f"--share is what of the peak is reached, above 0 and at most 1, not {share}")
    kind, parts = GPUS[gpu], recipe.accumulate // gpus
    one = step(recipe, prepared, parts)
    memory = _memory(recipe, one, gpus)
    exchanged = _exchanged(recipe, one, gpus)
    speed = kind.inside if gpus <= kind.node else kind.outside
    compute = one.flops / (share * (kind.fp32 if recipe.precision == "fp32" else kind.bf16))
    exchange = exchanged / speed
    # they travel while blocks compute; the first block's and the last one's have nothing to hide behind
    seconds = max(compute, exchange) + min(compute, exchange) / max(2, one.blocks)
    tokens = one.tokens * gpus
    steps = _steps(recipe, tokens, seconds)
    return Plan(
        gpu=gpu,
        gpus=gpus,
        parallel=recipe.parallel if gpus > 1 else "one GPU",
        share=share,
        parameters=one.parameters,
        memory=memory,
        fits=sum(memory.values()) <= kind.memory,
        capacity=int(kind.memory),
        tokens_per_step=tokens,
        flops_per_step=one.flops * gpus,
        bytes_exchanged=exchanged,
        compute_seconds=compute,
        exchange_seconds=exchange,
        step_seconds=seconds,
        bubble=1 - compute / seconds,
        steps=steps,
        seconds=steps * seconds,
        tokens_per_second=tokens / seconds,
    )


def step(recipe: Recipe, prepared: Prepared, parts: int = 1) -> Step:
    """Counts one step of `parts` micro-batches, each like the largest of those at hand, on fake tensors."""
    from torch.distributed._tools.mem_tracker import MemTracker

    batch = _largest(prepared)
    spec = spec_of(_model(recipe), prepared)
    half = recipe.precision != "fp32" and (recipe.precision != "auto" or machine.fast_bf16())
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        net = models.assemble(spec).train()
        if recipe.activation_checkpointing:
            recompute.recompute(net)
        optimizers = build_optimizers(net, recipe.optimizer)
        seen = _faked(batch, fake)
        tracker, counter = MemTracker(), FlopCounterMode(display=False)
        tracker.track_external(net, *optimizers)
        with tracker:
            for _ in range(2):  # an optimiser's state is made in the first step
                for _ in range(min(parts, 2)):
                    _back(prepared, net, seen, half)
                    tracker.reset_mod_stats()  # it takes a module that is called twice for a mistake
                nn.utils.clip_grad_norm_(net.parameters(), recipe.optimizer.clip)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
        # a fused kernel's products are not counted; those of its definition are the same
        with sdpa_kernel(SDPBackend.MATH), counter:
            _back(prepared, net, seen, half)
        peak = tracker.get_tracker_snapshot("peak")
        held = {str(kind): size for kind, size in next(iter(peak.values())).items()}
        weights = sum(p.numel() * p.element_size() for p in net.parameters())
        state = [t for o in optimizers for s in o.state.values() for t in s.values() if isinstance(t, Tensor)]
        kept = sum(t.numel() * t.element_size() for t in state)
        sizes = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in alone(net)]
        # one block computes while the next arrives; what is in no block stays
        gathered = weights - sum(sizes) + 2 * max(sizes, default=0)
    total = held["Total"]
    return Step(
        parameters=sum(p.numel() for p in net.parameters()),
        weights=weights,
        gradients=weights,
        optimizer=kept,
        activations=max(0, total - 2 * weights - kept),
        gathered=gathered,
        blocks=sum(isinstance(module, Block) for module in net.modules()),
        flops=counter.get_total_flops() * parts,
        tokens=batch.tokens * parts,
    )


def _back(prepared: Prepared, net: nn.Module, batch: Any, half: bool) -> None:
    """One micro-batch forward and back, as `loop.Trainer` takes it."""
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = prepared.objective(net, batch)
    (loss.total / batch.targets).backward()


def _model(recipe: Recipe) -> dict[str, Any]:
    if recipe.model is None:
        raise ValueError(f"recipe {recipe.name} has several models: plan knows one, so set `model`")
    return recipe.model


def _largest(prepared: Prepared) -> Any:
    """The micro-batch with the most numbers in it, of the first hundred."""
    count = min(100, len(prepared.batches))
    return max((prepared.batches.batch(i) for i in range(count)), key=_numbers)


def _numbers(batch: Any) -> int:
    return sum(value.numel() for value in vars(batch).values() if isinstance(value, Tensor))


def _faked(batch: Any, fake: FakeTensorMode) -> Any:
    tensors = {k: fake.from_tensor(v) for k, v in vars(batch).items() if isinstance(v, Tensor)}
    return replace(batch, **tensors)


def _memory(recipe: Recipe, one: Step, gpus: int) -> dict[str, int]:
    """Bytes by part on one GPU. The best weights so far stay on it, and so does a moving average."""
    cut = gpus if recipe.parallel == "fsdp" else 1
    memory = {
        "weights": one.weights // cut,
        # while the next micro-batch runs, those of the last one are kept whole
        "gradients": one.gradients // (cut if recipe.accumulate == gpus else 1),
        "optimizer": one.optimizer // cut,
        "best weights kept": one.weights // cut,
        "activations": one.activations,
    }
    if recipe.optimizer.ema:
        memory["average"] = one.weights // cut
    if recipe.precision == "pure-bf16":
        memory["bf16 weights and gradients"] = one.weights
    if cut > 1:
        memory["gathered"] = one.gathered
    return memory


def _exchanged(recipe: Recipe, one: Step, gpus: int) -> int:
    """Bytes that each GPU sends in a step: gradients around a ring and back, or weights twice and gradients once for
    every micro-batch."""
    if gpus == 1:
        return 0
    ring = (gpus - 1) / gpus
    if recipe.parallel == "ddp":
        return int(2 * ring * one.weights)
    parts = recipe.accumulate // gpus
    return int(ring * one.weights * (2 * parts + 1))


def _steps(recipe: Recipe, tokens: int, seconds: float) -> int:
    budget = recipe.budget
    if budget.steps is not None:
        return int(budget.steps)
    if budget.tokens is not None:
        return -(-int(budget.tokens) // tokens)
    assert budget.seconds is not None
    return max(1, int(budget.seconds / seconds))
