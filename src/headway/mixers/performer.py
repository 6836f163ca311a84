"""Performer: attention by random features, in time linear in the tokens: FAVOR+ (arXiv 2009.14794).

exp(q k / sqrt(D)) = E[phi(q) phi(k)], phi_j(x) = exp(w_j x' - |x'|^2 / 2), x' = x / D^(1/4), w_j Gaussian, so that
y_t = sum_s phi(q_t) phi(k_s) v_s / sum_s phi(q_t) phi(k_s) asks only for sums of phi(k_s) [v_s 1] over the keys.
Whatever scales all features of a query, or one feature of all keys and inversely of all queries, cancels in the ratio.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headway.attend import weights
from headway.layers import residual_output
from headway.mask import Mask
from headway.mixers import RUN, Cost, Implied, Mixer, linear_map, of_run, without_padding
from headway.positions import Positions, Rotary
from headway.recurrence import flops, kept_bytes, recur
from headway.spec import Size
from headway.state import Cross, Recurrent, State

EPSILON = 1e-3  # added to ReLU features, so that none is ever zero (the paper's kernel epsilon)
LEAST = 1e-24  # far below rounding: what a token weighs to itself where every product of features underflows
BLOCK = 512  # tokens at a time: features then stay in the cache, and no great memory is asked for anew at every call
LOWEST = -1e30  # stands for log 0 where infinity less infinity would be no number


def reference(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B H S D"],
    v: Float[Tensor, "B H S D"],
    projection: Float[Tensor, "M D"],
    kernel: str,
    allowed: Bool[Tensor, "#B 1 #T S"],
) -> Float[Tensor, "B H T D"]:
    """The definition, every pair of tokens written out; a query that may see nothing gives zeros."""
    shares = (features(q, projection, kernel) @ features(k, projection, kernel).mT).masked_fill(~allowed, 0.0)
    total = shares.sum(-1, keepdim=True)
    return shares @ v / torch.where(total > 0, total, 1.0)


def features(x: Float[Tensor, "B H T D"], projection: Float[Tensor, "M D"], kernel: str) -> Float[Tensor, "B H T M"]:
    """phi(x), whose products are the kernel: positive, unbiased for softmax; or ReLU (section 2.2, generalized)."""
    x = x * x.shape[-1] ** -0.25
    h = x @ projection.T
    if kernel == "relu":
        return h.relu() + EPSILON
    return (h - x.square().sum(-1, keepdim=True) / 2).exp() / math.sqrt(projection.shape[0])


def orthogonal(rows: int, columns: int) -> Float[Tensor, "M D"]:
    """Gaussian vectors that are orthogonal within each block of `columns` rows: directions uniform, lengths chi."""
    squares, uppers = torch.linalg.qr(torch.randn(-(-rows // columns), columns, columns))
    signs = uppers.diagonal(dim1=-2, dim2=-1).sign()  # without them not uniform (math-ph/0609050)
    blocks = squares * signs[:, None]
    return blocks.mT.flatten(0, 1)[:rows] * torch.randn(rows, columns).norm(dim=1, keepdim=True)


class Performer(Mixer):
    """Attention through random features.

    heads, head_dim (default width / heads), bias: as of attention. features: their number, m (default
    head_dim * log head_dim, rounded up to 16s). kernel: softmax, or relu with 1e-3 added. redraw: new features every
    so many training steps, a step being a call in training mode with gradients and no stream.
    """

    CAN: ClassVar = frozenset({"causal", "bidirectional", "cross", "padding", "stream"})

    def __init__(
        self,
        width: int,
        *,
        positions: Positions | None = None,
        heads: Size = 4,
        head_dim: Size | None = None,
        features: Size | None = None,
        kernel: Literal["softmax", "relu"] = "softmax",
        redraw: Size | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if head_dim is None and width % heads:
            raise ValueError(f"performer: width {width} is no multiple of {heads} heads; set head_dim or other heads")
        if positions is not None and positions.biases:
            raise ValueError("performer never forms the scores that alibi adds to: choose rotary or another scheme")
        self.width, self.heads, self.head_dim = width, heads, head_dim or width // heads
        self.kernel, self.redraw = kernel, redraw
        self.positions = positions or Positions()
        inner = heads * self.head_dim
        self.features = features or 16 * max(math.ceil(self.head_dim * math.log(self.head_dim) / 16), 1)
        self.query = nn.Linear(width, inner, bias=bias)
        self.key_value = nn.Linear(width, 2 * inner, bias=bias)
        self.out = residual_output(nn.Linear(inner, width, bias=bias))
        self.register_buffer("projection", orthogonal(self.features, self.head_dim))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.projection: Tensor
        self.steps: Tensor

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        *,
        mask: Mask,
        pos: Int[Tensor, "B T"],
        state: State | None = None,
        context: Float[Tensor, "B S C"] | None = None,
    ) -> Float[Tensor, "B T C"]:
        self.require(mask, state, context)
        if self.redraw is not None and self.training and torch.is_grad_enabled() and state is None:
            self._count(self.redraw)
        if context is None:
            x = _cleared(x, mask)
            q, (k, v) = self._heads(self.query(x)), self._keys_values(x)
            q, k = self.positions.rotate(q, pos), self.positions.rotate(k, pos)
            y = self._own(q, k, v, mask, state)
        else:
            q = self._heads(self.query(x))
            y = self._read(q, self._remembered(context, mask, state))
        return self.out(y.to(q.dtype).transpose(1, 2).flatten(2))

    def implied(
        self,
        x: Float[Tensor, "B T C"],
        *,
        mask: Mask,
        pos: Int[Tensor, "B T"],
        context: Float[Tensor, "B S C"] | None = None,
        rows: slice | None = None,
    ) -> Implied:
        """The normalised products of features, beside the softmax that they estimate."""
        self.require(mask, context=context)
        x, own = x if context is not None else _cleared(x, mask), rows or slice(None)
        q, (k, v) = self._heads(self.query(x)), self._keys_values(x if context is None else _cleared(context, mask))
        places: dict[str, Any] = {} if context is not None else {"q_pos": pos[:, own], "k_pos": pos}
        if context is None:
            q, k = self.positions.rotate(q, pos), self.positions.rotate(k, pos)

        def mix(v: Tensor, run: slice, kept: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
            if context is not None or not mask.causal:
                return self._read(q, self._summary(k, v, mask)), ()
            state = self.init_state(len(v), 0) if not kept else Recurrent(*kept)
            assert isinstance(state, Recurrent)
            sums, *tops = state.tensors
            state.tensors = (sums.new_zeros(*sums.shape[:3], v.shape[3] + 1) if not kept else sums, *tops)
            return self._causal(q[:, :, run], k[:, :, run], v, of_run(mask, run), state), state.tensors

        size = RUN if context is None and mask.causal else None
        found = linear_map(mix, v, q.shape[2], rows, size=size)
        found = without_padding(found, mask, context, rows)
        exact: Callable[[], Tensor] | None = None
        if self.kernel == "softmax":
            exact = lambda: without_padding(weights(q[:, :, own], k, mask, **places), mask, context, rows)
        if rows is not None:
            return Implied(found, exact=exact)
        return Implied(found, v, lambda y: self.out(y.to(v.dtype).transpose(1, 2).flatten(2)), exact)

    def _own(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, state: State | None) -> Float[Tensor, "B H T D"]:
        if mask.causal:
            if not isinstance(state, Recurrent | None):
                raise ValueError(f"performer streams with a Recurrent, not {type(state).__name__}: use init_state")
            return self._causal(q, k, v, mask, state)
        if state is not None:
            raise ValueError("performer streams only under a causal mask: without one, tokens yet to come count")
        return self._read(q, self._summary(k, v, mask))

    def _causal(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, state: Recurrent | None) -> Tensor:
        """Sums over the tokens so far. Keys are scaled by their largest feature so far, and the sums along with it."""
        sums, *tops = (None,) if state is None else state.tensors
        top, decay, outputs = tops[0] if tops else None, None, []
        with _single_precision(q):
            for query, key, value, there in _blocks(q, k, v, _there(mask)):
                if self.kernel == "relu":
                    query, key = self._rectified(query), self._rectified(key, there)
                else:
                    query = self._project(query).softmax(-1)
                    key, decay, top = _scaled(self._logs(key, there), top)
                value = _beside_one(value)
                y, sums = recur(query, key, value, decay=decay, state=sums)
                outputs.append(_ratio(torch.add(y, value, alpha=LEAST)))
        if state is not None:
            assert sums is not None
            state.tensors = (sums,) if top is None else (sums, top)
        return _joined(outputs)

    def _summary(self, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, ...]:
        """What is left of all keys and values. softmax: the mean value that each feature sees, and the log of its sum
        over the keys, both free of any scale (B H M D, B H 1 M); relu: the sums (B H M D+1)."""
        top: Any = None
        sums: Any = None
        with _single_precision(k):
            for key, value, there in _blocks(k, v, _there(mask)):
                if self.kernel == "relu":
                    more = self._rectified(key, there).mT @ _beside_one(value)
                    sums = more if sums is None else sums + more
                    continue
                before, logs = top, self._logs(key, there)
                top = logs.detach().amax(-2, keepdim=True).clamp_min_(LOWEST)
                top = top if before is None else torch.maximum(top, before)
                more = logs.sub_(top).exp_().mT @ _beside_one(value)
                sums = more if before is None else torch.addcmul(more, (before - top).exp().mT, sums)
            if top is None:
                return (sums,)
            share = sums[..., -1:].clamp_min(LEAST)  # 1 or more, unless all is padding
            return sums[..., :-1] / share, top + share.log().mT

    def _read(self, q: Tensor, summary: tuple[Tensor, ...]) -> Float[Tensor, "B H T D"]:
        """The features of a query choose among what each of them has seen."""
        outputs = []
        with _single_precision(q):
            for (query,) in _blocks(q):
                if self.kernel == "relu":
                    outputs.append(_ratio(self._rectified(query) @ summary[0]))
                else:
                    mean, log_sum = summary
                    outputs.append(self._project(query).add_(log_sum).softmax(-1) @ mean)
        return _joined(outputs)

    def _project(self, x: Tensor) -> Float[Tensor, "B H T M"]:
        return _wide(x) @ _wide(self.projection).T.mul(self.head_dim**-0.25)

    def _logs(self, k: Tensor, there: Tensor | None) -> Float[Tensor, "B H S M"]:
        """w_j k' - |k'|^2 / 2 in one product, the norm being one more channel; log 0 where there is no token."""
        k = _wide(k)
        norm = k.square().sum(-1, keepdim=True) * (0.5 * self.head_dim**-0.5)
        if there is not None:
            norm = norm.masked_fill(~there, math.inf)
        projection = F.pad(_wide(self.projection) * self.head_dim**-0.25, (0, 1), value=-1.0)
        return torch.cat([k, norm], -1) @ projection.T

    def _rectified(self, x: Tensor, there: Tensor | None = None) -> Float[Tensor, "B H T M"]:
        """ReLU features; those of padding are zero."""
        phi = self._project(x).relu_() + EPSILON
        return phi if there is None else phi.masked_fill(~there, 0.0)

    def _remembered(self, context: Tensor, mask: Mask, state: State | None) -> tuple[Tensor, ...]:
        if not isinstance(state, Cross | None):
            raise ValueError(f"performer reads a context with a Cross, not {type(state).__name__}: use init_state")
        if state is not None and state.kept:
            return state.kept
        summary = self._summary(*self._keys_values(_cleared(context, mask)), mask)
        if state is not None:
            state.kept = summary
        return summary

    def _keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.key_value(x).chunk(2, -1)
        return self._heads(k), self._heads(v)

    def _heads(self, x: Tensor) -> Float[Tensor, "B H T D"]:
        return x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

    def _count(self, redraw: int) -> None:
        """Counts a training step; before each `redraw`-th come new features, from the global generator. Both are in
        the state dict, so that a resumed run repeats them. A new tensor, because the way back may need the old one."""
        steps = int(self.steps)
        if steps and steps % redraw == 0:
            self.projection = orthogonal(self.features, self.head_dim).to(self.projection)
        self.steps += 1

    def init_state(self, batch: int, capacity: int, cross: bool = False) -> State:
        if cross:
            return Cross()
        like = _wide(self.projection)
        sums = like.new_zeros(batch, self.heads, self.features, self.head_dim + 1)
        tops = [like.new_full((batch, self.heads), -math.inf)] if self.kernel == "softmax" else []
        return Recurrent(sums, *tops)

    def cost(self, length: int, context_length: int | None = None, *, causal: bool = True) -> Cost:
        """`causal` says which of its two forms is meant, where there is no context."""
        keys, m, heads, values = context_length or length, self.features, self.heads, self.head_dim + 1
        softmax, causal = self.kernel == "softmax", causal and context_length is None
        projections = 4 * self.width * heads * self.head_dim * (length + keys)
        mapped = 2 * heads * m * (length * self.head_dim + keys * (values if softmax else self.head_dim))
        mixed = 2 * heads * m * (keys * values + length * (self.head_dim if softmax else values))
        if causal:
            mixed = sum(flops(size, *self._recurrence()) for size in _block_sizes(length))
        return Cost(
            flops=projections + mapped + mixed,
            state_bytes=4 * heads * (m * values + (softmax and causal)),
            activation_bytes=4 * self._activations(length, context_length, causal),
        )

    def _activations(self, length: int, context_length: int | None, causal: bool) -> int:
        """Numbers kept for the way back: what the linear maps read, keys for their norms, features, and the sums."""
        keys, m, d, softmax = context_length or length, self.features, self.head_dim, self.kernel == "softmax"
        kept = (length + (context_length or 0)) * self.width + self.heads * length * d
        if softmax:
            turned = isinstance(self.positions, Rotary) and context_length is None
            kept += self.heads * keys * d * (1 if turned else 2)  # else they share their memory with the values
        else:
            kept += self.heads * m * (length + keys)  # before EPSILON is added
        if causal:
            inside = sum(kept_bytes(size, *self._recurrence()) for size in _block_sizes(length))
            return kept + self.heads * length * (d + 1) + inside // 4
        kept += self.heads * (m * (length + keys) + keys * (d + 1))
        return kept + self.heads * (m * (2 * d + 3) if softmax else (m + length) * (d + 1))

    def _recurrence(self) -> tuple[int, int, int, str]:
        return self.heads, self.features, self.head_dim + 1, "fixed" if self.kernel == "softmax" else "none"


def from_performer_pytorch(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a `Performer` out of that of a `SelfAttention` or `CrossAttention` of performer-pytorch 1.1.

    With a bias anywhere it is one for `bias=True`. Theirs adds 1e-4 to every softmax feature, which this one does not.
    """
    maps = {"query": ("to_q",), "key_value": ("to_k", "to_v"), "out": ("to_out",)}
    known = {f"{old}.{kind}" for olds in maps.values() for old in olds for kind in ("weight", "bias")}
    if unknown := sorted(tensors.keys() - known - {"fast_attention.projection_matrix"}):
        raise ValueError(f"from_performer_pytorch: nothing here answers to {', '.join(unknown)}: leave out local heads")
    own = {"projection": tensors["fast_attention.projection_matrix"], "steps": torch.zeros((), dtype=torch.long)}
    biased = any(name.endswith("bias") for name in tensors)
    for new, olds in maps.items():
        weights = [tensors[f"{old}.weight"] for old in olds]
        own[f"{new}.weight"] = torch.cat(weights)
        if biased:
            biases = [tensors.get(f"{old}.bias", w.new_zeros(len(w))) for old, w in zip(olds, weights, strict=True)]
            own[f"{new}.bias"] = torch.cat(biases)
    return own


