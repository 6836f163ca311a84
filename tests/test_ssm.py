"""The state space mixer: the contract, the equations token by token, and `transformers`' Mamba-2 with its weights."""

from typing import Any

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from headway import mixers
from headway.block import Stack
from headway.mask import Mask
from headway.positions import Positions, positions_of
from headway.spec import BlockSpec, StackSpec
from headway.testing import check_mixer

SHAPES: list[dict[str, Any]] = [
    {},
    {"head_dim": 8, "state_size": 6, "groups": 2, "kernel": 3},
    {"expand": 1, "head_dim": 4, "state_size": 5, "kernel": 1},
]


@pytest.mark.parametrize("options", SHAPES)
def test_it_keeps_its_contract(options: dict[str, Any]) -> None:
    held = set(check_mixer("ssm", **options))
    assert {"packing_changes_nothing", "padding_changes_nothing", "streamed_equals_parallel"} <= held


@pytest.mark.long
@pytest.mark.filterwarnings("default")  # the compiler warns of itself
def test_compiling_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the compiler cannot trace a check of shapes
    assert "compiled_equals_eager" in check_mixer("ssm", compiled=True, **SHAPES[1])


def made(width: int = 8, **options: Any) -> Any:
    mixer = mixers.build({"name": "ssm", **options}, width, Positions()).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # far from where it starts: every part is to matter
    return mixer


def mixed(mixer: Any, x: Tensor, mask: Mask) -> Tensor:
    return mixer(x, mask=mask, pos=positions_of(mask.valid, len(x), x.shape[1], x.device))


