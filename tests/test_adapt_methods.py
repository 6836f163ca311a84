"""Bottleneck adapters, (IA)^3, prefix and prompt tuning: what they compute, that nothing else changes, and what they
refuse."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from published import saved
from tiny import fresh, task, write_pairs
from torch import Tensor

import headway
from headway import adapt as adapting
from headway import load, models
from headway.adapt import adapt, bare, merge, unmerge, use
from headway.attend import reference
from headway.mask import Mask
from headway.probe.look import look
from headway.use.passes import passes

BERT, GPT2, LLAMA, T5 = ("bert", 3), ("gpt2", 1), ("llama", 2), ("t5", 0)
KINDS = ("houlsby", "pfeiffer", "parallel")
QUIET: list[tuple[str, dict[str, Any]]] = [("ia3", {}), *[("bottleneck", {"kind": kind}) for kind in KINDS]]
TOKENS: list[tuple[str, dict[str, Any]]] = [("prefix", {"length": 3}), ("prefix", {"length": 3, "hidden": 6}),
                                            ("prompt", {"length": 3})]  # fmt: skip
EVERY = QUIET + TOKENS
name_of = lambda one: one[0] + "".join(f"-{value}" for value in one[1].values())


def trained(model: Any, method: str, options: dict[str, Any], **more: Any) -> Any:
    """The model with an adapter of random values, so that a mistake shows."""
    adapt(model, method, **options, **more)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in mine(model.net):
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def mine(net: Any) -> Iterator[Tensor]:
    return (parameter for name, parameter in net.named_parameters() if ".adapters." in f".{name}")


def given(case: tuple[str, int]) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(4)
    ids = torch.randint(5, 90, (2, 7))
    return ids, {"target": torch.randint(5, 90, (2, 5))} if case == T5 else {}


@pytest.mark.parametrize("case", [BERT, GPT2, LLAMA, T5], ids=str)
@pytest.mark.parametrize("method", QUIET, ids=name_of)
def test_at_first_nothing_is_changed(method: tuple[str, dict[str, Any]], case: tuple[str, int]) -> None:
    model = load(saved(case), device="cpu")
    ids, more = given(case)
    before = model.logits(ids, **more)
    adapt(model, method[0], **method[1])
    assert torch.equal(model.logits(ids, **more), before)


@pytest.mark.parametrize("case", [BERT, T5], ids=str)
@pytest.mark.parametrize("method", EVERY, ids=name_of)
def test_the_adapter_alone_trains_and_all_of_it(method: tuple[str, dict[str, Any]], case: tuple[str, int]) -> None:
    model = load(saved(case), device="cpu")
    ids, more = given(case)
    before = model.logits(ids, **more)
    trained(model, *method)
    own = {id(parameter) for parameter in mine(model.net)}
    assert {id(p) for p in model.net.parameters() if p.requires_grad} == own
    net = model.net
    out = net(ids, more["target"]) if case == T5 else net(ids)
    (out * torch.randn_like(out)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in mine(net))
    assert not torch.allclose(model.logits(ids, **more), before, atol=1e-3)
    with bare(model):
        assert torch.equal(model.logits(ids, **more), before)


# --- bottleneck adapters and (IA)^3


def test_a_bottleneck_adds_a_small_network_of_what_a_branch_gives() -> None:
    net = fresh("transformer")
    x, forward = torch.randn(2, 5, 32), net.encoder.blocks[0].feedforward.inner
    y = forward(x)
    for kind in ("houlsby", "parallel"):
        trained(Net(net), "bottleneck", {"kind": kind, "scale": 0.5}, name=kind, targets="encoder.blocks.0.feedforward")
        own = forward.adapters[kind]["whole"]
        h = x if kind == "parallel" else y
        added = 0.5 * (F.relu(h @ own.down.T + own.down_bias) @ own.up.T + own.up_bias)
        torch.testing.assert_close(forward(x), y + added)


class Net:
    """What `trained` needs of a model."""

    def __init__(self, net: Any) -> None:
        self.net = net


def test_houlsby_stands_behind_every_branch_and_pfeiffer_behind_the_feed_forward() -> None:
    found = {}
    for kind in KINDS:
        net = fresh("transformer")
        adapt(net, "bottleneck", kind=kind)
        found[kind] = {name.removeprefix("decoder.blocks.0.") for name, module in net.named_modules()
                       if hasattr(module, "adapters") and name.startswith("decoder.")}  # fmt: skip
    assert found["houlsby"] == {"mixer.inner", "cross.inner", "feedforward.inner"}
    assert found["pfeiffer"] == found["parallel"] == {"feedforward.inner"}


@pytest.mark.parametrize("case", [BERT, GPT2, LLAMA, T5], ids=str)
def test_ia3_is_a_scaling_of_weights_and_merges_into_them(case: tuple[str, int]) -> None:
    model = trained(load(saved(case), device="cpu"), "ia3", {})
    ids, more = given(case)
    expected, weights = model.logits(ids, **more), {k: v.clone() for k, v in model.net.state_dict().items()}
    merge(model)
    assert any(not torch.equal(weights[k], v) for k, v in model.net.state_dict().items())
    torch.testing.assert_close(model.logits(ids, **more), expected, atol=1e-4, rtol=1e-4)
    unmerge(model)
    assert all(torch.equal(weights[k], v) for k, v in model.net.state_dict().items())


def test_rows_of_one_batch_have_bottlenecks_and_scalings_of_their_own() -> None:
    for method, options in QUIET[:2]:
        model = load(saved(GPT2), device="cpu")
        ids = given(GPT2)[0]
        alone = []
        for name in ("one", "two"):
            trained(model, method, options, name=name)
            use(model, name)
            alone.append(model.logits(ids))
        use(model, rows=["two", None])
        found = model.logits(ids)
        torch.testing.assert_close(found[0], alone[1][0], atol=1e-5, rtol=1e-5)
        with bare(model):
            torch.testing.assert_close(found[1], model.logits(ids)[1], atol=1e-5, rtol=1e-5)


# --- what stands before all tokens


def test_a_prefix_is_keys_and_values_before_all_others() -> None:
    """By the paper's equation, layer by layer: softmax(q [P_k; k]^T) [P_v; v]."""
    net = fresh("transformer")
    trained(Net(net), "prefix", {"length": 3})
    mixer = net.decoder.blocks[0].cross.inner
    k, v = net.decoder.adapters["default"]["whole"].parts["cross"].pairs()[0]
    x, context, seen = torch.randn(2, 4, 32), torch.randn(2, 6, 32), []
    handle = mixer.register_forward_hook(lambda m, args, kwargs, y: seen.append((args[0], y)), with_kwargs=True)
    pos = torch.arange(4).expand(2, -1)
    net.decoder(x, mask=Mask(causal=True), pos=pos, context=context)
    handle.remove()
    entered, found = seen[0]
    own = mixer._keys_values(context)
    keys, values = (torch.cat([p.expand(2, -1, -1, -1), t], 2) for p, t in zip((k, v), own, strict=True))
    y = reference(mixer._queries(entered), keys, values, Mask(), None, None, None, mixer.head_dim**-0.5, None, 0.0)
    torch.testing.assert_close(found, mixer.out(y.transpose(1, 2).flatten(2)))


