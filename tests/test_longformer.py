"""Longformer: its definition written out, the fast path against it, the published layer, streams, refusals."""

from typing import Any

import pytest
import torch
from drawn import integers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import headway.testing
from headway import mixers
from headway.block import Stack
from headway.mask import Mask
from headway.mixers.longformer import Longformer, reference
from headway.positions import Alibi, Positions, Rotary, positions_of
from headway.spec import StackSpec, convert
from headway.state import KeyValue
from headway.testing import check_mixer

WIDTH = 8


def made(width: int = WIDTH, positions: Positions | None = None, **options: Any) -> Longformer:
    mixer = mixers.build({"name": "longformer", **options}, width, positions or Positions())
    assert isinstance(mixer, Longformer)
    return mixer.double()


def flags(length: int, *rows: tuple[int, ...]) -> Tensor:
    return torch.stack([torch.isin(torch.arange(length), torch.tensor(row)) for row in rows])


def with_globals(where: Tensor, **facts: Any) -> Mask:
    return Mask(window=(None, None), globals=where, **facts)


# --- The contract


@pytest.mark.parametrize(
    "options",
    [
        {"window": [2, 0], "bias": True},
        {"window": 1, "dilation": 2},
        {"window": [2, 1], "dilation": [1, 1, 2, 3], "head_dim": 6, "positions": "none"},
        {"window": 1, "dilation": 9, "heads": 1},  # steps longer than the text
    ],
    ids=str,
)
def test_longformer_keeps_its_contract(options: dict[str, Any]) -> None:
    held = check_mixer("longformer", **options)
    assert {"packing_changes_nothing", "streamed_equals_parallel", "state_bytes_are_as_stated"} <= set(held)


