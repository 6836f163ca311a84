"""The seam of every method: an Adapter stands at a module and changes what it gives; the module stays what it was.

A wrapped module keeps its name, its weights and their names; its class becomes one whose `forward` asks the adapters
in use, y = around(y = module(x)). What acts is said once for a network, by the Adaptation that its modules share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from headway.quantize import is_prepared, restore
from headway.spec import Strict

INSIDE = ".adapters."  # what stands behind it in a name is an adapter's


class Adapter(nn.Module):
    """What one method adds at one module. A method is a file with a class `Method(Adapter)`, whose options are the
    keyword arguments of its `__init__`, behind `module` (which it must not keep) and `outputs`: the outputs of a linear
    that several share, of which it changes these alone (None: all).

    TARGETS: patterns of the modules it stands at, where the user names none; `targets` where they depend on options.
    BY_ROW: whether the rows of a batch can have adapters of their own. ALONE: whether it acts whole, and no other of
    its method beside it. place: the name of the module, once it stands there.

    Parameters are in fp32 and start so that nothing is changed. Override `delta`, or `around` where what is changed is
    no sum; and `merge` where it can become part of the weights.
    """

    TARGETS: ClassVar[tuple[str, ...]] = ()
    BY_ROW: ClassVar[bool] = True
    ALONE: ClassVar[bool] = False
    place: str = ""

    @classmethod
    def targets(cls, options: dict[str, Any]) -> tuple[str, ...]:
        """The patterns of its modules where the user names none."""
        return cls.TARGETS

    @classmethod
    def beside(cls, net: nn.Module, places: list[Any], options: dict[str, Any]) -> list[tuple[Any, Adapter]]:
        """Adapters of other methods that an option asks for, with their places."""
        return []

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

    @classmethod
    def together(cls, acting: Sequence[tuple[Any, float]], call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`around` of several adapters with their weights, one about the other."""
        for adapter, amount in acting:
            call = partial(adapter.around, call, amount)
        return call(*args, **kwargs)

    def merge(self, weight: Tensor, bias: Tensor | None, amount: float) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a linear that does alone what it does with this adapter; new tensors where they change."""
        raise ValueError(
            f"{type(self).__module__.rpartition('.')[2]} adapters cannot be merged: they are no change of a weight; "
            "leave them beside the model"
        )

    @classmethod
    def of_rows(
        cls,
        adapters: Sequence[Any],
        which: Int[Tensor, " B"],
        call: Callable[..., Tensor],
        x: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """`around` where row i of the batch has `adapters[which[i]]`, or none where it is negative."""
        if cls.delta is not Adapter.delta:
            y = call(x, *args, **kwargs)
            for i, adapter in enumerate(adapters):
                rows = which.eq(i).nonzero()[:, 0]
                y = y.index_add(0, rows, adapter.delta(x[rows], y[rows]))
            return y
        calls: list[Callable[..., Tensor]] = [call, *(partial(adapter.around, call, 1.0) for adapter in adapters)]
        groups = [which.eq(i).nonzero()[:, 0] for i in range(-1, len(adapters))]
        found = [one(x[rows], *args, **kwargs) for one, rows in zip(calls, groups, strict=True)]
        return torch.cat(found)[torch.cat(groups).argsort()]


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
        self.inputs: tuple[str | None, ...] | None = None  # of a whole call, whose batches take their rows from it
        self.off = 0
        self.merged = False
        self.base = ""  # the hash of the network as it was before
        self.source = ""  # where that can be loaded from, if it is known
        self.quantize: str | None = None
        self._which: dict[tuple[Any, ...], Tensor] = {}

    def choose(self, weights: dict[str, float], rows: tuple[str | None, ...] | None = None) -> None:
        """Says which act from now on: on all rows, or on each its own."""
        self.weights, self.rows, self._which = weights, rows, {}

    def follow(self, rows: Sequence[int], anew: bool) -> bool:
        """See `loaded.follow`."""
        there = self.inputs if anew else self.rows
        if self.inputs is None or there is None:
            return False
        self.choose({}, tuple(there[i] for i in rows))
        return True

    def which(self, names: Sequence[str], device: torch.device) -> Int[Tensor, " B"]:
        """For each row of the batch, which of the names it has, or -1."""
        assert self.rows is not None
        if (key := (*names, device)) not in self._which:
            found = [names.index(row) if row in names else -1 for row in self.rows]
            self._which[key] = torch.tensor(found, device=device)
        return self._which[key]


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
            return self._by_row(now.rows, call, *args, **kwargs)
        acting: list[tuple[Any, float]] = []
        for name, amount in now.weights.items():
            if name in self.adapters:
                acting += [(adapter, amount) for adapter in self.adapters[name].values()]  # type: ignore[operator]
        kinds = {type(adapter) for adapter, _ in acting}
        return (kinds.pop() if len(kinds) == 1 else Adapter).together(acting, call, *args, **kwargs)

    def _by_row(self, rows: Sequence[str | None], call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Adapters of one kind at one part of the outputs are applied to all rows together."""
        groups: dict[tuple[type[Adapter], str], dict[str, Adapter]] = {}
        for name in dict.fromkeys(rows):
            if name is not None and name in self.adapters:
                for part, adapter in self.adapters[name].items():  # type: ignore[operator]
                    groups.setdefault((type(adapter), part), {})[name] = adapter
        if groups and len(rows) != len(args[0]):
            raise ValueError(f"adapters were chosen for {len(rows)} rows, and this batch has {len(args[0])}: choose "
                             "one for each row with headway.adapt.use(model, rows=...)")  # fmt: skip
        for (kind, _), group in groups.items():
            which = self.adaptation.which(list(group), args[0].device)
            call = partial(kind.of_rows, list(group.values()), which, call)
        return call(*args, **kwargs)


