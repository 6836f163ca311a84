"""The contract over every mixer there is, in all its shapes, and each mixer against its definition written out."""

from typing import Any

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from headway import mixers
from headway.mask import Mask
from headway.mixers import Mixer
from headway.positions import Positions
from headway.testing import check_mixer

# Options that have no default.
NEEDED: dict[str, dict[str, Any]] = {"attention": {"heads": 4}, "linformer": {"heads": 4}}
FURTHER: list[tuple[str, dict[str, Any]]] = [
    ("attention", {"heads": 4, "kv_heads": 2}),
    ("attention", {"heads": 4, "kv_heads": 1, "bias": True, "positions": "alibi"}),
    ("attention", {"heads": 2, "head_dim": 6, "positions": "none"}),
    ("attention", {"heads": 4, "window": [2, 0]}),
    ("attention", {"heads": 4, "window": [1, 2], "sinks": 2, "positions": "alibi"}),
    ("attention", {"heads": 2, "window": [None, 1]}),
    ("attention", {"heads": 2, "window": [0, 0], "sinks": 1}),
    ("rnn", {"cell": "gru", "hidden": 6}),
    ("rnn", {"hidden": 20}),
    ("rnn", {"bidirectional": True}),
    ("rnn", {"cell": "gru", "bidirectional": True}),
    ("conv", {"kernel": 1}),
    ("conv", {"kernel": 4, "gated": False}),
    ("conv", {"kernel": 3, "dilation": 2, "depthwise": True}),
    ("conv", {"kernel": 2, "dilation": 3, "depthwise": True, "gated": False}),
]


@pytest.mark.parametrize("name", mixers.names())
def test_a_mixer_keeps_its_contract(name: str) -> None:
    assert "can_is_true" in check_mixer(name, **NEEDED.get(name, {}))


@pytest.mark.parametrize(("name", "options"), FURTHER)
def test_a_mixer_keeps_its_contract_in_other_shapes(name: str, options: dict[str, Any]) -> None:
    assert "flops_are_as_stated" in check_mixer(name, **options)


@pytest.mark.long
@pytest.mark.filterwarnings("default")  # the compiler warns of itself
@pytest.mark.parametrize("name", mixers.names())
def test_compiling_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the compiler cannot trace a check of shapes
    assert "compiled_equals_eager" in check_mixer(name, compiled=True, **NEEDED.get(name, {}))


def test_no_claim_is_skipped_that_a_mixer_can_keep() -> None:
    held = {name: set(check_mixer(name, **NEEDED.get(name, {}))) for name in ("attention", "rnn", "conv", "summary")}
    self_only = {"padding_changes_nothing", "streamed_equals_parallel", "state_reorders", "the_future_does_not_leak"}
    assert held["rnn"] == held["conv"] and self_only <= held["rnn"]
    assert held["attention"] - held["rnn"] == {
        "packing_changes_nothing",
        "fast_equals_reference",
        "context_padding_changes_nothing",
        "context_is_written_once",
    }
    assert held["summary"] & self_only == {"the_future_does_not_leak"}
    assert {"context_padding_changes_nothing", "context_is_written_once"} <= held["summary"]


# --- Each against its definition, a token at a time


def made(name: str, width: int = 8, **options: Any) -> Mixer:
    return mixers.build({"name": name, **options}, width, Positions()).double()


def tokens(length: int = 6, width: int = 8) -> Tensor:
    return torch.randn(2, length, width, dtype=torch.double)


def mixed(mixer: Mixer, x: Tensor, mask: Mask, context: Tensor | None = None) -> Tensor:
    return mixer(x, mask=mask, pos=torch.arange(x.shape[1]).expand(len(x), -1), context=context)


def lstm_by_hand(cell: Any, x: Tensor) -> Tensor:
    h = c = x.new_zeros(len(x), cell.hidden_size)
    outputs = []
    for token in x.unbind(1):
        gates = token @ cell.weight_ih_l0.T + cell.bias_ih_l0 + h @ cell.weight_hh_l0.T + cell.bias_hh_l0
        enter, forget, new, leave = gates.chunk(4, -1)
        c = forget.sigmoid() * c + enter.sigmoid() * new.tanh()
        h = leave.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs, 1)