def by_hand(ssm: Any, x: Tensor) -> Tensor:
    """One row, a token and a head at a time."""
    inner, size, heads, n, groups = ssm.inner, ssm.head_dim, ssm.heads, ssm.state_size, ssm.groups
    states, seen, outputs = torch.zeros(heads, n, size, dtype=x.dtype), [], []
    for token in x:
        z, mixed, step = ssm.enter(token).split([inner, ssm.mixed, heads])
        seen = [*seen, mixed][-ssm.kernel :]
        taps = ssm.taps.weight[:, ssm.kernel - len(seen) :]
        mixed = F.silu((taps * torch.stack(seen, 1)).sum(1) + ssm.taps.bias)
        value, b, c = mixed.split([inner, groups * n, groups * n])
        read = []
        for h in range(heads):
            group = slice(h * groups // heads * n, (h * groups // heads + 1) * n)
            dt, channels = F.softplus(step[h] + ssm.steps.bias[h]), value[h * size : (h + 1) * size]
            fade = torch.exp(-dt * ssm.steps.a_log[h].exp())
            states[h] = fade * states[h] + dt * torch.outer(b[group], channels)
            read.append(c[group] @ states[h] + ssm.skip[h] * channels)
        y = torch.cat(read) * F.silu(z)
        y = torch.cat([part / (part.square().mean() + 1e-5).sqrt() for part in y.chunk(groups)])
        outputs.append(ssm.out(ssm.scale * y))
    return torch.stack(outputs)


@pytest.mark.parametrize("options", [{"head_dim": 4, "state_size": 5}, {"head_dim": 4, "state_size": 3, "groups": 2}])
def test_it_is_its_equations_token_by_token(options: dict[str, Any]) -> None:
    ssm, x = made(**options), torch.randn(70, 8, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(mixed(ssm, x[None], Mask(causal=True))[0], by_hand(ssm, x))


@pytest.mark.parametrize("groups", [1, 2])
def test_it_equals_mamba2_of_transformers_with_its_weights(groups: int) -> None:
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        hidden_size=32, expand=2, num_heads=8, head_dim=8, state_size=16, n_groups=groups, conv_kernel=4, chunk_size=16,
        num_hidden_layers=1,
    )  # fmt: skip
    theirs = Mamba2Mixer(config, 0).eval()
    for name, parameter in theirs.named_parameters():
        if name != "A_log":
            torch.nn.init.normal_(parameter, std=0.3)
    ours = mixers.build({"name": "ssm", "head_dim": 8, "state_size": 16, "groups": groups}, 32, Positions())
    names = {
        "enter.weight": "in_proj.weight", "taps.weight": "conv1d.weight", "taps.bias": "conv1d.bias",
        "steps.a_log": "A_log", "steps.bias": "dt_bias", "skip": "D", "scale": "norm.weight",
        "out.weight": "out_proj.weight",
    }  # fmt: skip
    weights = dict(theirs.named_parameters())
    assert sorted(names.values()) == sorted(weights)
    ours.load_state_dict({here: weights[names[here]].view_as(t) for here, t in ours.state_dict().items()})
    x = torch.randn(2, 75, 32)
    with torch.no_grad():
        wanted = theirs(x)
        assert wanted.abs().mean() > 0.1
        torch.testing.assert_close(mixed(ours, x, Mask(causal=True)), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_padding_of_any_content_changes_nothing_over_many_chunks(groups: int) -> None:
    ssm, x = made(head_dim=4, state_size=5, groups=groups), torch.randn(1, 150, 8, dtype=torch.double)
    alone = mixed(ssm, x, Mask(causal=True))
    for left, right in ((70, 0), (0, 70), (3, 66)):
        valid = F.pad(torch.ones(1, 150, dtype=torch.bool), (left, right))
        padded = F.pad(x, (0, 0, left, right), value=float("nan"))
        torch.testing.assert_close(mixed(ssm, padded, Mask(causal=True, valid=valid))[valid], alone[0])


def test_packing_changes_nothing_over_many_chunks_nor_through_the_convolution() -> None:
    ssm, x, sizes = made(head_dim=4, state_size=5), torch.randn(1, 150, 8, dtype=torch.double), (10, 90, 1, 2, 47)
    segments = torch.arange(5).repeat_interleave(torch.tensor(sizes))[None]
    packed = mixed(ssm, x, Mask(causal=True, segments=segments))
    torch.testing.assert_close(
        packed, torch.cat([mixed(ssm, part, Mask(causal=True)) for part in x.split(sizes, 1)], 1)
    )


def test_a_layer_in_runs_is_the_layer_on_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    ssm, x = made(head_dim=4, state_size=5), torch.randn(2, 100, 8, dtype=torch.double)
    valid = torch.arange(100) < torch.tensor([[100], [45]])
    for mask in (Mask(causal=True), Mask(causal=True, valid=valid)):
        with_gradients = mixed(ssm, x, mask)
        monkeypatch.setattr("headway.mixers.RUN", 33)
        with torch.no_grad():
            torch.testing.assert_close(mixed(ssm, x, mask), with_gradients)


def test_a_hybrid_stack_decodes_as_it_prefills() -> None:
    attention, ssm = {"name": "attention", "heads": 2}, {"name": "ssm", "head_dim": 8, "state_size": 6}
    stack = Stack(StackSpec(blocks=[BlockSpec(mixer=ssm), BlockSpec(mixer=attention)], repeat=2), 16).double().eval()
    x, pos = torch.randn(2, 80, 16, dtype=torch.double), torch.arange(80).expand(2, -1)
    with torch.no_grad():
        whole = stack(x, mask=Mask(causal=True), pos=pos)
        states = stack.init_state(2, 80)
        parts = [
            stack(x[:, part], mask=Mask(causal=True), pos=pos[:, part], state=states)
            for part in (slice(0, 70), *(slice(t, t + 1) for t in range(70, 80)))
        ]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_a_state_holds_no_more_than_it_says_however_long_the_prompt() -> None:
    ssm = made(head_dim=4, state_size=5)
    state = ssm.init_state(1, 1)
    for length in (50, 1, 1):
        x, pos = torch.randn(1, length, 8, dtype=torch.double), torch.arange(length)[None]
        ssm(x, mask=Mask(causal=True), pos=pos, state=state)
        assert sum(t.untyped_storage().nbytes() for t in state.tensors) == state.nbytes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"head_dim": 5}, "16 inner channels are no multiple of head_dim 5"),
        ({"head_dim": 4, "groups": 3}, "4 heads of 4 do not share 3 groups"),
        ({"kernel": 65}, "kernel"),
        ({"heads": 2}, "heads"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        made(**options)


def test_what_it_cannot_do_is_refused() -> None:
    x, ssm, pos = torch.randn(1, 4, 8, dtype=torch.double), made(), torch.arange(4)[None]
    with pytest.raises(ValueError, match="Ssm cannot do bidirectional"):
        mixed(ssm, x, Mask())
    other = mixers.build({"name": "attention", "heads": 2}, 8, Positions()).init_state(1, 4)
    with pytest.raises(ValueError, match="ssm streams with a Recurrent state, not KeyValue"):
        ssm(x, mask=Mask(causal=True), pos=pos, state=other)
    packed = Mask(causal=True, segments=torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="ssm cannot stream packed segments"):
        ssm(x, mask=packed, pos=pos, state=ssm.init_state(1, 4))
