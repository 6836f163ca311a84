"""A mixer from outside is one file and no more; the contract suite lets none pass that breaks its word."""

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn

from headway import mixers, models
from headway.attend import reference
from headway.kernels import sdpa
from headway.mask import Mask
from headway.mixers import Cost, attention, summary
from headway.state import Recurrent
from headway.testing import check_mixer

NAME = "outsider.mean"
MEAN = '''
"""The mean of all tokens so far, or of all there are."""
import torch
from torch import nn

from headway.mixers import Cost, Mixer
from headway.state import Recurrent


class Mean(Mixer):
    CAN = frozenset({"causal", "bidirectional", "padding", "stream"})

    def __init__(self, width: int, *, positions=None, scale: float = 1.0) -> None:
        super().__init__()
        self.width, self.scale = width, scale
        self.out = nn.Linear(width, width)

    def forward(self, x, *, mask, pos, state=None, context=None):
        self.require(mask, state, context)
        there = torch.ones_like(x[..., 0], dtype=torch.bool) if mask.valid is None else mask.valid
        count, total = there[..., None].to(x.dtype), x.masked_fill(~there[..., None], 0)
        if mask.causal:
            count, total = count.cumsum(1), total.cumsum(1)
        elif state is None:
            count, total = (t.sum(1, keepdim=True).expand_as(t) for t in (count, total))
        else:
            raise ValueError("mean streams only under a causal mask")
        if state is not None:
            count, total = count + state.tensors[0][:, None], total + state.tensors[1][:, None]
            state.tensors = count[:, -1], total[:, -1]
        return self.out(self.scale * total / count.clamp(min=1))

    def init_state(self, batch, capacity, cross=False):
        like = self.out.weight
        return Recurrent(like.new_zeros(batch, 1), like.new_zeros(batch, self.width))

    def cost(self, length, context_length=None):
        return Cost(2 * length * self.width**2, 4 * (self.width + 1), 4 * length * self.width)
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of the user's own, on the path and not yet imported."""
    (tmp_path / "outsider").mkdir()
    (tmp_path / "outsider" / "mean.py").write_text(MEAN)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "outsider"
    for name in [name for name in sys.modules if name.split(".")[0] == "outsider"]:
        del sys.modules[name]


@pytest.fixture
def mean(folder: Path) -> ModuleType:
    return importlib.import_module(NAME)


def model_spec() -> dict[str, Any]:
    block = {"mixer": {"name": NAME, "scale": 2.0}, "feedforward": {"hidden": 32}}
    return {
        "kind": "seq2seq",
        "width": 16,
        "source_vocab": 8,
        "target_vocab": 8,
        "encoder": {"blocks": [block], "positions": {"name": "sinusoidal"}},
        "decoder": {"blocks": [block | {"cross": {"name": "attention", "heads": 2}}]},
    }


def test_the_suite_imports_what_it_is_asked_to_check(folder: Path) -> None:
    held = check_mixer(NAME, scale=0.5)
    assert {"padding_changes_nothing", "streamed_equals_parallel", "state_reorders", "flops_are_as_stated"} <= set(held)
    assert not {"packing_changes_nothing", "fast_equals_reference", "context_is_written_once"} & set(held)


def test_checking_leaves_the_random_numbers_alone(mean: ModuleType) -> None:
    torch.manual_seed(3)
    expected = torch.randn(2)
    torch.manual_seed(3)
    check_mixer(NAME)
    assert torch.equal(torch.randn(2), expected)


def test_a_spec_that_names_an_outsider_survives_json(mean: ModuleType) -> None:
    spec = model_spec()
    parsed = models.parse(json.loads(json.dumps(spec)))
    assert parsed == models.parse({"kind": "seq2seq", **msgspec.to_builtins(parsed)}) == models.parse(spec)
    with pytest.raises(ValueError, match=f"mixer {NAME}: unknown key 'scal'; did you mean 'scale'"):
        mixers.options({"name": NAME, "scal": 1.0})


def test_a_model_of_outsiders_learns_and_decodes_from_its_cache(mean: ModuleType) -> None:
    model: Any = models.build(model_spec())
    source = torch.randint(8, (16, 6))
    target = torch.cat([torch.zeros(16, 1, dtype=torch.long), source[:, :4]], 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    losses = []
    for _ in range(30):
        logits = model(source, target[:, :-1])
        losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]

    model.eval()
    with torch.no_grad():
        memory, state = model.encode(source), model.init_state(16, 5)
        steps = [
            model.decode(target[:, t : t + 1], memory, pos=torch.full((16, 1), t), state=state)
            for t in range(target.shape[1])
        ]
        torch.testing.assert_close(torch.cat(steps, 1), model.decode(target, memory))


def test_a_spec_never_imports(folder: Path) -> None:
    (folder / "trap.py").write_text(f"open({str(folder / 'sprung')!r}, 'w').close()\n" + MEAN)
    spec = model_spec()
    spec["encoder"]["blocks"][0]["mixer"]["name"] = "outsider.trap"
    with pytest.raises(ValueError, match=r"'outsider\.trap' is not imported, .* `import outsider.trap` before"):
        models.build(spec)
    assert not (folder / "sprung").exists() and "outsider.trap" not in sys.modules


@pytest.mark.parametrize(("source", "count"), [("", 0), (MEAN + "\n\nclass Second(Mixer):\n    pass\n", 2)])
def test_a_file_defines_one_mixer(folder: Path, source: str, count: int) -> None:
    (folder / "mean.py").write_text(source)
    with pytest.raises(ValueError, match=f"a mixer's file defines one Mixer; {NAME} defines {count}"):
        check_mixer(NAME)


def test_a_mixer_that_is_not_there_is_an_import_error(folder: Path) -> None:
    with pytest.raises(ModuleNotFoundError):
        check_mixer("outsider.nothing")


# --- Every claim can fail: each fault below breaks one promise, and the suite names it


def looks_ahead(kind: Any) -> None:
    forward = kind.forward
    kind.forward = lambda self, x, *, mask, **rest: forward(self, x, mask=replace(mask, causal=False), **rest)


def counts_padding(kind: Any) -> None:
    forward = kind.forward

    def counting(self: Any, x: Tensor, *, mask: Mask, pos: Tensor, state: Any = None, context: Any = None) -> Tensor:
        self.require(mask, state, context)
        if mask.valid is not None and state is None:
            x, mask = x.masked_fill(~mask.valid[..., None], 0), replace(mask, valid=None)
        return forward(self, x, mask=mask, pos=pos, state=state, context=context)

    kind.forward = counting


def forgets(kind: Any) -> None:
    forward = kind.forward

    def forgetting(self: Any, x: Tensor, *, state: Any = None, **rest: Any) -> Tensor:
        copy = None if state is None else Recurrent(*state.tensors)
        return forward(self, x, state=copy, **rest)

    kind.forward = forgetting


def never_reorders(kind: Any) -> None:
    class Stuck(Recurrent):
        def reorder(self, rows: Tensor) -> None:
            self.tensors = tuple(tensor[:1].expand(len(rows), -1) for tensor in self.tensors)

    init_state = kind.init_state
    kind.init_state = lambda *given, **named: Stuck(*init_state(*given, **named).tensors)


def understates_bytes(kind: Any) -> None:
    kind.cost = lambda self, length, context_length=None: Cost(2 * length * self.width**2, 0, 4 * length * self.width)


def understates_flops(kind: Any) -> None:
    kind.cost = lambda self, length, context_length=None: Cost(0, 4 * (self.width + 1), 4 * length * self.width)


def has_a_dead_parameter(kind: Any) -> None:
    start = kind.__init__

    def starting(self: Any, width: int, *, positions: Any = None) -> None:
        start(self, width)
        self.dead = nn.Parameter(torch.zeros(3))

    kind.__init__ = starting


def has_an_infinite_gradient(kind: Any) -> None:
    forward = kind.forward
    kind.forward = lambda self, x, **rest: forward(self, x, **rest) + (0 * self.out.weight.sum()).sqrt()


def refuses_nothing(kind: Any) -> None:
    kind.require = lambda self, mask, state=None, context=None: None


def claims_too_much(kind: Any) -> None:
    kind.CAN = kind.CAN | {"window"}


def claims_too_little(kind: Any) -> None:
    kind.CAN = frozenset({"causal", "bidirectional", "padding"})
    kind.require = lambda self, mask, state=None, context=None: type(self).__base__.require(self, mask, None, context)


def refuses_what_it_claims(kind: Any) -> None:
    def refusing(self: Any, mask: Mask, state: Any = None, context: Any = None) -> None:
        raise ValueError("not today")

    kind.require = refusing


def changes_the_type(kind: Any) -> None:
    forward = kind.forward
    kind.forward = lambda self, x, **rest: forward(self, x, **rest).double()


@pytest.mark.parametrize(
    ("fault", "claim"),
    [
        (looks_ahead, "the_future_does_not_leak"),
        (counts_padding, "padding_changes_nothing"),
        (forgets, "streamed_equals_parallel"),
        (never_reorders, "state_reorders"),
        (understates_bytes, "state_bytes_are_as_stated"),
        (understates_flops, "flops_are_as_stated"),
        (has_a_dead_parameter, "every_parameter_gets_a_gradient"),
        (has_an_infinite_gradient, "every_parameter_gets_a_gradient"),
        (refuses_nothing, "can_is_true"),
        (claims_too_much, "masks_are_honoured"),
        (claims_too_little, "can_is_true"),
        (refuses_what_it_claims, "can_is_true"),
        (changes_the_type, "shape_and_type_are_kept"),
    ],
)
def test_a_fault_is_found_and_named(mean: Any, fault: Callable[[Any], None], claim: str) -> None:
    fault(mean.Mean)
    assert f"{NAME}: {claim}: " in broken(NAME)


def broken(name: str, **options: Any) -> str:
    with pytest.raises(AssertionError) as caught:
        check_mixer(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "run", lambda *given: 1.01 * reference(*given))
    assert "attention: fast_equals_reference: output, under " in broken("attention", heads=2)


def test_packing_told_by_index_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    own = attention.Attention._own

    def counting(self: Any, q: Tensor, x: Tensor, mask: Mask, pos: Tensor, *rest: Any) -> Tensor:
        at = torch.arange(pos.shape[1]).expand_as(pos) if mask.segments is not None else pos
        return own(self, q, x, mask, at, *rest)

    monkeypatch.setattr(attention.Attention, "_own", counting)
    assert "packing_changes_nothing" in broken("attention", heads=2, window=[1, 0], sinks=1)


@pytest.mark.parametrize(
    ("ends", "claim"),
    [
        (lambda context, valid: (context[:, 0], context[:, -1]), "masks_are_honoured"),
        (
            lambda context, valid: (
                (context[:, 0],) * 2 if valid is None else ((context * valid[..., None]).mean(1),) * 2
            ),
            "context_padding_changes_nothing",
        ),
    ],
)
def test_a_context_read_wrongly_is_found(ends: Any, claim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "_ends", ends)
    assert f"summary: {claim}: " in broken("summary")


def test_a_context_read_again_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    read = summary.Summary._summary

    def again(self: Any, context: Tensor, valid: Tensor | None, state: Any) -> Tensor:
        if state is not None:
            state.kept = ()
        return read(self, context, valid, state)

    monkeypatch.setattr(summary.Summary, "_summary", again)
    assert "summary: context_is_written_once: " in broken("summary")