def test_a_prefix_stands_in_encoder_decoder_and_over_the_context() -> None:
    net = fresh("transformer")
    adapt(net, "prefix", length=2)
    parts = {stack: sorted(getattr(net, stack).adapters["default"]["whole"].parts) for stack in ("encoder", "decoder")}
    assert parts == {"encoder": ["self"], "decoder": ["cross", "self"]}


@pytest.mark.parametrize("case", [BERT, GPT2, LLAMA], ids=str)
def test_a_prompt_is_further_rows_of_the_embedding(case: tuple[str, int]) -> None:
    model = trained(load(saved(case), device="cpu"), "prompt", {"length": 3})
    ids = given(case)[0]
    found, prompt = model.hidden(ids), model.net.stack.adapters["default"]["whole"].prompt.detach()
    plain = load(saved(case), device="cpu").net
    types = 0 if getattr(plain, "types", None) is None else plain.types.weight[0].detach()
    with torch.no_grad():
        longer = torch.nn.Embedding.from_pretrained(torch.cat([plain.embedding.weight, prompt - types]))
        vocab, plain.embedding = plain.embedding.num_embeddings, longer
        expected = plain(torch.cat([torch.arange(vocab, vocab + 3).expand(2, -1), ids], 1))
    torch.testing.assert_close(found, expected[:, 3:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", [BERT, GPT2, T5], ids=str)
@pytest.mark.parametrize("method", TOKENS, ids=name_of)
def test_padding_changes_nothing(method: tuple[str, dict[str, Any]], case: tuple[str, int], side: str) -> None:
    model = trained(load(saved(case), device="cpu"), *method)
    ids, more = given(case)
    pad = torch.full((2, 2), 7)
    padded = torch.cat([pad, ids] if side == "left" else [ids, pad], 1)
    valid = torch.ones_like(padded, dtype=torch.bool)
    valid[:, :2] = side != "left"
    valid[:, -2:] = side != "right"
    found, expected = model.logits(padded, valid, **more), model.logits(ids, **more)
    if case != T5:
        found = found[:, 2:] if side == "left" else found[:, :-2]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("case", [GPT2, LLAMA], ids=str)
@pytest.mark.parametrize("method", EVERY, ids=name_of)
def test_a_stream_equals_the_whole_text(method: tuple[str, dict[str, Any]], case: tuple[str, int]) -> None:
    net = trained(load(saved(case), device="cpu"), *method).net
    ids = given(case)[0]
    valid = torch.tensor([[True] * 7, [False] * 2 + [True] * 5])
    pos = torch.where(valid, valid.cumsum(1) - 1, -1)
    with torch.no_grad():
        whole, state, parts = net(ids, valid), net.init_state(2, 4), []
        for begin, end in [(0, 3), (3, 4), (4, 5), (5, 7)]:
            at = slice(begin, end)
            parts.append(net(ids[:, at], valid[:, at] if begin == 0 else None, pos=pos[:, at], state=state))
    torch.testing.assert_close(torch.cat(parts, 1)[valid], whole[valid], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method", EVERY, ids=name_of)
def test_an_encoder_decoder_writes_as_it_reads_all_at_once(method: tuple[str, dict[str, Any]]) -> None:
    net = trained(load(saved(T5), device="cpu"), *method).net
    ids, target = given(T5)[0], given(T5)[1]["target"]
    valid = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    with torch.no_grad():
        memory, state = net.encode(ids, valid), net.init_state(2, 4)
        whole = net.decode(target, memory)
        steps = [net.decode(target[:, i : i + 1], memory, pos=torch.full((2, 1), i), state=state) for i in range(5)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method", EVERY, ids=name_of)
def test_what_is_written_is_what_the_whole_pass_would_choose(method: tuple[str, dict[str, Any]]) -> None:
    model = trained(load(saved(GPT2), device="cpu"), *method)
    ids = given(GPT2)[0].tolist()
    for prompt, one in zip([ids[0], ids[1][:3]], model.generate([ids[0], ids[1][:3]], max_tokens=6), strict=True):
        written = list(prompt)
        for token in one.ids:
            assert int(model.logits(torch.tensor([written]))[0, -1].argmax()) == token
            written.append(token)


# --- what is refused


def test_what_cannot_be_honoured_is_said_in_one_line() -> None:
    net = fresh("rnn_attention")
    with pytest.raises(ValueError, match="mixes by rnn, which has no keys"):
        adapt(net, "prefix", targets="encoder")
    windowed = models.build({"kind": "decoder", "width": 16, "vocab": 9, "stack": {"blocks": [
        {"mixer": {"name": "attention", "heads": 2, "window": [3, 0]}}]}})  # fmt: skip
    with pytest.raises(ValueError, match=r"sees a window of \(3, 0\)"):
        adapt(windowed, "prefix")
    with pytest.raises(ValueError, match="size 64 is more than the width 32"):
        adapt(fresh("transformer"), "bottleneck", size=64)
    with pytest.raises(ValueError, match="no attention for at='cross'"):
        adapt(windowed, "prefix", targets="stack", at="cross")
    packed = Mask(segments=torch.tensor([[0, 0, 1, 1]]))
    for method in ("prefix", "prompt"):
        net = load(saved(BERT), device="cpu").net
        adapt(net, method, length=2)
        with pytest.raises(ValueError, match=f"{method}: sequences that are packed"):
            net(torch.tensor([[5, 6, 7, 8]]), mask=packed, pos=torch.tensor([[0, 1, 0, 1]]))


def test_two_prefixes_do_not_act_together_and_none_in_part() -> None:
    model = load(saved(GPT2), device="cpu")
    for name in ("one", "two"):
        adapt(model, "prefix", name=name, length=2)
    for names in (["one", "two"], {"one": 0.5}):
        with pytest.raises(ValueError, match="prefix adapters act alone and whole"):
            use(model, names)
    use(model, "two")
    adapt(model, "lora", name="three")
    use(model, ["one", "three"])  # another method may stand beside it


@pytest.mark.parametrize("method", TOKENS, ids=name_of)
def test_a_look_names_tokens_and_so_refuses_what_is_none(method: tuple[str, dict[str, Any]]) -> None:
    model = trained(load(saved(GPT2), device="cpu"), *method)
    ids = given(GPT2)[0][:1]
    with pytest.raises(ValueError, match="tokens that nobody wrote"):
        look(model, ids)
    with adapting.bare(model):
        assert len(look(model, ids).tokens["source"]) == 7


def test_a_look_sees_through_adapters_at_modules() -> None:
    model = trained(load(saved(GPT2), device="cpu"), "ia3", {})
    ids = given(GPT2)[0][:1]
    seen = look(model, ids)
    assert torch.equal(seen.output, model.hidden(ids))


def test_stacks_of_other_mixers_read_prompts_too() -> None:
    spec: Any = {"blocks": [{"mixer": {"name": "conv"}}], "positions": {"name": "none"}}
    net: Any = models.build({"kind": "decoder", "width": 16, "vocab": 9, "stack": spec}).eval()
    adapt(net, "prompt", length=2)
    ids = torch.tensor([[1, 2, 3]])
    assert net(ids).shape == (1, 3, 16)
    with pytest.raises(ValueError, match="no layer of this stream counts"):
        net(ids, pos=torch.arange(3)[None], state=net.init_state(1, 4))


@pytest.mark.parametrize("method", EVERY, ids=name_of)
def test_texts_read_together_are_as_each_alone(method: tuple[str, dict[str, Any]]) -> None:
    model = trained(load(saved(BERT), device="cpu"), *method)
    rows = [[5, 6, 7], [8, 9], [5, 9, 7, 11], [12, 13, 14]]
    for group in passes(model, rows, [[0] * len(row) for row in rows]):
        for row, hidden in zip(group.rows, group.hidden, strict=True):
            alone = model.hidden(torch.tensor([rows[row]]))[0]
            torch.testing.assert_close(hidden[: len(alone)], alone, atol=1e-5, rtol=1e-5)


# --- kept and trained


@pytest.mark.parametrize("case", [BERT, T5], ids=str)
@pytest.mark.parametrize("method", [*EVERY, ("lora", {"rank": 2, "bias": "all"})], ids=name_of)
def test_a_saved_adapter_comes_back(method: tuple[str, dict[str, Any]], case: tuple[str, int], tmp_path: Path) -> None:
    model = trained(load(saved(case), device="cpu"), *method)
    ids, more = given(case)
    adapting.save(model, tmp_path / "kept")
    again = adapting.attach(load(saved(case), device="cpu"), tmp_path / "kept")
    assert torch.equal(again.logits(ids, **more), model.logits(ids, **more))


def test_a_recipe_trains_each_of_them(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.tsv", 60)
    short: dict[str, Any] = {"budget": {"steps": 2}, "evaluations": 1}
    headway.train(task(tmp_path / "pairs.tsv", **short), out=tmp_path / "base")
    for number, (method, options) in enumerate(EVERY):
        recipe = task(tmp_path / "pairs.tsv", **short, model={"load": str(tmp_path / "base")},
                      adapt={"method": method, **options})  # fmt: skip
        del recipe["tokenizers"]
        headway.train(recipe, out=tmp_path / str(number))
        model = headway.load(tmp_path / str(number))
        assert all(bool(parameter.isfinite().all()) for parameter in mine(model.net))
        assert len(model.generate(["abc", "hg"])) == 2