def gru_by_hand(cell: Any, x: Tensor) -> Tensor:
    h = x.new_zeros(len(x), cell.hidden_size)
    outputs = []
    for token in x.unbind(1):
        reset_x, update_x, new_x = (token @ cell.weight_ih_l0.T + cell.bias_ih_l0).chunk(3, -1)
        reset_h, update_h, new_h = (h @ cell.weight_hh_l0.T + cell.bias_hh_l0).chunk(3, -1)
        update = (update_x + update_h).sigmoid()
        h = update * h + (1 - update) * (new_x + (reset_x + reset_h).sigmoid() * new_h).tanh()
        outputs.append(h)
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("cell", "by_hand"), [("lstm", lstm_by_hand), ("gru", gru_by_hand)])
def test_an_rnn_is_its_equations(cell: str, by_hand: Any, bidirectional: bool) -> None:
    rnn: Any = made("rnn", cell=cell, hidden=5, bidirectional=bidirectional)
    x = tokens()
    h = by_hand(rnn.ahead, x)
    if bidirectional:
        h = torch.cat([h, by_hand(rnn.back, x.flip(1)).flip(1)], -1)
    torch.testing.assert_close(mixed(rnn, x, Mask(causal=not bidirectional)), rnn.out(h))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("depthwise", [True, False])