CLASSES: dict[type[nn.Module], type[nn.Module]] = {}  # by the class that they wrap


def _adapted(kind: type[nn.Module]) -> type[nn.Module]:
    return CLASSES.setdefault(kind, type(f"Adapted{kind.__name__}", (Adapted, kind), {"own": kind}))


def own_class(module: nn.Module) -> type[nn.Module]:
    """A module's class, as it is without adapters."""
    return module.own if isinstance(module, Adapted) else type(module)


def put(module: nn.Module, adaptation: Adaptation, name: str, part: str, adapter: Adapter, place: str) -> None:
    """Has an adapter stand at a module, which is called `place` in the network."""
    adapter.place = place
    if not isinstance(module, Adapted):
        vars(module).pop("forward", None)
        module.adapters, module.adaptation = nn.ModuleDict(), adaptation  # type: ignore[assignment]
        module.__class__ = _adapted(type(module))
    held: Any = module.adapters
    if name not in held:
        held[name] = nn.ModuleDict()
    held[name][part] = adapter.train(module.training)


def take(module: Any, name: str) -> None:
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
    return vars(net).get("adaptation")


def network_of(model: Any) -> Any:
    """The network of a loaded model, or the network itself."""
    return model if isinstance(model, nn.Module) else model.net


def plain(model: Any) -> Any:
    """The network with its weights as PyTorch holds them, where it was laid out for this CPU."""
    net = network_of(model)
    if is_prepared(net):
        restore(net)
    return net


def known_of(model: Any) -> Adaptation:
    """What is known of a model's adapters, of which it has one at least."""
    known = adaptation_of(network_of(model))
    if known is None:
        raise ValueError("this model has no adapter: headway.adapt(model, method, ...) gives it one")
    return known


def refuse_merged(known: Adaptation, before: str) -> None:
    """Adapters that the weights hold can be neither chosen nor changed."""
    if known.merged:
        raise ValueError(f"adapters are merged into the weights: headway.adapt.unmerge(model) {before}")


def refuse_rows(net: nn.Module) -> None:
    """For who orders the rows of batches anew, or lets some leave: adapters chosen row by row would be others'."""
    known = adaptation_of(net)
    if known is not None and known.rows is not None:
        raise ValueError("adapters were chosen for each row of batches of your own (model.net, hidden, logits), "
                         "and here rows are sorted, and leave early: headway.adapt.use(model, name) first; embed and "
                         "generate take rows= themselves")  # fmt: skip


def state(model: Any, name: str | None = None) -> dict[str, Tensor]:
    """What is an adapter's, by name in the network's `state_dict`: its parameters, and the heads that train with it.

    Default: of all adapters.
    """
    net, known = network_of(model), known_of(model)
    names = [name] if name is not None else list(known.records)
    heads = {f"heads.{head}." for one in names for head in known.records[one].heads}
    return {
        key: tensor
        for key, tensor in net.state_dict().items()
        if any(f"{INSIDE}{one}." in f".{key}" for one in names) or any(key.startswith(head) for head in heads)
    }
