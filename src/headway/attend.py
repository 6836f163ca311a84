"""Exact attention: softmax(cap(q k^T * scale) + bias, over what the mask allows) v (arXiv 1706.03762).

`reference` is the definition, a dozen lines. Every kernel in `kernels/` must equal it, gradients included; the fastest
legal one is the default, chosen from facts known on the Python side (no device sync), and `explain` says which and why.
Letters, here and everywhere: B batch, T queries, S keys, H heads, G key/value heads, D head width, C model width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headway import kernels
from headway.kernels import Call, places, sdpa
from headway.mask import Mask

FULL = Mask()
BACKENDS = {name: kernels.find(name) for name in kernels.names()}
ORDER = [name for name in ("triton", "flex", "blocked", "tiled", "sdpa") if name in BACKENDS]  # first that can and pays

_forced: str | None = None
_heard: list[Heard] | None = None


class Heard(NamedTuple):
    """A call of `attend`: the backend it took, why, and its facts."""

    backend: str
    why: str
    call: Call


def attend(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S E"],
    mask: Mask = FULL,
    *,
    q_pos: Int[Tensor, "B T"] | None = None,
    k_pos: Int[Tensor, "B S"] | None = None,
    aligned: bool = False,
    bias: Float[Tensor, "#B #H T S"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
) -> Float[Tensor, "B H T E"]:
    """Exact attention with the fastest legal backend; heads in groups share keys and values (1911.02150, 2305.13245).

    Positions are 0, 1, 2, ... where not given; a key at -1 is seen by nobody. `aligned` promises that given positions
    are the same for queries and keys and rise by one from token to token within every sequence (padding at the ends,
    at -1), so that kernels may read distances off indices. A query that may see nothing gives zeros. `scale` is
    1/sqrt(D) where not given; `softcap` c turns a scaled score s into c tanh(s / c) (2408.00118); `bias` is added
    behind it; `dropout` is on the weights.
    """
    call = call_of(
        q, k, v, mask, q_pos=q_pos, k_pos=k_pos, aligned=aligned, bias=bias, softcap=softcap, dropout=dropout
    )
    chosen, why = _choose(call, backend or _forced)
    if _heard is not None:
        _heard.append(Heard(chosen, why, call))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    run = reference if chosen == "reference" else BACKENDS[chosen].run
    return run(q, k, v, mask, q_pos, k_pos, bias, scale, softcap, dropout)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """The definition. What nobody may look at (NaN, say) is zeroed first, so that it never leaks, backward included."""
    allowed = mask.allows(*places(q, k, q_pos, k_pos)).expand(-1, q.shape[2], -1)[:, None]  # B 1 T S
    seen = allowed.any(-2)[..., None]
    k, v = (torch.where(seen, t, 0).repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    shares = F.dropout(_shares((q @ k.mT) * scale, allowed, bias, softcap), dropout)
    return (shares @ v).masked_fill(~allowed.any(-1, keepdim=True), 0.0)


def _shares(
    scores: Float[Tensor, "B H T S"], allowed: Bool[Tensor, "#B #H T S"], bias: Tensor | None, softcap: float | None
) -> Float[Tensor, "B H T S"]:
    """The softmax over what is allowed; zeros where nothing is."""
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    alive = allowed.any(-1, keepdim=True)
    return scores.masked_fill(~allowed, float("-inf")).masked_fill(~alive, 0.0).softmax(-1).masked_fill(~alive, 0.0)


def weights(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    mask: Mask = FULL,
    *,
    q_pos: Int[Tensor, "B T"] | None = None,
    k_pos: Int[Tensor, "B S"] | None = None,
    bias: Float[Tensor, "#B #H T S"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "B H T S"]:
    """The attention map itself, by the reference, so that map @ v is the output."""
    given: dict[str, Any] = {"q_pos": q_pos, "k_pos": k_pos, "bias": bias, "softcap": softcap}
    call_of(q, k, k, mask, **given)
    allowed = mask.allows(*places(q, k, q_pos, k_pos)).expand(-1, q.shape[2], -1)[:, None]
    k = torch.where(allowed.any(-2)[..., None], k, 0).repeat_interleave(q.shape[1] // k.shape[1], 1)
    return _shares((q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale), allowed, bias, softcap)


@dataclass(frozen=True, kw_only=True)
class Glance:
    """A call of exact attention, taken apart: any rows of any head's map on demand, none of them kept.

    `bias` gives what is added to the scores, from positions of queries and keys; the other fields are as in `attend`.
    """

    q: Float[Tensor, "B H T D"]
    k: Float[Tensor, "B G S D"]
    v: Float[Tensor, "B G S E"]
    mask: Mask
    q_pos: Int[Tensor, "B T"]
    k_pos: Int[Tensor, "B S"]
    scale: float
    softcap: float | None = None
    bias: Callable[[Tensor, Tensor], Tensor | None] = lambda q_pos, k_pos: None

    def of(self, row: int) -> Glance:
        """The same of one row of the batch."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors: dict[str, Any] = {name: t[row : row + 1] for name, t in found.items() if isinstance(t, Tensor)}
        return replace(self, **tensors, mask=self.mask.of(row))

    def rows(self, rows: slice, heads: slice = slice(None)) -> Float[Tensor, "B H R S"]:
        """The weights of some queries, in float32 or better; a query that may see nothing has zeros."""
        bias = self.bias(self.q_pos[:, rows], self.k_pos)
        bias = bias if bias is None or bias.shape[1] == 1 else bias[:, heads]
        return _shares(self.scores(rows, heads) * self.scale, self.allowed(rows, heads), bias, self.softcap)

    def scores(self, rows: slice, heads: slice) -> Float[Tensor, "B H R S"]:
        """q k^T."""
        return _wide(self.q[:, heads, rows]) @ _wide(self._of_heads(self.k, heads)).mT

    def allowed(self, rows: slice, heads: slice) -> Bool[Tensor, "B _ R S"]:
        """Which keys each query may see."""
        run = range(self.q.shape[2])[rows]
        found = self.mask.queries(rows).allows(self.q_pos[:, rows], self.k_pos)
        return found.expand(self.q.shape[0], len(run), -1)[:, None]

    def pulled(self, of_output: Float[Tensor, "B H T E"], rows: slice, heads: slice) -> Float[Tensor, "B H R S"]:
        """What a gradient with respect to map @ v is with respect to some rows of the map."""
        return _wide(of_output[:, heads, rows]) @ _wide(self._of_heads(self.v, heads)).mT

    def _of_heads(self, t: Float[Tensor, "B G S D"], heads: slice) -> Float[Tensor, "B H S D"]:
        """The keys or values that these heads share."""
        count, shared = self.q.shape[1], t.shape[1]
        if count == shared:
            return t[:, heads]
        return t[:, [head * shared // count for head in range(count)[heads]]]


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def legal(call: Call) -> dict[str, str]:
    """Every backend with why it cannot answer `call`, "" where it can."""
    return {"reference": "", **{name: kernel.refuses(call) for name, kernel in BACKENDS.items()}}


def explain(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S E"],
    mask: Mask = FULL,
    **named: Any,
) -> str:
    """Which backend `attend` takes for such a call (its arguments, `scale` and `backend` left out), and why."""
    return ": ".join(_choose(call_of(q, k, v, mask, **named), _forced))


def explain_layers(model: nn.Module, *inputs: object, **named: object) -> dict[str, str]:
    """Runs `model` once, without gradients, and tells for each layer that calls `attend` the backend it took and why.

    The keys are module names ("encoder.blocks.0.mixer.inner"); a layer that called more than once has a line for each.
    """
    said: dict[str, str] = {}

    def hear(name: str, before: int) -> None:
        lines = [f"{one.backend}: {one.why}" for one in (_heard or [])[before:]]
        said[name] = "; ".join(dict.fromkeys(lines))

    hooks = []
    for name, module in model.named_modules():
        if getattr(module, "CAN", None) is None:
            continue
        starts: list[int] = []
        hooks.append(module.register_forward_pre_hook(lambda *_, s=starts: s.append(len(_heard or []))))
        hooks.append(module.register_forward_hook(lambda *_, n=name, s=starts: hear(n, s.pop())))
    try:
        with listening(), torch.no_grad():
            model(*inputs, **named)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: line for name, line in said.items() if line}


def kept_bytes(call: Call) -> int:
    """What the backend taken for `call` keeps for the way back besides queries, keys, values and output."""
    pairs, chosen = call.queries * call.keys, _choose(call, _forced)[0]
    size = 4 * call.rows * call.heads * call.queries  # the sum of each query's exponentials
    if chosen == "reference":
        return call.rows * call.heads * pairs * 4 * (3 if call.softcap else 2) + size
    dense = chosen == "sdpa" and not sdpa.free(call.mask, call.positions, call.bias)
    return size + (4 * pairs * (call.heads if call.bias else 1) if dense else 0)


@contextmanager
def forced(backend: str) -> Iterator[None]:
    """Every call of `attend` inside takes this backend (where the call itself names none)."""
    global _forced
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


@contextmanager
def listening() -> Iterator[list[Heard]]:
    """Every call of `attend` made inside, in order: the backend, the reason, and the facts of the call."""
    global _heard
    before, _heard = _heard, []
    try:
        yield _heard
    finally:
        _heard = before


def call_of(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S E"],
    mask: Mask = FULL,
    *,
    q_pos: Int[Tensor, "B T"] | None = None,
    k_pos: Int[Tensor, "B S"] | None = None,
    aligned: bool = False,
    bias: Float[Tensor, "#B #H T S"] | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Call:
    """The facts of a call, checked: what a kernel is asked about."""
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"attend: {q.shape[1]} query heads do not share {k.shape[1]} key/value heads evenly")
    compares = ", ".join(sorted(mask.facts & {"causal", "window"}))
    if compares and (q_pos is None) != (k_pos is None):
        raise ValueError(f"attend: a {compares} mask compares positions: give q_pos and k_pos, or neither")
    if compares and q_pos is None and q.shape[2] != k.shape[2]:
        raise ValueError(
            f"attend: {q.shape[2]} queries and {k.shape[2]} keys under a {compares} mask need q_pos and k_pos"
        )
    if softcap is not None and softcap <= 0:
        raise ValueError(f"attend: softcap bounds the scores and is above 0, not {softcap}")
    positions = q_pos is not None or k_pos is not None
    return Call(
        mask=mask,
        rows=q.shape[0],
        heads=q.shape[1],
        kv_heads=k.shape[1],
        queries=q.shape[2],
        keys=k.shape[2],
        head_dim=q.shape[3],
        value_dim=v.shape[3],
        dtype=q.dtype,
        device=q.device.type,
        gradients=torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, bias)),
        positions=positions,
        aligned=aligned or not positions,
        bias=bias is not None,
        softcap=softcap is not None,
        dropout=dropout > 0,
    )


def _choose(call: Call, wish: str | None) -> tuple[str, str]:
    """The backend for a call and why it is taken."""
    if wish is not None:
        refused = legal(call)
        if wish not in refused:
            raise ValueError(f"attend: no backend '{wish}'; there is {', '.join(refused)}")
        if refused[wish]:
            able = ", ".join(name for name, why in refused.items() if not why)
            raise ValueError(f"attend: {wish} cannot: {refused[wish]}; {able} can")
        return wish, "asked for"
    for name in ORDER:
        if not BACKENDS[name].refuses(call) and (why := BACKENDS[name].pays(call)):
            return name, why
    return "reference", f"no kernel can: {BACKENDS['sdpa'].refuses(call)}"
