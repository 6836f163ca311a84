"""A decoder's step without the modules around it: with one token, looking up parts costs more than multiplying.

The definition is `net(last, pos=pos, state=state)`. What `step_of` flattens to the bit is flattened further here, to
rounding: root-mean-square norms in one pass, queries and keys turned together, their positions remembered once for all
layers. A block that is not known here, or that somebody watches with a hook, stays the module that it is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.block import Block, Residual, Stack, States
from headway.generate import step as flat
from headway.joint import Part
from headway.mixers.attention import Attention
from headway.models import decoder
from headway.positions import Learned, Positions, Rotary
from headway.quantize import CHUNK, Int8Linear, Prepared
from headway.state import KeyValue, State

Apply = Callable[[Tensor], Tensor]
Turns = tuple[Tensor, Tensor] | None  # cos and signed sin of the new token's angles, or nothing to turn


def step_of(net: decoder.Model, state: States, rows: int) -> Callable[[Tensor, Tensor], Tensor]:
    """`step(ids, pos)`: the hidden states `Float[B 1 C]` of the one new token of each row, `Int[B 1]`, unpadded.

    It holds on to the weights and the state: make a new one for every stream, and where rows leave or change places.
    """
    stack = net.stack
    schemes = (Positions, Learned, Rotary)
    if type(net) is not decoder.Model or type(stack) is not Stack or _watched(net, stack, net.embedding):
        return lambda ids, pos: net(ids, pos=pos, state=state)
    if type(stack.positions) not in schemes or _watched(stack.positions):
        return lambda ids, pos: net(ids, pos=pos, state=state)
    embed, place, drop = _bare(net.embedding), stack.positions.embed, _bare(stack.dropout)
    first, last = _bare(stack.first_norm), _bare(stack.norm)
    rotary = stack.positions if isinstance(stack.positions, Rotary) else None
    kept: list[KeyValue] = []
    blocks = [_block(block, past, rows, kept) for block, past in zip(stack.blocks, state, strict=True)]

    def step(ids: Int[Tensor, "B 1"], pos: Int[Tensor, "B 1"]) -> Float[Tensor, "B 1 C"]:
        if kept:
            _remember(kept, pos)
        x = drop(first(place(embed(ids), pos)))
        turns = None if rotary is None else _turns(rotary, pos, x.dtype)
        for block in blocks:
            x = block(x, pos, turns)
        return last(x)

    return step


def _remember(kept: list[KeyValue], pos: Tensor) -> None:
    """Makes room for one token in each state and writes its position, which is the same in all, once."""
    for state in kept:
        state.reserve(1)
        state.pos = kept[0].pos
    assert kept[0].pos is not None
    kept[0].pos.narrow(1, kept[0].length, 1).copy_(pos)


def _turns(rotary: Rotary, pos: Tensor, dtype: torch.dtype) -> Turns:
    angles = pos[:, None, :, None].float() * rotary.rates
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def _block(
    block: Block, state: tuple[State | None, State | None], rows: int, kept: list[KeyValue]
) -> Callable[[Tensor, Tensor, Turns], Tensor]:
    mixer, feedforward = block.mixer, block.feedforward
    parts = [part for part in (mixer, feedforward) if part is not None]
    known = type(block) is Block and block.cross is None and mixer is not None and not _watched(block, *parts)
    if not known or any(type(part) is not Residual for part in parts):
        return lambda x, pos, turns: block(x, mask=flat.CAUSAL, pos=pos, state=state)
    assert mixer is not None
    mix = _own(mixer.inner, state[0], rows, kept)
    before, after = _around(mixer)
    if feedforward is None:
        return lambda x, pos, turns: after(x, mix(before(x), pos, turns))
    enter, leave = _around(feedforward)
    apply = _bare(feedforward.inner, rows)

    def run(x: Tensor, pos: Tensor, turns: Turns) -> Tensor:
        x = after(x, mix(before(x), pos, turns))
        return leave(x, apply(enter(x)))

    return run


def _around(part: Residual) -> tuple[Apply, Callable[[Tensor, Tensor], Tensor]]:
    """What a residual does before its inner part, and with what comes out of it."""
    before, behind, after, drop = (_bare(p) for p in (part.before, part.behind, part.after, part.dropout))
    if all(type(p) is nn.Identity for p in (part.behind, part.after)) and not part.training:
        return before, torch.add
    return before, lambda x, y: after(x + drop(behind(y)))


def _own(
    mixer: nn.Module, state: State | None, rows: int, kept: list[KeyValue]
) -> Callable[[Tensor, Tensor, Turns], Tensor]:
    """The newest token sees all that came before, so that no mask is needed. States that it writes join `kept`."""
    sample = torch.empty(1).expand(rows, 1, 1)
    if (
        not isinstance(mixer, Attention)
        or type(state) is not KeyValue
        or state.padded
        or state.k is None
        or any(state.length != other.length or state.capacity != other.capacity for other in kept[:1])
        or not flat._plain(mixer, sample)
    ):
        return lambda h, pos, turns: mixer(h, mask=flat.CAUSAL, pos=pos, state=state)
    kept.append(state)
    project, out = _projection(mixer, rows), _bare(mixer.out, rows)
    query_norm, key_norm = _bare(mixer.query_norm), _bare(mixer.key_norm)
    normed = not isinstance(mixer.query_norm, nn.Identity)
    heads, kv_heads, width, inner = mixer.heads, mixer.kv_heads, mixer.head_dim, mixer.heads * mixer.head_dim
    both, half, scale = heads + kv_heads, width // 2, mixer.scale

    def mix(h: Tensor, pos: Tensor, turns: Turns) -> Tensor:
        x = project(h).view(rows, both + kv_heads, 1, width)
        qk = x.narrow(1, 0, both)
        if normed:
            qk = torch.cat([query_norm(x.narrow(1, 0, heads)), key_norm(x.narrow(1, heads, kv_heads))], 1)
        if turns is not None:
            qk = qk.mul(turns[0]).addcmul_(qk.roll(half, -1), turns[1])
        k, v, at = state.k, state.v, state.length
        assert k is not None and v is not None
        k.narrow(2, at, 1).copy_(qk.narrow(1, heads, kv_heads))
        v.narrow(2, at, 1).copy_(x.narrow(1, both, kv_heads))
        state.length = at + 1
        q = qk.narrow(1, 0, heads).view(rows, kv_heads, heads // kv_heads, width)  # those of one key side by side
        y = F.scaled_dot_product_attention(q, k.narrow(2, 0, at + 1), v.narrow(2, 0, at + 1), scale=scale)
        return out(y.reshape(rows, 1, inner))

    return mix


def _projection(mixer: Attention, rows: int) -> Apply:
    """Queries, keys and values side by side."""
    query, key_value = mixer.query, mixer.key_value
    if isinstance(query, Part) and isinstance(key_value, Part) and not _watched(query, key_value, query.joint):
        return _bare(query.joint.whole, rows)
    of_queries, of_rest = _bare(query, rows), _bare(key_value, rows)
    return lambda h: torch.cat([of_queries(h), of_rest(h)], -1)


def _bare(module: nn.Module, rows: int = 0) -> Apply:
    """The function of one tensor that `module` is; beyond what is exact, a root-mean-square norm in one pass."""
    if isinstance(module, Prepared) and not _watched(module):
        if isinstance(module, Int8Linear) and 0 < rows <= CHUNK and module.weight.dtype == torch.float32:
            return module.of_one if rows == 1 else _of_rows(module, rows)
        return module.forward
    if type(module) is not nn.RMSNorm or _watched(module) or module.weight is None:
        return flat._bare(module, lambda part: _bare(part, rows))
    width = module.normalized_shape[0]
    eps = torch.finfo(module.weight.dtype).eps if module.eps is None else module.eps
    double, shape = torch.cat([module.weight, module.weight]), (2 * width,)

    def rms(x: Tensor) -> Tensor:  # x beside -x has the mean 0, and so the mean square of x for its variance
        return torch.layer_norm(torch.cat([x, -x], -1), shape, double, None, eps)[..., :width]

    return rms


def _of_rows(module: Int8Linear, rows: int) -> Apply:
    apply, inputs, outputs = module.of_some, module.in_features, module.out_features
    return lambda x: apply(x.reshape(rows, inputs)).view(rows, 1, outputs)


def _watched(*modules: nn.Module) -> bool:
    return any(flat._watched(module) for module in modules)
