"""Linear recurrences with decay: a matrix a head sums up the past, S_t = diag(exp(decay_t)) S_{t-1} + k_t v_t^T,
y_t = S_t^T q_t (2006.16236; a decay a head: 2307.08621, 2405.21060; a decay a key channel: 2312.06635), and the delta
rule, which first takes away what S already says of k_t (2406.06484; with decay 2412.06464).

`stepwise` and `delta_stepwise` are the definitions, token by token. `recur` and `delta` compute the same in chunks:
dense products within a chunk, one carried state between chunks. No exponent is ever above zero.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

CHUNK, SHORT = 64, 32  # tokens of a chunk; under the delta rule, whose inside costs more than what is carried on
RUN = 512  # tokens at a time on a CPU: what is made of them stays in the cache, in memory used before
FORGOTTEN = -1e4  # exp of it is 0 in every precision, and unlike -inf it has differences


def stepwise(
    q: Float[Tensor, "B G T K"],
    k: Float[Tensor, "B G T K"],
    v: Float[Tensor, "B H T V"],
    *,
    decay: Float[Tensor, "B H T"] | Float[Tensor, "B H T K"] | None = None,
    state: Float[Tensor, "B H K V"] | None = None,
) -> tuple[Float[Tensor, "B H T V"], Float[Tensor, "B H K V"]]:
    """The definition. Returns the outputs and the last S.

    `decay` is a log, <= 0: a number a head and token, or one a key channel. G is H, or 1: one q and k for all heads.
    """
    s = _empty(k, v) if state is None else state
    keep = None if decay is None else (decay if decay.ndim == 4 else decay[..., None]).exp().to(s.dtype)
    shares = itertools.repeat(None) if keep is None else keep.unbind(2)
    y = []
    for query, key, value, share in zip(q.unbind(2), k.unbind(2), v.unbind(2), shares, strict=False):
        s = s if share is None else share[..., None] * s
        s = s + key[..., None] * value[..., None, :]
        y.append((query[..., None, :].to(s.dtype) @ s).to(v.dtype))
    return torch.cat(y, 2), s


def recur(
    q: Float[Tensor, "B G T K"],
    k: Float[Tensor, "B G T K"],
    v: Float[Tensor, "B H T V"],
    *,
    decay: Float[Tensor, "B H T"] | Float[Tensor, "B H T K"] | None = None,
    state: Float[Tensor, "B H K V"] | None = None,
    chunk: int | None = None,
) -> tuple[Float[Tensor, "B H T V"], Float[Tensor, "B H K V"]]:
    """`stepwise`, in chunks of at most `chunk` tokens: time and memory grow with T, and T = 1 is one step."""
    length, channel = q.shape[2], False
    if length == 1:
        return stepwise(q, k, v, decay=decay, state=state)
    if decay is not None and decay.ndim == 4:
        q, k, channel = q.expand(decay.shape), k.expand(decay.shape), True
    size = _chunk_size(length, chunk or CHUNK, channel)
    outputs = []
    for part in _runs(size, q, k, v, decay):
        y, state = _run(state, size, *part)
        outputs.append(y)
    assert state is not None  # there is a run
    return _joined(outputs, length), state


def _run(
    state: Tensor | None, size: int, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None
) -> tuple[Tensor, Tensor]:
    whole = v.shape[2] % size == 0
    q, k, v = _chunks(q, size), _chunks(k, size), _chunks(v, size, copy=q.shape[1] == v.shape[1])
    if decay is None:
        y = (q @ k.mT).tril_() @ v
        read, last = _between(q, k, v, None, state)
    elif decay.ndim == 4:
        scores, since, until, keep = _by_channel(q, k, _chunks(decay, size))
        y = scores.to(v.dtype) @ v
        read, last = _between(since, until, v, keep, state)
    else:
        if decay.stride(2) == 0 and whole and not (decay.requires_grad and torch.is_grad_enabled()):
            decay = decay[:, :, :size]  # the same of all tokens, so of all chunks
        within, since, until = _by_head(_chunks(decay, size))
        y = (within.to(q.dtype) * (q @ k.mT)) @ v
        read, last = _between(q, k, v * until.to(v.dtype), since[..., -1:, :], state)
        return (y if read is None else y.addcmul_(since.to(y.dtype), read)).flatten(2, 3), last
    return (y if read is None else y.add_(read)).flatten(2, 3), last


def delta_stepwise(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T V"],
    beta: Float[Tensor, "B H T"],
    *,
    decay: Float[Tensor, "B H T"] | None = None,
    state: Float[Tensor, "B H K V"] | None = None,
) -> tuple[Float[Tensor, "B H T V"], Float[Tensor, "B H K V"]]:
    """The definition: S_t = exp(decay_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, y_t = S_t^T q_t."""
    s = _empty(k, v) if state is None else state
    strength = beta[..., None, None].to(s.dtype)
    shares = itertools.repeat(None) if decay is None else decay[..., None, None].exp().to(s.dtype).unbind(2)
    y = []
    for *token, much, share in zip(q.unbind(2), k.unbind(2), v.unbind(2), strength.unbind(2), shares, strict=False):
        query, key, value = (x[..., None, :].to(s.dtype) for x in token)
        s = s if share is None else share * s
        s = s + key.mT * (much * (value - key @ s))
        y.append((query @ s).to(v.dtype))
    return torch.cat(y, 2), s


def delta(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T V"],
    beta: Float[Tensor, "B H T"],
    *,
    decay: Float[Tensor, "B H T"] | None = None,
    state: Float[Tensor, "B H K V"] | None = None,
    chunk: int = SHORT,
) -> tuple[Float[Tensor, "B H T V"], Float[Tensor, "B H K V"]]:
    """`delta_stepwise`, in chunks.

    Within a chunk S_i = g_i S_0 + sum_{j<=i} g_i/g_j k_j u_j^T, where g_i is the decay since the chunk began and the
    u solve a triangular system, u_i = beta_i (v_i - g_i S_0^T k_i - sum_{j<i} g_i/g_j (k_i k_j) u_j): the UT transform.
    """
    length, dtype = q.shape[2], v.dtype
    if length == 1:
        return delta_stepwise(q, k, v, beta, decay=decay, state=state)
    size = _chunk_size(length, chunk, False)
    decay = beta.new_zeros(()).expand(beta.shape) if decay is None else decay
    outputs = []
    for part in _runs(size, q, k, v, beta, decay):
        y, state = _delta_run(state, *(_chunks(t, size).to(_wide(v)) for t in part))
        outputs.append(y)
    assert state is not None  # there is a run
    return _joined(outputs, length).to(dtype), state


def _delta_run(
    state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor
) -> tuple[Tensor, Tensor]:
    within, since, until = _by_head(decay)
    beta = beta[..., None]
    owed = beta * k
    system = (owed @ k.mT) * within  # its diagonal is never read: taken as ones
    one = torch.eye(k.shape[-2], dtype=system.dtype, device=k.device).expand_as(system)
    # The inverse is safe: its entries are what is left of a key once later keys were taken away, shares of one.
    solve = torch.linalg.solve_triangular(system, one, upper=False, unitriangular=True)
    wanted, said = solve @ (beta * v), None
    if state is not None or k.shape[2] > 1:  # what S_0 already says matters only where there is an S_0
        said = solve @ (since * owed)
    entering, last, u = _corrected(wanted, said, (k * until).mT, since[..., -1, :, None], state)
    y = (within * (q @ k.mT)) @ u
    return (y if entering is None else y + (q * since) @ entering).flatten(2, 3), last


def flops(
    length: int, heads: int, key_dim: int, value_dim: int, kind: str, *, shared: bool = False, chunk: int | None = None
) -> int:
    """Of the matrix products, from no state. `kind` is the decay, one of none, same (of all tokens, a head), fixed (a
    head, and not learned), head, channel, or it is delta; `shared`: one q and k for all heads."""
    update = heads * key_dim * value_dim  # a token written to the state, or read from it
    if length == 1:
        return 2 * update * (2 if kind == "delta" else 1)
    size = _chunk_size(length, chunk or _usual(kind), kind == "channel")
    count = -(-length // size)
    scores = size * size * key_dim * (1 if shared and kind != "channel" else heads)
    if kind == "channel":
        scores = heads * sum(size * half * key_dim // 2 for half in _halvings(size) if half > 1)
    if kind == "delta":
        scores = 2 * scores + heads * size * size * (value_dim + (key_dim if count > 1 else 0))
    products = count * (scores + size * (heads * size * value_dim + update))
    if count > 1:  # reading the states that enter the chunks; the first of them is nothing to correct
        products += size * update * (count + (count - 1 if kind == "delta" else 0))
    return 2 * products


def kept_bytes(
    length: int, heads: int, key_dim: int, value_dim: int, kind: str, *, shared: bool = False, chunk: int | None = None
) -> int:
    """What autograd keeps of such a call for the way back, about, in single precision."""
    size = _chunk_size(length, chunk or _usual(kind), kind == "channel")
    groups = 1 if shared and kind != "channel" else heads
    squares = {
        "same": heads * (1 + size / min(max(length, size), RUN)),
        "fixed": 2 * heads,
        "head": 2 * heads + groups,
        "delta": 6 * heads,
    }.get(kind, heads)  # C x C
    rows = {"channel": heads * (5 + 2 * len(_halvings(size))), "delta": 4 * heads}.get(kind, 2 * groups)  # C x K
    values = heads * {"same": 2, "fixed": 2, "head": 2, "delta": 4}.get(kind, 1)  # C x V
    states = 0
    if length > size:
        rows += heads * {"channel": 1, "delta": 3}.get(kind, 0)
        values += heads if kind == "head" else 0
        states = heads * key_dim * value_dim * (1 if kind == "none" else 2) // size
    return int(4 * length * (squares * size + rows * key_dim + values * value_dim + states))


class Steps(nn.Module):
    """Data-dependent steps and the decay they bring: step = softplus(x + bias), decay = -exp(a_log) step, one a head.

    It starts as Mamba does (2312.00752, section 3.6; 2405.21060): steps log-uniform from 0.001 to 0.1 and rates from
    1 to 16, so that the heads remember over very different spans. A start at zero would have them all forget alike.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        step = torch.exp(torch.empty(heads).uniform_(math.log(0.001), math.log(0.1)))
        self.a_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus of it is `step`

    def forward(self, x: Float[Tensor, "B T H"]) -> tuple[Float[Tensor, "B H T"], Float[Tensor, "B H T"]]:
        """Steps and decays, in single precision at least: a decay acts through sums over all of the past."""
        step = F.softplus(x.to(_wide(x)) + self.bias).transpose(1, 2)
        return step, -self.a_log.exp()[:, None] * step


def restart(decay: Tensor, segments: Int[Tensor, "B T"]) -> Tensor:
    """`decay` with everything forgotten where a packed sequence starts; each stands in one piece."""
    first = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    return decay.masked_fill(first[:, None] if decay.ndim == 3 else first[:, None, :, None], FORGOTTEN)


# --- Chunks, and the decays within one


def _usual(kind: str) -> int:
    return SHORT if kind == "delta" else CHUNK


def _runs(size: int, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Runs of at least two chunks, those of each tensor side by side; None stays None. All is one run on a GPU, which
    has no use for parts."""
    first = tensors[0]
    assert first is not None
    most = max(RUN // size, 2) * size if first.device.type == "cpu" else first.shape[2]
    parts = [itertools.repeat(None) if t is None else t.split(most, 2) for t in tensors]
    return zip(*parts, strict=False)


def _joined(parts: list[Tensor], length: int) -> Tensor:
    """One after the other, a token's heads side by side in memory as whoever reads them next wants them."""
    y = parts[0] if len(parts) == 1 else torch.cat([part.transpose(1, 2) for part in parts], 1).transpose(1, 2)
    return y[:, :, :length]


def _chunk_size(length: int, most: int, halved: bool) -> int:
    """As few chunks as `most` allows, as even as can be; a power of two where a chunk is halved again and again."""
    if halved:
        return min(1 << (length - 1).bit_length(), 1 << (most.bit_length() - 1))
    return -(-length // -(-length // most))


def _chunks(t: Tensor, size: int, copy: bool = True) -> Tensor:
    """B H T ... as B H N C ..., filled up with zeros, which add nothing to a sum and decay nothing.

    `copy` to one piece: a batched product would copy a view each time.
    """
    if short := -t.shape[2] % size:
        t = F.pad(t, (0, 0) * (t.ndim - 3) + (0, short))
    t = t.unflatten(2, (-1, size))
    return t.contiguous() if copy else t


def _by_head(decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp of the sum of `decay` (B H N C) over j < t <= i (C x C, zero above the diagonal), over t <= i, over t > j.

    A difference of two sums: in double precision, because what a strong decay adds to both must cancel.
    """
    total = decay.double().cumsum(-1)
    gap = (total[..., :, None] - total[..., None, :]).to(_wide(decay))
    ahead = torch.ones(gap.shape[-2:], dtype=torch.bool, device=gap.device).triu(1)
    since, until = total[..., None].exp(), (total[..., -1:] - total)[..., None].exp()
    return gap.masked_fill_(ahead, float("-inf")).exp_(), since.to(gap.dtype), until.to(gap.dtype)


def _by_channel(q: Tensor, k: Tensor, decay: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The decayed scores within each chunk (C x C), queries decayed since its start and keys until its end (C x K), and
    what outlives the chunk (K x 1).

    A decay a key channel does not leave the sum over channels, so it is split at the middle of ever larger blocks: a
    query decays since the middle and a key until the middle. These are products of shares, exp of each token's decay:
    no quotient is among them, and none is above one.
    """
    share = decay.to(_wide(decay)).exp()
    scores = (q * k).sum(-1).diag_embed()
    since, until = share * q, k.to(share.dtype, copy=True)
    for half in reversed(_halvings(q.shape[-2])):
        late, early = since.unflatten(-2, (-1, 2, half))[..., 1, :, :], until.unflatten(-2, (-1, 2, half))[..., 0, :, :]
        late, early = late.to(q.dtype), early.to(q.dtype)
        across = late @ early.mT if half > 1 else (late * early).sum(-1, keepdim=True)
        blocks = scores.unflatten(-1, (-1, 2 * half)).unflatten(-3, (-1, 2 * half)).diagonal(dim1=-4, dim2=-2)
        blocks[..., half:, :half, :] = across.movedim(-3, -1)
        before, after = share.unflatten(-2, (-1, 2)).unbind(-2)
        since, until, share = _faded(since, half, 1, before), _faded(until, half, 0, after), before * after
    return scores, since.to(q.dtype), until.to(q.dtype), share.mT


def _faded(t: Tensor, half: int, which: int, share: Tensor) -> Tensor:
    """`t` with the first or second half of each block times a share; overwritten where no way back asks for it."""
    halves = t.unflatten(-2, (-1, 2, half))
    if not torch.is_grad_enabled():
        halves.select(-3, which).mul_(share[..., None, :])
        return t
    parts = list(halves.unbind(-3))
    parts[which] = parts[which] * share[..., None, :]
    return torch.stack(parts, -3).flatten(-4, -2)


def _halvings(size: int) -> list[int]:
    return [size >> i for i in range(1, size.bit_length())]


# --- From chunk to chunk


def _between(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, state: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """What the queries read of the states that enter their chunks, None for none at all, and the last state.

    Where heads share a key, they are columns of one product.
    """
    shared, heads = k.shape[1] < v.shape[1], v.shape[1]
    if shared:
        keep = keep if keep is None else _columns(keep.expand(*keep.shape[:-1], v.shape[-1]))
        v, state = _columns(v), None if state is None else _columns(state[:, :, None])[:, :, 0]
    entering, last = _carry(k.mT @ v, keep, state)
    read = None if entering is None else q @ entering.to(q.dtype)
    if shared:
        read, last = None if read is None else _split(read, heads), _split(last[:, :, None], heads)[:, :, 0]
    return read, last


def _columns(t: Tensor) -> Tensor:
    """B H N C V as B 1 N C HV. Where heads came side by side in memory, as from a linear map, nothing is copied."""
    return t.movedim(1, 3).flatten(3)[:, None]


def _split(t: Tensor, heads: int) -> Tensor:
    """And back."""
    return t[:, 0].unflatten(3, (heads, -1)).movedim(3, 1)


def _carry(updates: Tensor, keep: Tensor | None, state: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """The states that enter the chunks and the last one; a share `keep` outlives each chunk, or all."""
    updates, count = updates.to(_wide(updates)), updates.shape[2]
    s = torch.zeros_like(updates[:, :, 0]) if state is None else state.to(updates.dtype)
    shares = itertools.repeat(None) if keep is None else keep.expand(-1, -1, count, -1, -1).unbind(2)
    room = None if torch.is_grad_enabled() else torch.empty_like(updates)  # a way back needs each state for itself
    slots, entering = [None] * count if room is None else [*room.unbind(2)[1:], None], [s]
    for update, share, slot in zip(updates.unbind(2), shares, slots, strict=False):
        s = torch.add(update, s, out=slot) if share is None else torch.addcmul(update, share, s, out=slot)
        entering.append(s)
    if state is None and count == 1:
        return None, s
    if room is None:
        return torch.stack(entering[:-1], 2), s
    room[:, :, 0] = entering[0]
    return room, s


def _corrected(
    wanted: Tensor, said: Tensor | None, keys: Tensor, keep: Tensor, state: Tensor | None
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The same under the delta rule, and the u of each chunk: what is `wanted` less what the state `said`."""
    if said is None:
        return None, (keys @ wanted)[:, :, 0], wanted
    heads, u = wanted.shape[:2], []
    s = wanted.new_zeros(*heads, keys.shape[-2], wanted.shape[-1]) if state is None else state.to(wanted.dtype)
    steps = zip(*(t.flatten(0, 1).unbind(1) for t in (wanted, said, keys, keep)), strict=True)
    entering, s = [], s.flatten(0, 1)
    for n, (want, say, key, share) in enumerate(steps):
        entering.append(s)
        u.append(torch.baddbmm(want, say, s, alpha=-1) if n or state is not None else want)
        s = torch.addcmul(torch.bmm(key, u[-1]), share, s)
    first, second = (torch.stack(each, 1).unflatten(0, heads) for each in (entering, u))
    return first, s.unflatten(0, heads), second


def _wide(t: Tensor) -> torch.dtype:
    """What is summed over all of the past is kept in single precision at least."""
    return torch.promote_types(t.dtype, torch.float32)


def _empty(k: Tensor, v: Tensor) -> Tensor:
    return v.new_zeros(*v.shape[:2], k.shape[-1], v.shape[-1], dtype=_wide(v))
