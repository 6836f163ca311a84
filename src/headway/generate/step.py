"""One decoding step without the modules around it: with one word, looking up parts costs more than multiplying.

The definition is `model.decode(last, memory, pos=pos, state=state)`. `step_of` gives a function that equals it to the
bit: the same calls in the same order, with what does not change from step to step looked up once. A part that it does
not know, or that somebody watches with a hook, stays the module that it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.attend import FULL, explain
from headway.block import Block, Residual, Stack, States
from headway.layers import Dropout, FeedForward, activate
from headway.mask import Mask
from headway.mixers.attention import Attention
from headway.models.seq2seq import Memory, Model
from headway.quantize import Prepared
from headway.state import Cross, KeyValue, State

Apply = Callable[[Tensor], Tensor]
Mix = Callable[[Tensor, Tensor], Tensor]  # of tokens and their positions

CAUSAL = Mask(causal=True)


def step_of(model: Model, memory: Memory, state: States) -> Mix:
    """`step(last, pos)`: the logits `Float[B 1 V]` behind the one new token of each row, `Int[B 1]`, unpadded.

    It holds on to `memory` and the weights: make a new one where rows go over to another source, and for every search.
    """
    decoder = model.decoder if type(model) is Model else None
    if type(decoder) is not Stack or _watched(model) or _watched(decoder):
        return lambda last, pos: model.decode(last, memory, pos=pos, state=state)
    embed, head, place = _bare(model.target), _bare(model.head), decoder.positions.embed
    enter = embed if model.embed_scale == 1 else lambda ids: embed(ids) * model.embed_scale
    leave = head if model.logit_scale == 1 else lambda x: head(x * model.logit_scale)
    first, drop, norm = _bare(decoder.first_norm), _bare(decoder.dropout), _bare(decoder.norm)
    biases: dict[int, Tensor] = {}  # of this step, by how many heads: all layers stand where the others do
    blocks = [_block(block, memory, kept, biases) for block, kept in zip(decoder.blocks, state, strict=True)]

    def step(last: Tensor, pos: Tensor) -> Tensor:
        biases.clear()
        x = drop(first(place(enter(last), pos)))
        for block in blocks:
            x = block(x, pos)
        return leave(norm(x))

    return step


def _block(block: Block, memory: Memory, state: tuple[State | None, State | None], biases: dict[int, Tensor]) -> Mix:
    mixer, cross, feedforward = block.mixer, block.cross, block.feedforward
    parts = [part for part in (mixer, cross, feedforward) if part is not None]
    mask = Mask(valid=memory.valid)
    if type(block) is not Block or _watched(block) or any(type(p) is not Residual or _watched(p) for p in parts):
        return lambda x, pos: block(x, mask=CAUSAL, pos=pos, state=state, context=memory.x, context_mask=mask)
    chain = []
    if mixer is not None:
        chain.append(_residual(mixer, _own(mixer.inner, state[0], memory, biases)))
    if cross is not None:
        chain.append(_residual(cross, _cross(cross.inner, state[1], memory, mask)))
    if feedforward is not None:
        apply = _bare(feedforward.inner)
        chain.append(_residual(feedforward, lambda h, pos: apply(h)))

    def run(x: Tensor, pos: Tensor) -> Tensor:
        for part in chain:
            x = part(x, pos)
        return x

    return run


def _residual(part: Residual, mix: Mix) -> Mix:
    before, behind, after, drop = (_bare(p) for p in (part.before, part.behind, part.after, part.dropout))
    return lambda x, pos: after(x + drop(behind(mix(before(x), pos))))


def _own(mixer: nn.Module, state: State | None, memory: Memory, biases: dict[int, Tensor]) -> Mix:
    """The mixer of the tokens themselves. The newest of them sees all that came before, so that no mask is needed."""
    known = isinstance(mixer, Attention) and _plain(mixer, memory.x, biased=True)
    if not isinstance(mixer, Attention) or type(state) is not KeyValue or state.padded or not known:
        return lambda h, pos: mixer(h, mask=CAUSAL, pos=pos, state=state)
    query, key_value, out = (_bare(m) for m in (mixer.query, mixer.key_value, mixer.out))
    query_norm, key_norm, rotate = _bare(mixer.query_norm), _bare(mixer.key_norm), mixer.positions.rotate
    heads, kv_heads, width, grouped = mixer.heads, mixer.kv_heads, mixer.head_dim, mixer.heads != mixer.kv_heads
    positions, biased, scale = mixer.positions, mixer.positions.biases, mixer.scale

    def mix(h: Tensor, pos: Tensor) -> Tensor:
        rows = h.shape[0]
        q = rotate(query_norm(query(h).view(rows, heads, 1, width)), pos)
        k, v = key_value(h).view(rows, 2, kv_heads, 1, width).unbind(1)
        k, v, k_pos = state.append(rotate(key_norm(k), pos), v, pos, padded=False)
        if biased and heads not in biases:
            biases[heads] = positions.bias(heads, pos, k_pos).to(q.dtype)  # type: ignore[union-attr]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=biases.get(heads), scale=scale, enable_gqa=grouped)
        return out(y.reshape(rows, 1, heads * width))

    return mix


def _cross(mixer: nn.Module, state: State | None, memory: Memory, mask: Mask) -> Mix:
    """The mixer that looks at the source; its first call is the module's, which leaves keys and values behind."""

    def module(h: Tensor, pos: Tensor) -> Tensor:
        return mixer(h, mask=mask, pos=pos, state=state, context=memory.x)

    if not isinstance(mixer, Attention) or type(state) is not Cross or not _plain(mixer, memory.x, mask):
        return module
    query, query_norm, out = _bare(mixer.query), _bare(mixer.query_norm), _bare(mixer.out)
    heads, width, grouped, scale = mixer.heads, mixer.head_dim, mixer.heads != mixer.kv_heads, mixer.scale
    seen = None if memory.valid is None else memory.valid[:, None, None]  # B 1 1 S
    kept: tuple[Tensor, ...] = ()

    def mix(h: Tensor, pos: Tensor) -> Tensor:
        nonlocal kept
        if not state.kept:
            return module(h, pos)
        if not kept:  # what is padding is zeroed as `attend` does it, but once
            kept = state.kept if seen is None else tuple(t.masked_fill(~seen.mT, 0.0) for t in state.kept)
        rows, (k, v) = h.shape[0], kept
        q = query_norm(query(h).view(rows, heads, 1, width))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=grouped)
        return out(y.reshape(rows, 1, heads * width))

    return mix