@pytest.mark.parametrize("dilation", [1, 2])
def test_its_global_projections_keep_the_contract(dilation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but one claim: without global tokens, as that claim looks at it, nothing runs through them."""
    monkeypatch.delitem(headway.testing.CLAIMS, headway.testing.every_parameter_gets_a_gradient)
    options = {"window": 1, "dilation": dilation, "global_projections": True}
    assert "fast_equals_reference" in check_mixer("longformer", **options)


def test_with_a_global_token_every_global_projection_gets_a_gradient() -> None:
    mixer = made(window=1, bias=True, global_projections=True)
    x, pos = torch.randn(1, 6, WIDTH).double(), torch.arange(6)[None]
    (mixer(x, mask=with_globals(flags(6, (2,))), pos=pos) * torch.randn(1, 6, WIDTH)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())
    still = {name for name, p in mixer.named_parameters() if p.grad is not None and p.grad.abs().sum() < 1e-9}
    assert still == {"global_key.bias"}  # it shifts all scores of a query alike, which a softmax does not see


# --- The definition


def seen_from(t: int, length: int, window: tuple[int, int], dilation: int, is_global: list[bool]) -> list[int]:
    """The tokens that token t sees, as the paper draws them: counted off step by step, and the global ones."""
    if is_global[t]:
        return list(range(length))
    steps = range(-window[0], window[1] + 1)
    near = [t + j * dilation for j in steps if 0 <= t + j * dilation < length]
    return sorted({*near, *(g for g in range(length) if is_global[g])})


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_the_definition_is_a_softmax_over_what_each_token_sees(causal: bool, separate: bool) -> None:
    length, dilation = 9, [1, 2, 3, 2]
    mixer = made(window=[2, 1], dilation=dilation, global_projections=separate, bias=True)
    is_global, x, pos = flags(length, (4, 7)), torch.randn(1, length, WIDTH).double(), torch.arange(length)[None]
    q, k, v = mixer.project(x, pos)
    special = mixer.project_global(x, pos, x, pos) if separate else (q, k, v)
    y = torch.zeros(1, length, WIDTH).double()
    for head, every in enumerate(dilation):
        for t in range(length):
            seen = seen_from(t, length, (2, 1), every, is_global[0].tolist())
            seen = [s for s in seen if s <= t or not causal]
            query, keys, values = special if is_global[0, t] else (q, k, v)
            shares = (keys[0, head, seen] @ query[0, head, t] / 2**0.5).softmax(0)
            y[0, t, 2 * head : 2 * head + 2] = shares @ values[0, head, seen]
    torch.testing.assert_close(reference(mixer, x, with_globals(is_global, causal=causal), pos), mixer.out(y))


@st.composite
def calls(draw: st.DrawFn) -> tuple[dict[str, Any], Mask, Tensor]:
    rows, length = draw(st.integers(1, 2)), draw(st.integers(1, 9))
    reach, dilations = st.integers(0, 3), st.integers(1, 4)
    options = {
        "window": draw(reach | st.tuples(reach, reach)),
        "dilation": draw(dilations | st.tuples(*[dilations] * 4)),
        "global_projections": draw(st.booleans()),
        "positions": draw(st.sampled_from([Positions(), Rotary(2, 100.0)])),
    }
    asked = draw(st.sets(st.sampled_from(["causal", "window", "globals", "padding", "segments", "also"])))
    mask, pos = Mask(causal="causal" in asked), torch.arange(length).expand(rows, -1)
    if "segments" in asked:
        segments = integers(draw, rows, length, 0, 1).cumsum(1)
        starts = torch.where(segments.diff(dim=1, prepend=segments[:, :1] - 1) != 0, pos, 0).cummax(1).values
        pos, mask = pos - starts, mask & Mask(segments=segments)
    if "padding" in asked and "segments" not in asked:
        lengths = integers(draw, rows, 1, 1, length)
        valid = torch.arange(length) < lengths
        valid = valid.flip(1) if draw(st.booleans()) else valid
        pos, mask = positions_of(valid, rows, length, valid.device), mask & Mask(valid=valid)
    side = st.none() | st.integers(0, 5)
    if asked & {"window", "globals"}:
        window = (draw(side), draw(side)) if "window" in asked else (None, None)
        where = integers(draw, rows, draw(st.integers(1, 9)), 0, 1).bool() if "globals" in asked else None
        mask = mask & Mask(window=window, globals=where)
    if "also" in asked:  # a window that does not merge with the other
        mask = mask & Mask(window=(draw(side), draw(side)), globals=integers(draw, rows, length, 0, 1).bool())
    return options, mask, pos


@settings(max_examples=100)
@given(calls())
def test_the_fast_path_equals_the_definition_with_its_gradients(call: tuple[dict[str, Any], Mask, Tensor]) -> None:
    options, mask, pos = call
    mixer, x = made(**options), torch.randn(*pos.shape, WIDTH, dtype=torch.double, requires_grad=True)
    parts = [x, *mixer.parameters()]

    def run(compute: Any) -> list[Tensor]:
        y = compute(mixer, x, mask=mask, pos=pos)[pos >= 0]
        probe = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        return [y, *torch.autograd.grad((y * probe).sum(), parts, materialize_grads=True)]

    fast, slow = run(lambda m, *args, **named: m(*args, **named)), run(reference)
    for got, want in zip(fast, slow, strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("dilation", "where"), [(1, ()), (1, (3, 900)), ((1, 2, 4, 4), ()), (2, (3, 900))], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_no_tensor_of_all_pairs_is_made(causal: bool, dilation: int | list[int], where: tuple[int, ...]) -> None:
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            y = func(*args, **(kwargs or {}))
            self.size = max(
                [self.size, *(t.numel() for t in (y if isinstance(y, tuple) else (y,)) if torch.is_tensor(t))]
            )
            return y

    length, window = 1024, 8
    mixer = made(window=window, dilation=dilation, global_projections=True)
    x, pos = torch.randn(1, length, WIDTH, dtype=torch.double, requires_grad=True), torch.arange(length)[None]
    mask = with_globals(flags(length, where), causal=causal) if where else Mask(causal=causal)
    with Largest() as made_in_all:
        mixer(x, mask=mask, pos=pos).sum().backward()
    assert made_in_all.size <= length * 8 * window < length**2 // 8


# --- The published layer


def published_weights(layer: nn.Module, out: nn.Linear | None = None) -> dict[str, Tensor]:
    """The weights of transformers' LongformerSelfAttention, and of the projection behind it, by the names of ours."""
    theirs = layer.state_dict()
    found = {}
    for kind in ("weight", "bias"):
        found[f"query_key.{kind}"] = torch.cat([theirs[f"query.{kind}"], theirs[f"key.{kind}"]])
        found[f"value.{kind}"] = theirs[f"value.{kind}"]
        for name in ("query", "key", "value"):
            found[f"global_{name}.{kind}"] = theirs[f"{name}_global.{kind}"]
    inner = theirs["value.weight"].shape[0]
    found["out.weight"] = torch.eye(inner) if out is None else out.weight.detach()
    found["out.bias"] = torch.zeros(inner) if out is None else out.bias.detach()
    return found


def published(width: int, heads: int, window: int) -> Any:
    """A layer of transformers with weights large enough that attention is far from even."""
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = LongformerConfig(
        hidden_size=width, num_attention_heads=heads, attention_window=[window], attention_probs_dropout_prob=0.0
    )
    layer = LongformerSelfAttention(config, 0)
    for name, parameter in layer.named_parameters():
        nn.init.normal_(parameter, std=0.5 if name.endswith("bias") else 2 * width**-0.5)
    return layer.eval()


def run_published(layer: Any, x: Tensor, valid: Tensor, is_global: Tensor) -> Tensor:
    """Pads to a multiple of the window, as its model does, and cuts the padding off again."""
    length, window = x.shape[1], 2 * layer.one_sided_attn_window_size
    lack = -length % window
    x = nn.functional.pad(x, (0, 0, 0, lack))
    valid, is_global = (nn.functional.pad(t, (0, lack)) for t in (valid, is_global))
    additive = torch.where(valid, torch.where(is_global, 10000.0, 0.0), -10000.0)
    (y,) = layer(
        x,
        attention_mask=additive,
        is_index_masked=~valid,
        is_index_global_attn=is_global,
        is_global_attn=bool(is_global.any()),
    )
    return y[:, :length]


@pytest.mark.parametrize("where", [((), ()), ((0,), (0,)), ((0, 5, 20), (7,)), ((3,), ())], ids=str)
@pytest.mark.parametrize(("length", "second"), [(32, 32), (32, 19), (29, 29), (29, 13)])
def test_it_equals_the_published_layer(length: int, second: int, where: tuple[tuple[int, ...], ...]) -> None:
    layer = published(width=16, heads=4, window=8)
    mixer = mixers.build({"name": "longformer", "window": 4, "bias": True, "global_projections": True}, 16, Positions())
    mixer.load_state_dict(published_weights(layer))
    valid, is_global = torch.arange(length) < torch.tensor([[length], [second]]), flags(length, *where)
    mask = with_globals(is_global, valid=None if second == length else valid)
    x = torch.randn(2, length, 16)
    ours = mixer(x, mask=mask, pos=positions_of(valid, 2, length, x.device))
    theirs = run_published(layer, x, valid, is_global)
    assert theirs.std() > 0.3
    torch.testing.assert_close(ours[valid], theirs[valid], atol=1e-4, rtol=1e-4)


# --- In a stack, and in a stream


def stack(*windows: Any, **options: Any) -> Stack:
    mixer = {"name": "longformer", "heads": 2, **options}
    blocks = [{"mixer": {**mixer, "window": window}, "feedforward": {"hidden": 16}} for window in windows]
    return Stack(convert({"blocks": blocks}, StackSpec), WIDTH).double()


def test_in_an_encoder_a_global_token_carries_news_from_end_to_end() -> None:
    encoder, length = stack(1, 2, dilation=[1, 2], global_projections=True), 16
    x, pos = torch.randn(1, length, WIDTH, dtype=torch.double, requires_grad=True), torch.arange(length)[None]

    def reached(mask: Mask) -> Tensor:
        y = encoder(x, mask=mask, pos=pos)
        return torch.autograd.grad((y[0, -1] * torch.arange(WIDTH)).sum(), x)[0][0].abs().sum(-1) > 1e-12

    alone = reached(Mask())
    assert alone.tolist() == [t >= length - 1 - 2 * 1 - 2 * 2 for t in range(length)]  # one layer behind the other
    assert bool(reached(with_globals(flags(length, (4,)))).all())


@pytest.mark.parametrize("options", [{}, {"dilation": 3}, {"dilation": [1, 2], "global_projections": True}], ids=str)
@pytest.mark.parametrize("left", [0, 3])
def test_a_decoder_streams_what_it_computes_in_parallel(options: dict[str, Any], left: int) -> None:
    decoder, length = stack([2, 0], 3, **options), 20
    valid = torch.arange(length) >= torch.tensor([[0], [left]])
    x, pos = torch.randn(2, length, WIDTH).double(), positions_of(valid, 2, length, valid.device)
    with torch.no_grad():
        parallel = decoder(x, mask=Mask(causal=True, valid=valid if left else None), pos=pos)
        for chunks in ((1,) * length, (7, 1, 1, 9, 2)):
            states, parts = decoder.init_state(2, length), []
            for part, there, at in zip(x.split(chunks, 1), valid.split(chunks, 1), pos.split(chunks, 1), strict=True):
                mask = Mask(causal=True, valid=None if bool(there.all()) else there)
                parts.append(decoder(part, mask=mask, pos=at, state=states))
            torch.testing.assert_close(torch.cat(parts, 1)[valid], parallel[valid])
    steps = max(decoder.blocks[1].mixer.inner.dilations)
    assert [state.k.shape[2] for state, _ in states if state is not None] == [2 * steps, 3 * steps]


def test_a_window_of_the_mask_narrows_a_stream_as_it_narrows_the_whole() -> None:
    mixer, mask = made(window=3, dilation=2), Mask(causal=True, window=(4, 0))
    x, pos, state = torch.randn(1, 12, WIDTH).double(), torch.arange(12)[None], None
    state = mixer.init_state(1, 12)
    streamed = [mixer(x[:, t : t + 1], mask=mask, pos=pos[:, t : t + 1], state=state) for t in range(12)]
    torch.testing.assert_close(torch.cat(streamed, 1), reference(mixer, x, mask, pos))
    assert not torch.allclose(reference(mixer, x, mask, pos), reference(mixer, x, Mask(causal=True), pos))


# --- What is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heads": 3}, "width 8 is no multiple of 3 heads"),
        ({"dilation": [1, 2]}, "2 dilations for 4 heads: give one, or one a head"),
        ({"window": [1, 2, 3]}, r"has two sides, left and right, and \[1, 2, 3\] has 3"),
        ({"window": -1}, "Expected `int` >= 0 at `window`"),
        ({"window": 2**25}, "Expected `int` <= 16777216 at `window`"),
        ({"dilation": 0}, "Expected `int` >= 1 at `dilation`"),
        ({"positions": Alibi()}, "alibi adds to the score of every pair, which is T x T: choose rotary"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        made(**options)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (Mask(), "only under a causal mask"),
        (Mask(causal=True, segments=torch.zeros(1, 2, dtype=torch.long)), "cannot stream packed segments"),
        (with_globals(flags(2, (0,)), causal=True), "remembers 6 tokens, and a global one sees all of its past"),
    ],
)
def test_a_stream_that_would_need_more_than_it_remembers_is_refused(mask: Mask, words: str) -> None:
    mixer, x = made(window=[3, 3], dilation=2), torch.randn(1, 2, WIDTH).double()
    with pytest.raises(ValueError, match=words):
        mixer(x, mask=mask, pos=torch.arange(2)[None], state=mixer.init_state(1, 2))


def test_what_it_has_no_place_for_is_refused() -> None:
    mixer, x, pos = made(), torch.randn(1, 2, WIDTH).double(), torch.arange(2)[None]
    with pytest.raises(ValueError, match="longformer streams with a Ring, not KeyValue: use init_state"):
        mixer(x, mask=Mask(causal=True), pos=pos, state=KeyValue(2))
    with pytest.raises(ValueError, match="longformer reads no context: choose attention"):
        mixer.init_state(1, 2, cross=True)
    with pytest.raises(ValueError, match="Longformer cannot do sinks"):
        mixer(x, mask=Mask(window=(1, 0), sinks=1), pos=pos)
