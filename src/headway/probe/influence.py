"""Influence: how much each output depends on each input, of anything at all, networks that form no map included.

M_ij = |d y_i / d x_j|, the Frobenius norm of a C x C block of the Jacobian J, from vector-Jacobian products: exactly,
one a channel; or by k random sign vectors u, as E |u^T J|^2 = |J|^2 (Hutchinson 1990), whose relative standard
deviation is at most sqrt(2 / k), and that of the norm about half of it: error = 1 / sqrt(2 k).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from headway.block import Block, Stack
from headway.mask import Mask
from headway.mixers import Mixer
from headway.probe.stacks import bare, check_row, entering, stack_at, still

if TYPE_CHECKING:
    from headway.probe.look import Look

EXACT = 2**11  # products up to which they are counted out: seconds on a CPU
PROBES, FEWEST = 32, 4  # of an output: a short one's, and what they sink to as work demands
TOGETHER = 2**11  # tokens that go through the model at once; a longer input goes alone, block by block
WORK = 2**16  # tokens to go through the model and back: about a minute for MiniLM on one core
BLOCKS = 8  # the fewest that outputs are told in, unless the caller says


class Influence(NamedTuple):
    """map: of each output (rows) and each input, padding left out. block: neighbouring outputs that share a row, which
    has the root of the sum of their squares. error: the relative standard error of an entry, 0 where exact."""

    map: Float[Tensor, "R S"]
    block: int
    error: float


def influence(
    look: Look,
    layer: int | tuple[int, int] | None = None,
    *,
    stack: str | None = None,
    of: str | None = None,
    row: int = 0,
    rows: slice | None = None,
    probes: int | Literal["exact"] | None = None,
    block: int | None = None,
) -> Influence:
    """How much the last hidden states of a stack depend on the embeddings (patches) that enter it.

    layer: of what leaves that layer on what enters it; (a, b): of what leaves layer b on what enters layer a. stack: as
    in `look.map`. of: "source", of a decoder: on what enters the encoder, or with `layer` on what leaves it. row: of a
    batch. rows: the outputs that are wanted. probes: random products an output, or "exact" (default: exact up to 2,048
    products, else 32 a row, 4 for the longest inputs). block: outputs that share a row (default: 1 up to 45 tokens).
    """
    name, body = _part(look.net, stack)
    own = {"stack": "source", "encoder": "source", "decoder": "target"}.get(name, name)
    if of not in (None, own, "source" if name == "decoder" else own):
        raise ValueError(f"influence: '{name}' reads no {of!r} but {own!r}: leave out of, or choose another stack")
    first, last = _layers(layer, name, len(body.blocks))
    whole = layer is None and isinstance(body, Stack)
    with still(look.net):
        enters = body if whole else body.blocks[first]
        given = Alone(*entering(look.rerun, enters)[0], row)

        def chain(x: Tensor, context: Tensor | None = given.context) -> Tensor:
            return _chain(body, (first, last), whole, x, given.named(len(x), context))

        how: Any = (given.x.shape[1], rows, probes, block)
        if of in (None, own):
            return norms(chain, given.x, *how)
        if layer is not None:
            assert given.context is not None
            return norms(lambda c: chain(given.x.expand(len(c), -1, -1), c), given.context, *how)
        _, encoder = stack_at(look.net, "encoder")
        source, ends = Alone(*entering(look.rerun, encoder)[0], row), (0, len(encoder.blocks) - 1)
        encode = lambda x: _chain(encoder, ends, True, x, source.named(len(x), None))
        return norms(lambda x: chain(given.x.expand(len(x), -1, -1), encode(x)), source.x, *how)


def _part(net: Any, stack: str | None) -> tuple[str, Any]:
    """A stack by name; a block or mixer by itself is the one layer of one."""
    net = bare(net)
    return ("stack", SimpleNamespace(blocks=[net])) if isinstance(net, Block | Mixer) else stack_at(net, stack)


class Alone:
    """One row of a call of a stack or block, without its padding, to be made again for copies of it."""

    def __init__(self, x: Tensor, named: dict[str, Any], row: int) -> None:
        check_row(row, x)
        there = named["pos"][row] >= 0
        self.x, self.pos = x[row : row + 1, there], named["pos"][row : row + 1, there]
        self.mask = _without_padding(named["mask"].of(row), there, there)
        self.context: Tensor | None = None
        if named.get("context") is not None:
            mask = named["context_mask"].of(row)
            seen = slice(None) if mask.valid is None else mask.valid[0]
            self.context = named["context"][row : row + 1, seen].detach()
            self.context_mask = _without_padding(mask, there, seen)

    def named(self, copies: int, context: Tensor | None) -> dict[str, Any]:
        """What such a call is given besides its tokens."""
        found = {"mask": _copied(self.mask, copies), "pos": self.pos.expand(copies, -1)}
        if context is None:
            return found
        mask = _copied(self.context_mask, copies)
        return {**found, "context": context.expand(copies, -1, -1), "context_mask": mask}


def _without_padding(mask: Mask, queries: Any, keys: Any) -> Mask:
    cut = lambda t, at: None if t is None else t[:, at]
    return replace(
        mask,
        valid=None,
        segments=cut(mask.segments, queries),
        key_segments=cut(mask.key_segments, keys),
        also=tuple(_without_padding(other, queries, keys) for other in mask.also),
    )


def _copied(mask: Mask, copies: int) -> Mask:
    """The mask of one row for copies of it."""
    each = lambda t: t.expand(copies, *t.shape[1:]) if isinstance(t, Tensor) else t
    return replace(
        mask,
        prefix=each(mask.prefix),
        globals=each(mask.globals),
        segments=each(mask.segments),
        key_segments=each(mask.key_segments),
        also=tuple(_copied(other, copies) for other in mask.also),
    )


def _layers(layer: int | tuple[int, int] | None, name: str, depth: int) -> tuple[int, int]:
    first, last = (0, depth - 1) if layer is None else (layer, layer) if isinstance(layer, int) else layer
    if not 0 <= first <= last < depth:
        asked = f"layer {first}" if first == last else f"layers {first} to {last}"
        raise ValueError(f"influence: no {asked} in '{name}', whose layers are 0 to {depth - 1}")
    return first, last


def _chain(body: Any, ends: tuple[int, int], whole: bool, x: Tensor, named: dict[str, Any]) -> Tensor:
    """Layers one after the other, as in `Stack.forward`; of a long input, what is inside of one at a time is kept."""
    alone = x.shape[0] * x.shape[1] > TOGETHER
    if whole:
        x = body.first_norm(body.positions.embed(x, named["pos"]))
    for block in body.blocks[ends[0] : ends[1] + 1]:
        x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, **named) if alone else block(x, **named)
    return body.norm(x) if whole else x


def norms(
    outputs: Callable[[Tensor], Tensor],
    x: Float[Tensor, "1 S C"],
    queries: int,
    rows: slice | None,
    probes: int | Literal["exact"] | None,
    block: int | None,
) -> Influence:
    """Products for several outputs at once, each on a copy of the input."""
    keys, channels = x.shape[1:]
    wanted = list(range(queries)[rows or slice(None)])
    if not wanted or (block is not None and block < 1) or (isinstance(probes, int) and probes < 1):
        raise ValueError(
            f"influence: rows={rows} of {queries} outputs, probes={probes}, block={block}: one or more each"
        )
    if probes == "exact" or (probes is None and len(wanted) <= EXACT):
        with torch.no_grad():
            channels = outputs(x).shape[2]  # the outputs', which a mixer by itself may have more of than inputs
    exact = probes == "exact" or (probes is None and len(wanted) * channels <= EXACT)
    each = channels if exact else PROBES if not isinstance(probes, int) else probes
    if not exact:
        block, each = _affordable(len(wanted), max(keys, queries), block, each, asked=probes is not None)
    block = block or 1
    groups = [wanted[i : i + block] for i in range(0, len(wanted), block)]
    products = (len(wanted) if exact else len(groups)) * each
    rounds = -(-products // max(1, TOGETHER // max(keys, queries)))
    copies = -(-products // rounds)
    leaf = x.expand(copies, -1, -1).clone().requires_grad_()
    y = outputs(leaf)
    found = torch.zeros(len(groups), keys, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for at, vectors in _products(groups, exact, each, copies, y):
        gradient = torch.autograd.grad(y, leaf, vectors, retain_graph=True)[0][: len(at)]
        found.index_add_(0, at, gradient.to(found.dtype).square().sum(-1))
    return Influence((found if exact else found / each).sqrt(), block, 0.0 if exact else (2 * each) ** -0.5)


def _affordable(outputs: int, tokens: int, block: int | None, probes: int, *, asked: bool) -> tuple[int, int]:
    """Outputs a row, a power of two, and probes an output, that keep the work within bounds as far as may be."""
    size = block or 1
    work = lambda: -(-outputs // size) * probes * tokens
    while block is None and work() > WORK and outputs > BLOCKS * size:
        size *= 2
    while not asked and work() > WORK and probes > FEWEST:
        probes //= 2
    return size, probes


def _products(
    groups: list[list[int]], exact: bool, each: int, copies: int, y: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Which row each product is for, and the vectors of as many products as there are copies."""
    random = torch.Generator().manual_seed(0)
    todo: list[tuple[int, Any, int | None]]
    if exact:
        todo = [(i, token, c) for i, tokens in enumerate(groups) for token in tokens for c in range(each)]
    else:
        todo = [(i, tokens, None) for i, tokens in enumerate(groups) for _ in range(each)]
    for start in range(0, len(todo), copies):
        part = todo[start : start + copies]
        vectors = torch.zeros_like(y)
        for copy, (_, tokens, channel) in enumerate(part):
            if channel is None:
                signs = torch.randint(0, 2, (len(tokens), y.shape[2]), generator=random) * 2 - 1
                vectors[copy, tokens] = signs.to(y)
            else:
                vectors[copy, tokens, channel] = 1
        yield torch.tensor([i for i, _, _ in part], device=y.device), vectors
