"""Stacks: a model's stacks and heads by name, what enters and leaves their parts, and a model held still."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from headway.block import Stack
from headway.quantize import is_prepared, prepare, restore

# --- names ---


def bare(net: nn.Module) -> Any:
    """The module that `torch.compile` wrapped, or the module itself."""
    return getattr(net, "_orig_mod", net)


def name_of(path: Iterable[str]) -> str:
    """ "text" of towers, text, stack."""
    return ".".join(part for part in path if part not in ("towers", "_orig_mod", "stack", "")) or "stack"


def chosen(names: Iterable[str], name: str | None) -> str:
    """The stack that is meant: the only one, or the decoder, where none is named."""
    there = list(dict.fromkeys(names))
    name = name or ("decoder" if "decoder" in there else there[0] if len(there) == 1 else None)
    if name not in there:
        wish = "say which with stack=" if name is None else f"no stack '{name}'"
        raise ValueError(f"look: {wish}; this model has {', '.join(there) or 'none'}")
    return name


def stack_at(net: nn.Module, name: str | None) -> tuple[str, Any]:
    """A stack and its name, as `Look.places` call it: the only one, or the decoder, where none is named."""
    found = {name_of(path.split(".")): module for path, module in net.named_modules() if isinstance(module, Stack)}
    if not found:
        raise ValueError("look: this module has no stack of blocks: give a model of Headway's")
    name = chosen(found, name)
    return name, found[name]


def head_at(net: Any, name: str | None, every: bool = False) -> str | None:
    """The head that is meant: "lm", or the only one with outputs, where none is named; None where that is unclear.

    `every`: only one that reads every token.
    """
    heads = {key: one.spec for key, one in net.heads.items()}
    fit = [key for key, spec in heads.items() if spec.outputs is not None and (spec.pool == "none" or not every)]
    if name is not None:
        return name if name in fit or not every else None  # the model itself says which heads it has
    return "lm" if "lm" in fit else fit[0] if len(fit) == 1 else None


def check_row(row: int, *states: Tensor) -> None:
    """A ValueError where one of these batches, rows first, has no such row."""
    most = min(len(x) for x in states)
    if not 0 <= row < most:
        raise ValueError(f"look: no row {row}; the rows of this batch are 0 to {most - 1}")


def modules_of(net: nn.Module) -> list[tuple[str, nn.Module]]:
    """`net.named_modules()`, the same in the same order, in a quarter of the time: a look waits for it."""
    found: dict[nn.Module, str] = {}
    ahead = [("", net)]
    while ahead:
        name, module = ahead.pop()
        if module not in found:
            found[module] = name
            within = name + "." if name else ""
            ahead += [(within + key, part) for key, part in reversed(module._modules.items()) if part is not None]
    return [(name, module) for module, name in found.items()]


# --- what enters and leaves ---


def is_compiled(net: nn.Module | list[tuple[str, nn.Module]]) -> bool:
    """Whether `torch.compile` has been asked for it, or for a part of it: compiled code runs no hooks."""
    parts = modules_of(net) if isinstance(net, nn.Module) else net
    return any("_orig_mod" in part._modules or part._compiled_call_impl is not None for _, part in parts)


def eager() -> Any:
    """Inside, what was compiled runs as it was written."""
    return torch.compiler.set_stance("force_eager")


@contextmanager
def before(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    """`hook(module, inputs, named)` runs before the module, inside this context alone."""
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


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


# --- held still ---


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Inside, the model does what it does when it is used; after it, each part is in the mode that it was in."""
    modes = [(module, module.training) for module in net.modules()]
    try:
        net.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def still(net: nn.Module) -> Iterator[None]:
    """Inside, gradients flow through `net` and none is kept for a weight; packed weights are laid out again after."""
    packed, dtype = is_prepared(net), next((p.dtype for p in net.parameters()), torch.float32)
    if packed:
        restore(net)
    kept = [(p, p.requires_grad) for p in net.parameters()]
    on_gpu = any(p.is_cuda for p, _ in kept)
    try:
        net.requires_grad_(False)
        with (
            evaluating(net),
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
        if packed:
            prepare(net, None, dtype)