def _plain(mixer: Attention, x: Tensor, mask: Mask = FULL, *, biased: bool = False) -> bool:
    """Whether one query over the tokens `x` is projections around PyTorch's kernel, and `attend` would take that.

    `biased`: the caller adds the bias of its positions; `mixer.scale` is the caller's to pass in any case.
    """
    if type(mixer) is not Attention or _watched(mixer) or mixer.softcap is not None or mixer.local.window is not None:
        return False
    if mixer.positions.biases and not biased:
        return False
    if mask.valid is not None and not bool(mask.valid.any(1).all()):
        return False  # a row that sees nothing gives zeros
    rows, keys = x.shape[:2]
    none = mixer.query.weight.new_empty(1)
    q, k = none.expand(rows, mixer.heads, 1, mixer.head_dim), none.expand(rows, mixer.kv_heads, keys, mixer.head_dim)
    bias = none.expand(1, mixer.heads, 1, keys) if mixer.positions.biases else None
    return explain(q, k, k, mask, bias=bias).startswith("sdpa")


def _bare(module: nn.Module, inside: Callable[[nn.Module], Apply] | None = None) -> Apply:
    """The function of one tensor that `module` is, or the module itself where it is not one of those known here.

    `inside`: what is asked of the modules in it (default: the same as of itself).
    """
    if _watched(module):
        return module
    kind = type(module)
    if isinstance(module, Prepared):
        return module.forward
    if kind is nn.Identity or (kind is Dropout and not module.training):
        return lambda x: x
    if isinstance(module, nn.Linear) and kind is nn.Linear:
        return partial(F.linear, weight=module.weight, bias=module.bias)
    if isinstance(module, nn.Embedding) and kind is nn.Embedding and module.max_norm is None:
        return partial(torch.embedding, module.weight)
    if isinstance(module, nn.LayerNorm) and kind is nn.LayerNorm:
        shape, weight, bias, eps = module.normalized_shape, module.weight, module.bias, module.eps
        return lambda x: torch.layer_norm(x, shape, weight, bias, eps)
    if isinstance(module, nn.RMSNorm) and kind is nn.RMSNorm:
        return partial(torch.rms_norm, normalized_shape=module.normalized_shape, weight=module.weight, eps=module.eps)
    if isinstance(module, FeedForward) and kind is FeedForward:
        enter, leave, name = *map(inside or _bare, (module.enter, module.leave)), module.activation
        if not module.gated:
            return lambda x: leave(activate(enter(x), name))

        def gated(x: Tensor) -> Tensor:
            gate, h = enter(x).chunk(2, -1)
            return leave(activate(gate, name) * h)

        return gated
    return module


def _watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
