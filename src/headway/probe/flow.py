"""Flow: attention followed through all layers, from what comes out back to what went in, in tiles of some rows.

Rollout (2005.00928): r <- (r + r A) / 2 from the last layer to the first, A the mean of a layer's heads. Relevance
(2103.15679): r <- r + r mean_h (A * dy/dA)^+, y the score that is explained; dy/dA is (dy/dO) V^T, O = A V, so that the
fast kernel serves the way back, too. Cross-attention moves r on to the source; what an r of a decoder leaves there
flows on through the encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from headway.attend import Glance
from headway.probe.capture import Seen
from headway.probe.maps import tiles
from headway.probe.stacks import check_row, chosen

if TYPE_CHECKING:
    from headway.probe.look import Look

MOST = 2**24  # numbers of an answer: 4,096 tokens from every one of 4,096
Weigh = Callable[[Seen, Glance, slice], Tensor]  # some rows of a layer's matrix, `Float[R S]`


def rollout(look: Look, stack: str | None, row: int, tokens: Sequence[int] | None) -> dict[str, Float[Tensor, "M S"]]:
    """See `Look.rollout`."""
    stack, seen = of_stack(look.seen, stack)
    check_row(row, seen[0].x)
    count = seen[0].x.shape[1]
    if tokens is None and count * count > MOST:
        raise ValueError(f"rollout: of all {count} tokens it has {count} x {count} numbers: say of which, tokens=[0]")
    if wrong := [token for token in tokens or () if not 0 <= token < count]:
        raise ValueError(f"rollout: no token {wrong[0]} in '{stack}', whose tokens are 0 to {count - 1}")
    start = torch.eye(count, device=seen[0].x.device) if tokens is None else _ones(list(tokens), count, seen[0].x)
    with torch.no_grad():
        return follow(look.seen, stack, row, start, lambda one, given, rows: given.rows(rows)[0].mean(0), 0.5, 0.5)


def follow(
    seen: Sequence[Seen],
    stack: str,
    row: int,
    start: Float[Tensor, "M T"],
    weigh: Weigh,
    keep: float,
    move: float,
) -> dict[str, Float[Tensor, "M S"]]:
    """Each r of `start`, over the tokens that leave `stack`, as shares of what entered, by side.

    Where a layer looks, r becomes keep r + move r A; where it looks at a source, the latter part is the source's.
    """
    _, here = of_stack(seen, stack)
    side, found = here[0].place.queries, start
    beyond: dict[str, Tensor] = {}
    for one in reversed(here):
        given = one.glance().of(row)
        moved = _times(found, given, partial(weigh, one, given))
        if one.place.slot == "cross":
            beyond[one.place.keys] = beyond.get(one.place.keys, 0) + move * moved
            found = keep * found
        else:
            found = keep * found + move * moved
    answer = {side: found}
    for source, part in beyond.items():
        behind = next((other.place.stack for other in seen if other.place.queries == source), None)
        attends = any(other.place.has_maps for other in seen if other.place.stack == behind)
        answer |= follow(seen, behind, row, part, weigh, keep, move) if behind and attends else {source: part}
    return answer


def of_stack(seen: Sequence[Seen], stack: str | None) -> tuple[str, list[Seen]]:
    """The places of a stack, first to last, within a layer as they run; all of which form weights."""
    stack = chosen((one.place.stack for one in seen), stack)
    found = [one for one in seen if one.place.stack == stack]
    if deaf := [one.place for one in found if not one.place.has_maps]:
        where = f"layer {deaf[0].layer} of '{stack}' is {deaf[0].mixer}"
        raise ValueError(f"look: {where}, which forms no attention weights to follow: use look.influence")
    return stack, found


def _times(r: Float[Tensor, "M T"], given: Glance, rows_of: Callable[[slice], Tensor]) -> Float[Tensor, "M S"]:
    found = r.new_zeros(len(r), given.k.shape[2])
    for rows in tiles(given, given.q.shape[1]):
        found += r[:, rows] @ rows_of(rows).to(r.dtype)
    return found


def _ones(tokens: list[int], count: int, like: Tensor) -> Float[Tensor, "M T"]:
    found = torch.zeros(len(tokens), count, device=like.device)
    found[torch.arange(len(tokens)), tokens] = 1
    return found
