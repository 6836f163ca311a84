"""The seam of every method: an Adapter stands at a module and changes what it gives; the module stays what it was.

A wrapped module keeps its name, its weights and their names; its class becomes one whose `forward` asks the adapters
in use, y = around(y = module(x)). What acts is said once for a network, by the Adaptation that its modules share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from headway.spec import Strict

INSIDE = ".adapters."  # what stands behind it in a name is an adapter's


class Adapter(nn.Module):
    """What one method adds at one module. A method is a file with a class `Method(Adapter)`, whose options are the
    keyword arguments of its `__init__`, behind `module` (which it must not keep) and `outputs`: the outputs of a linear
    that several share, of which it changes these alone (None: all).

    TARGETS: patterns of the modules it stands at, where the user names none. BY_ROW: whether the rows of a batch can
    have adapters of their own. Parameters are in fp32 and start so that nothing is changed. Override `delta`, or
    `around` where what is changed is no sum; and `merge` where it can become part of the weights.
    """

    TARGETS: ClassVar[tuple[str, ...]] = ()
    BY_ROW: ClassVar[bool] = True

    @classmethod
    def fits(cls, module: nn.Module, name: str) -> bool:
        """Whether it can stand at a module of this name."""
        raise TypeError(f"{cls.__module__}: a method says which modules it fits")

    def delta(self, x: Any, y: Any) -> Any:
        """What is added to the module's output y for its (first) input x, both `Float[Tensor, "B *T C"]`."""
        raise TypeError(f"{type(self).__module__}: a method defines delta or around")

    def around(self, call: Callable[..., Any], amount: float, *args: Any, **kwargs: Any) -> Any:
        """What comes in place of `call(*args, **kwargs)`; `amount`: the adapter's weight where several are mixed."""
        y = call(*args, **kwargs)
        added = self.delta(args[0], y)
        return y + (added if amount == 1 else amount * added)

    def merge(self, weight: Tensor, bias: Tensor | None, amount: float) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a linear that does alone what it does with this adapter; new tensors where they change."""
        raise ValueError(
            f"{type(self).__module__.rpartition('.')[2]} adapters cannot be merged: they are no change of a weight; "
            "leave them beside the model"
        )

    @classmethod
    def of_rows(cls, adapters: Sequence[Any], which: Int[Tensor, " B"], x: Tensor, y: Tensor) -> Tensor:
        """y with row i changed by `adapters[which[i]]`; by none where it is negative."""
        for i, adapter in enumerate(adapters):
            rows = which.eq(i).nonzero()[:, 0]
            if len(rows):
                y = y.index_add(0, rows, adapter.delta(x[rows], y[rows]))
        return y


class Record(Strict, frozen=True):
    """How an adapter was made: enough to make it again."""

    method: str
    targets: tuple[str, ...]
    options: dict[str, Any] = {}
    heads: tuple[str, ...] = ()


class Adaptation:
    """What is known of the adapters of a network, shared by all its wrapped modules: their records by name, which act
    and how strongly, or one a row of the batch; `off` while they are bare, `merged` while the weights hold them."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self.weights: dict[str, float] = {}
        self.rows: tuple[str | None, ...] | None = None
        self.off = 0
        self.merged = False
        self.base = ""  # the hash of the network as it was before
        self.quantize: str | None = None

    def which(self, names: Sequence[str], device: torch.device) -> Int[Tensor, " B"]:
        """For each row of the batch, which of the names it has, or -1."""
        assert self.rows is not None
        return torch.tensor([names.index(row) if row in names else -1 for row in self.rows], device=device)


class Adapted(nn.Module):
    """Comes before a module's own class once it is wrapped. `adapters`: by name, then by the part of its outputs."""

    adapters: nn.ModuleDict
    adaptation: Adaptation
    own: ClassVar[type[nn.Module]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        now, call = self.adaptation, super().forward
        if now.off or now.merged:
            return call(*args, **kwargs)
        if now.rows is not None:
            return self._by_row(call(*args, **kwargs), args[0])
        for name, amount in now.weights.items():
            if name in self.adapters:
                for adapter in self.adapters[name].values():  # type: ignore[operator]
                    call = partial(adapter.around, call, amount)
        return call(*args, **kwargs)

    def _by_row(self, y: Any, x: Any) -> Any:
        """Adapters of one kind at one part of the outputs are applied to all rows together."""
        rows = self.adaptation.rows or ()
        names = [name for name in dict.fromkeys(rows) if name is not None and name in self.adapters]
        groups: dict[tuple[type[Adapter], str], dict[str, Adapter]] = {}
        for name in names:
            for part, adapter in self.adapters[name].items():  # type: ignore[operator]
                groups.setdefault((type(adapter), part), {})[name] = adapter
        if names and len(rows) != x.shape[0]:
            raise ValueError(f"adapters were chosen for {len(rows)} rows, and this batch has {x.shape[0]}: choose one "
                             "for each row with headway.adapt.use(model, rows=...)")  # fmt: skip
        for (kind, _), group in groups.items():
            which = self.adaptation.which(list(group), x.device)
            y = kind.of_rows(list(group.values()), which, x, y)
        return y


@cache
def _adapted(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Adapted{kind.__name__}", (Adapted, kind), {"own": kind})


def own_class(module: nn.Module) -> type[nn.Module]:
    """A module's class, as it is without adapters."""
    return module.own if isinstance(module, Adapted) else type(module)


def put(module: nn.Module, adaptation: Adaptation, name: str, part: str, adapter: Adapter) -> None:
    """Has an adapter stand at a module."""
    if not isinstance(module, Adapted):
        module.adapters, module.adaptation = nn.ModuleDict(), adaptation  # type: ignore[assignment]
        module.__class__ = _adapted(type(module))
    held: Any = module.adapters
    if name not in held:
        held[name] = nn.ModuleDict()
    held[name][part] = adapter.train(module.training)


def take(module: Adapted, name: str) -> None:
    """Removes the adapters of a name; a module without any has its own class again."""
    if name in module.adapters:
        del module.adapters[name]
    if not len(module.adapters):
        module.__class__ = module.own
        del module.adapters, module.adaptation


def adapted(net: nn.Module) -> list[tuple[str, Adapted]]:
    """The wrapped modules with their names."""
    return [(name, module) for name, module in net.named_modules() if isinstance(module, Adapted)]


def adaptation_of(net: nn.Module) -> Adaptation | None:
    """What is known of a network's adapters; None where it has none."""
    return next((module.adaptation for _, module in adapted(net)), None)