@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (3, 1), (3, 2), (4, 1)])
def test_a_convolution_is_a_sum_over_its_neighbours(
    kernel: int, dilation: int, depthwise: bool, gated: bool, causal: bool
) -> None:
    conv: Any = made("conv", kernel=kernel, dilation=dilation, depthwise=depthwise, gated=gated)
    x = tokens()
    reach = (kernel - 1) * dilation
    start = -reach if causal else -(reach // 2)
    outputs = []
    for t in range(x.shape[1]):
        places = [t + start + i * dilation for i in range(kernel)]
        seen = [x[:, p] if 0 <= p < x.shape[1] else torch.zeros_like(x[:, 0]) for p in places]
        if depthwise:
            taps = conv.taps.weight
            h = sum((taps[:, i] * token for i, token in enumerate(seen)), conv.taps.bias) @ conv.mix.weight.T
        else:
            kernels = conv.mix.weight.unflatten(1, (kernel, -1))  # one matrix a place
            h = sum(token @ kernels[:, i].T for i, token in enumerate(seen))
        h = h + conv.mix.bias
        outputs.append(conv.out(F.glu(h) if gated else F.gelu(h)))
    torch.testing.assert_close(mixed(conv, x, Mask(causal=causal)), torch.stack(outputs, 1))


def attention_by_hand(attention: Any, x: Tensor, context: Tensor, allowed: Tensor) -> Tensor:
    size, heads, groups = attention.head_dim, attention.heads, attention.kv_heads
    q, kv = attention.query(x), attention.key_value(context)
    read = []
    for h in range(heads):
        g = h * groups // heads
        key = kv[..., g * size : (g + 1) * size]
        value = kv[..., (groups + g) * size : (groups + g + 1) * size]
        scores = q[..., h * size : (h + 1) * size] @ key.mT / size**0.5
        read.append(scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ value)
    return attention.out(torch.cat(read, -1))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_is_its_equation_head_by_head(groups: int) -> None:
    attention = made("attention", heads=4, kv_heads=groups, bias=True)
    x, context = tokens(), tokens(3)
    lower = torch.ones(6, 6, dtype=torch.bool).tril()
    torch.testing.assert_close(mixed(attention, x, Mask(causal=True)), attention_by_hand(attention, x, x, lower))
    everything = torch.ones(6, 3, dtype=torch.bool)
    across = attention_by_hand(attention, x, context, everything)
    torch.testing.assert_close(mixed(attention, x, Mask(), context), across)


@pytest.mark.parametrize(
    "mask",
    [
        Mask(causal=True),
        Mask(causal=True, prefix=4),
        Mask(window=(1, 1)),
        Mask(causal=True, window=(1, 0), sinks=2),
        Mask(window=(1, 0), globals=torch.tensor([[False, False, True, False, False, False]])),
    ],
    ids=lambda mask: "-".join(sorted(mask.facts)),
)
def test_attention_sees_all_that_the_mask_allows(mask: Mask) -> None:
    attention: Any = made("attention", heads=2, window=(3, 3))
    pos = torch.arange(6).expand(2, -1)
    seen = attention.map(tokens(), mask=mask, pos=pos) > 0
    allowed = (mask & Mask(window=(3, 3))).allows(pos, pos)
    assert torch.equal(seen, allowed[:, None].expand_as(seen))


def test_the_map_is_what_forward_uses() -> None:
    attention: Any = made("attention", heads=2, window=(3, 0))
    x, pos = tokens(), torch.arange(6).expand(2, -1)
    shares = attention.map(x, mask=Mask(causal=True), pos=pos)
    value = attention.key_value(x).chunk(2, -1)[1].unflatten(-1, (2, 4)).transpose(1, 2)
    by_hand = attention.out((shares @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(by_hand, attention(x, mask=Mask(causal=True), pos=pos))


def test_a_summary_is_the_two_ends_of_the_context() -> None:
    summary: Any = made("summary")
    x, context = tokens(), tokens(4)
    valid = torch.tensor([[True, True, True, False], [False, True, True, True]])
    ends = torch.stack([torch.cat([context[0, 0], context[0, 2]]), torch.cat([context[1, 1], context[1, 3]])])
    torch.testing.assert_close(mixed(summary, x, Mask(valid=valid), context), summary.out(ends)[:, None].expand_as(x))


# --- What is refused


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("attention", {"heads": 3}, "width 8 is no multiple of 3 heads"),
        ("attention", {"heads": 4, "kv_heads": 3}, "4 heads do not share 3 kv_heads"),
        ("attention", {"heads": 4, "sinks": 2}, "add window="),
        ("conv", {"kernel": 3, "dilation": 10**6}, "reaches over 65536 tokens"),
    ],
)
def test_options_that_do_not_fit_are_refused(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        made(name, **options)


def test_what_a_mixer_cannot_do_is_refused_with_what_it_can() -> None:
    with pytest.raises(ValueError, match="Rnn cannot do window; it can do causal, padding, stream: change the mask"):
        mixed(made("rnn"), tokens(), Mask(causal=True, window=(1, 0)))
    with pytest.raises(ValueError, match="a mask over a context tells padding and segments, not causal"):
        mixed(made("attention", heads=2), tokens(), Mask(causal=True), tokens())
    with pytest.raises(ValueError, match="summary sums up a context and was given none"):
        mixed(made("summary"), tokens(), Mask())


@pytest.mark.parametrize("name", ["attention", "rnn", "conv", "summary"])
def test_a_state_of_another_kind_is_refused(name: str) -> None:
    mixer, wrong = made(name, **NEEDED.get(name, {})), "attention" if name in ("rnn", "conv") else "conv"
    state = made(wrong, **NEEDED.get(wrong, {})).init_state(2, 6)
    context = tokens() if name == "summary" else None
    mask, pos = Mask(causal=context is None), torch.arange(6).expand(2, -1)
    with pytest.raises(ValueError, match=f"{name} streams with a .*, not {type(state).__name__}"):
        mixer(tokens(), mask=mask, pos=pos, state=state, context=context)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (Mask(), "only under a causal mask"),
        (Mask(causal=True, prefix=3), "a chunk ends within"),
        (Mask(causal=True, prefix=torch.tensor([1, 3])), "a chunk ends within"),
    ],
)
def test_attention_streams_nothing_that_would_see_tokens_yet_to_come(mask: Mask, words: str) -> None:
    mixer, x = made("attention", heads=2), tokens(2)
    with pytest.raises(ValueError, match=words):
        mixer(x, mask=mask, pos=torch.arange(2).expand(2, -1), state=mixer.init_state(2, 2))
    whole = torch.cat([x, x], 1)
    mixer(whole, mask=Mask(causal=True, prefix=3), pos=torch.arange(4).expand(2, -1), state=mixer.init_state(2, 4))


@pytest.mark.parametrize("size", [-1, 0, 10**9])
def test_a_size_that_no_model_has_is_refused_by_its_name(size: int) -> None:
    for name, option in (("attention", "heads"), ("rnn", "hidden"), ("conv", "kernel"), ("conv", "dilation")):
        with pytest.raises(ValueError, match=f"mixer {name}: .* at `{option}`"):
            made(name, **{option: size})