def _single_precision(t: Tensor) -> torch.autocast:
    """No autocast: exp turns the absolute error of a log into a share of the feature, in bf16 into more than all."""
    return torch.autocast(t.device.type, enabled=False)


def _block_sizes(length: int) -> list[int]:
    blocks = max(length // BLOCK, 1)
    return [BLOCK] * (blocks - 1) + [length - BLOCK * (blocks - 1)]


def _blocks(first: Tensor, *others: Tensor | None) -> Iterable[tuple[Any, ...]]:
    """Runs of tokens, the third dimension of each tensor, with what stands beside them; None stays None."""
    sizes = _block_sizes(first.shape[2])
    parts = [[t] * len(sizes) if t is None or len(sizes) == 1 else t.split(sizes, 2) for t in (first, *others)]
    return zip(*parts, strict=True)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _there(mask: Mask) -> Bool[Tensor, "B 1 S 1"] | None:
    return None if mask.valid is None else mask.valid[:, None, :, None]


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _cleared(x: Tensor, mask: Mask) -> Tensor:
    """What stands at padding, NaN say, times a feature of zero is no zero."""
    return x if mask.valid is None else x.masked_fill(~mask.valid[..., None], 0.0)


def _scaled(logs: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """exp of `logs` (B H T M) over the largest of all features so far, the log of what each token's scale leaves of the
    scale before it, and the last largest log (B H). `logs` are overwritten. The scale cancels: no gradient is lost."""
    top = logs.detach().amax(-1)
    first = torch.full_like(top[..., :1], -math.inf) if before is None else before[..., None]
    top = torch.cat([first, top], -1).cummax(-1).values
    decay = (top[..., :-1] - top[..., 1:]).masked_fill(top[..., :-1] == -math.inf, 0.0)  # nothing there to scale
    return logs.sub_(top[..., 1:, None].clamp_min(LOWEST)).exp_(), decay, top[..., -1]


def _beside_one(v: Tensor) -> Tensor:
    """[v 1]: the ones sum up the normaliser."""
    return F.pad(_wide(v), (0, 1), value=1.0)


def _ratio(y: Tensor) -> Tensor:
    """Sums over their normaliser, which is zero only where all is padding."""
    return y[..., :-1] / y[..., -1:].clamp_min(LEAST)
