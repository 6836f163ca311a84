"""Stacks: a model's stacks by name, what enters and leaves their parts, and a model held still under gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from headway.block import Stack
from headway.probe.capture import before, eager, is_compiled
from headway.quantize import is_prepared, prepare, restore


def stack_at(net: nn.Module, name: str | None) -> tuple[str, Any]:
    """A stack and its name, as `Look.places` call it: the only one, or the decoder, where none is named."""
    found = {_name(path): module for path, module in net.named_modules() if isinstance(module, Stack)}
    if not found:
        raise ValueError("probe: this module has no stack of blocks: give a model of Headway's")
    wanted = name or ("decoder" if "decoder" in found else next(iter(found)) if len(found) == 1 else None)
    if wanted not in found:
        wish = "say which with stack=" if wanted is None else f"no stack '{wanted}'"
        raise ValueError(f"probe: {wish}; this model has {', '.join(found)}")
    return wanted, found[wanted]


def _name(path: str) -> str:
    """ "text" of "towers.text.stack"."""
    parts = [part for part in path.split(".") if part not in ("towers", "_orig_mod", "stack", "")]
    return ".".join(parts) or "stack"


def entering(run: Callable[[], Any], *modules: nn.Module) -> list[tuple[Tensor, dict[str, Any]]]:
    """What is the first input of each of these modules, and by name the others, while `run` runs."""
    found: dict[nn.Module, tuple[Tensor, dict[str, Any]]] = {}
    with ExitStack() as hooks:
        for module in modules:
            keep = lambda module, inputs, named: found.__setitem__(module, (inputs[0].detach(), named))
            hooks.enter_context(before(module, keep))
        with torch.no_grad():
            run()
    return [found[module] for module in modules]


def leaving(run: Callable[[], Any], modules: Iterable[nn.Module]) -> tuple[list[Tensor], Any]:
    """What each of these modules gives while `run` runs, and what `run` gives."""
    modules = list(modules)
    found: dict[nn.Module, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda module, inputs, output: found.__setitem__(module, output))
        for module in modules
    ]
    try:
        output = run()
    finally:
        for handle in handles:
            handle.remove()
    return [found[module] for module in modules], output


@contextmanager
def still(net: nn.Module) -> Iterator[None]:
    """Inside, gradients flow through `net` and none is kept for a weight; packed weights are laid out again after."""
    packed, dtype = is_prepared(net), next((p.dtype for p in net.parameters()), torch.float32)
    if packed:
        restore(net)
    kept = [(p, p.requires_grad) for p in net.parameters()]
    modes = [(module, module.training) for module in net.modules()]
    on_gpu = any(p.is_cuda for p, _ in kept)
    try:
        net.requires_grad_(False).eval()
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.backends.cudnn.flags(enabled=False)
            if on_gpu
            else nullcontext(),  # its RNNs differentiate in training
            eager() if is_compiled(net) else nullcontext(),
        ):
            yield
    finally:
        for parameter, wanted in kept:
            parameter.requires_grad_(wanted)
        for module, mode in modes:
            module.training = mode
        if packed:
            prepare(net, None, dtype)
