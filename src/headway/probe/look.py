"""Look: what a model attends to, any layer and head of it, while it runs as it always does.

`look(model, inputs)` runs the model once with its fast kernels and keeps what every mixer was given; maps, summaries,
rollout and relevance are computed from that when they are asked for, in tiles, so that none needs tokens x tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headway.attend import Glance
from headway.loaded import Loaded
from headway.mask import Mask
from headway.probe import maps
from headway.probe.capture import Place, Seen, capture, refuse_nan, refuse_unsaid
from headway.probe.flow import rollout
from headway.probe.implied import ImpliedMap, implied
from headway.probe.influence import Influence, influence
from headway.probe.intervene import Metric, Patched, ablate, importance, patch
from headway.probe.lens import Lens, lens
from headway.probe.patterns import Head, heads
from headway.probe.reading import Reading, read
from headway.probe.relevance import Target, relevance


def look(
    model: Loaded | nn.Module,
    inputs: Any,
    second: Any = None,
    *,
    image: Any = None,
    valid: Tensor | None = None,
    mask: Mask | None = None,
) -> Look:
    """Runs `model` once on `inputs` and gives a `Look` at all it attended to.

    model: what `headway.load` gives, which reads a text (or several), ids or a picture; or a module of Headway's, which
    reads tensors. second: the other text of a pair, or what an encoder-decoder writes (default: its own answer; for a
    bare one, ids). image: the picture beside a text, of two towers. valid, mask: as the model's `forward` takes them;
    without a mask, tokens are global as the task of the only head, or writing, has it (`Facts.globals`).
    It keeps what entered every layer, layers x rows x tokens x width numbers: 1.1 GB of 16,384 tokens in SmolLM2-135M
    (30 layers of 576, float32).
    ValueError where the input is empty, is not what the model reads or is longer than it takes, or where NaN comes out.
    """
    return Look(read(model, inputs, second, image, valid, mask), model)


class Look:
    """One run of a model.

    output: what the model's `forward` gives: the last hidden states, an encoder-decoder's logits, two towers' scores;
    to the bit that of a run without gradients. tokens: by side ("source", "target", or a tower's name), a label for
    each token of the first row. `labels` has the other rows. written: of an encoder-decoder, what it wrote behind each
    token of "target". places: its mixers.
    """

    def __init__(self, reading: Reading, model: Loaded | nn.Module) -> None:
        self.reading, self.model = reading, model
        self.output, self.seen = capture(reading.net, reading.run)
        refuse_nan(reading.net, self.output, self.seen)
        self.places: list[Place] = [seen.place for seen in self.seen]
        self.tokens = {side: rows[0] for side, rows in reading.labels.items()}
        refuse_unsaid(self.seen, self.tokens)
        self.written = reading.written
        self._last: tuple[Seen, int, Glance] | None = None

    @property
    def net(self) -> Any:
        """The module itself."""
        return self.reading.net

    def rerun(self) -> Any:
        """The same call once more, for whoever puts hooks around it; gradients as the caller has them."""
        return self.reading.run()

    def labels(self, side: str, row: int = 0) -> list[str]:
        """The tokens of one row of a batch."""
        return self.reading.labels[side][row]

    def at(self, layer: int, *, stack: str | None = None, slot: str | None = None) -> Seen:
        """What the mixer of a layer was given. `stack`: the one that there is, or the decoder of an encoder-decoder;
        `slot`: "self" where the layer has such a mixer."""
        return maps.find(self.seen, layer, stack, slot)

    def _call(self, layer: int, head: int, stack: str | None, slot: str | None, row: int) -> Glance:
        """The call of a place taken apart; the last one is kept, as the heads of a layer are asked for together."""
        seen = self.at(layer, stack=stack, slot=slot)
        maps.check(seen, head, row)
        if self._last is None or self._last[0] is not seen or self._last[1] != row:
            self._last = None  # its memory is free before more is taken
            with torch.no_grad():
                self._last = (seen, row, seen.glance().of(row))
        return self._last[2]

    def map(
        self, layer: int, head: int, *, stack: str | None = None, slot: str | None = None, row: int = 0
    ) -> Float[Tensor, "T S"]:
        """The attention weights of a head; rows sum to one, or are zero where nothing may be seen."""
        return maps.whole(self._call(layer, head, stack, slot, row), head)

    def rows(
        self,
        layer: int,
        head: int,
        start: int,
        stop: int,
        *,
        stack: str | None = None,
        slot: str | None = None,
        row: int = 0,
    ) -> Float[Tensor, "R S"]:
        """The same of the tokens from `start` to before `stop` alone."""
        return maps.some(self._call(layer, head, stack, slot, row), head, start, stop)

    def top(
        self, layer: int, head: int, k: int, *, stack: str | None = None, slot: str | None = None, row: int = 0
    ) -> maps.Top:
        """The `k` keys that each token looks at most, `Float[T k]` of weights and `Int[T k]` of keys."""
        return maps.top(self._call(layer, head, stack, slot, row), head, k)

    def blocks(
        self, layer: int, head: int, size: int, *, stack: str | None = None, slot: str | None = None, row: int = 0
    ) -> Float[Tensor, "I J"]:
        """What share of the look of each `size` tokens falls on each `size` keys; rows sum to one, as a map's do."""
        return maps.blocks(self._call(layer, head, stack, slot, row), head, size)

    def heads(self, row: int = 0) -> list[Head]:
        """What each head does: entropy, distance, and the pattern that holds with its score (`patterns.PATTERNS`)."""
        return heads(self, row)

    def rollout(
        self, *, stack: str | None = None, tokens: Sequence[int] | None = None, row: int = 0
    ) -> dict[str, Float[Tensor, "M S"]]:
        """Attention rollout (2005.00928), by side: what share of each token (`tokens`; default: all, in order) comes
        from each token that went in. A decoder's has the shares of its own side and of the source's, together one."""
        return rollout(self, stack, row, tokens)

    def relevance(
        self, target: Target = None, *, at: int | None = None, row: int = 0
    ) -> dict[str, Float[Tensor, " S"]]:
        """Which tokens a score comes from, by side: attention weighed with the score's gradient (2103.15679).

        target: an output of the model's head by number or label (default: the largest), at the token `at` where there
        are outputs for each (default: the last); or what gives one number of `output`. Of two towers it is the score.
        """
        return relevance(self, target, at, row)

    # --- functions of files of their own, which say more ---

    def implied(
        self,
        layer: int,
        head: int = 0,
        *,
        stack: str | None = None,
        slot: str | None = None,
        row: int = 0,
        rows: slice | None = None,
    ) -> ImpliedMap:
        """The map of a mixer that forms no weights, beside the softmax that it may come near."""
        return implied(self, layer, head, stack=stack, slot=slot, row=row, rows=rows)

    def influence(self, layer: int | tuple[int, int] | None = None, **how: Any) -> Influence:
        """The norms of d output_i / d input_j, of anything at all; see `headway.probe.influence` for `how`."""
        return influence(self, layer, **how)

    def ablate(
        self, heads: Sequence[tuple[int, int]], *, scale: float = 0.0, stack: str | None = None, slot: str | None = None
    ) -> AbstractContextManager[None]:
        """Inside, these heads, (layer, head), are scaled in all that the model does; `rerun` tells what comes of it."""
        return ablate(self, heads, scale=scale, stack=stack, slot=slot)

    def importance(
        self, metric: Metric, *, head: str | None = None, stack: str | None = None, slot: str | None = None
    ) -> Float[Tensor, "L H"]:
        """How much each head matters to a metric of yours (1905.10650)."""
        return importance(self, metric, head=head, stack=stack, slot=slot)

    def patch(self, corrupted: Look, metric: Metric, *, head: str | None = None, stack: str | None = None) -> Patched:
        """Which layer's state at which token, put in where another input runs, restores a metric of yours."""
        return patch(self, corrupted, metric, head=head, stack=stack)

    def lens(self, *, head: str | None = None, stack: str | None = None) -> Lens:
        """What the model would say if it stopped after each layer."""
        return lens(self, head=head, stack=stack)
