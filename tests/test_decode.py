"""Claims about the decoder's flattened step: the model's own numbers, for every wiring, while rows come and go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headway import models
from headway.block import reorder
from headway.generate.decode import step_of
from headway.models.decoder import Model
from headway.quantize import prepare

LOOK = {"name": "attention", "heads": 4}
KINDS: dict[str, dict[str, Any]] = {
    "GPT-2": {"stack": {"positions": {"name": "learned", "length": 24}},
              "block": {"feedforward": {"activation": "gelu_tanh"}}},
    "Llama": {"block": {"mixer": {**LOOK, "kv_heads": 2}, "norm": "rms", "norm_eps": 1e-5,
                        "feedforward": {"gated": True, "activation": "silu", "bias": False}}},
    "Qwen3": {"block": {"norm": "rms", "mixer": {**LOOK, "kv_heads": 1, "qk_norm": True, "head_dim": 12,
                                                 "norm_eps": 1e-6}}},
    "post": {"block": {"wiring": "post"}},
    "sandwich": {"block": {"wiring": "sandwich", "norm": "rms"}},
    "parallel": {"block": {"wiring": "parallel"}},
    "layer scale": {"block": {"layer_scale": 0.3}},
    "first norm": {"stack": {"first_norm": True}},
    "window": {"block": {"mixer": {**LOOK, "window": [3, 0]}}},
    "window with sinks": {"block": {"mixer": {**LOOK, "window": [3, 0], "sinks": 2}}},
    "softcap": {"block": {"mixer": {**LOOK, "softcap": 5.0}}},
    "scale": {"block": {"mixer": {**LOOK, "scale": 1.0}}},
    "alibi": {"stack": {"positions": {"name": "alibi"}}},
    "buckets": {"stack": {"positions": {"name": "buckets", "both": False}}},
    "recurrent": {"block": {"mixer": {"name": "rnn"}}},
    "linear": {"block": {"mixer": {"name": "linear", "heads": 4}}},
    "no feedforward": {"block": {"feedforward": None}},
}  # fmt: skip


def net(kind: str) -> Model:
    block = {"mixer": LOOK, "feedforward": {}, **KINDS[kind].get("block", {})}
    other = block if "head_dim" in block["mixer"] else {"mixer": LOOK, "feedforward": {}}
    stack = {"blocks": [block, other], **KINDS[kind].get("stack", {})}
    torch.manual_seed(0)
    made = models.build({"kind": "decoder", "width": 32, "vocab": 50, "dropout": 0.1, "stack": stack})
    assert isinstance(made, Model)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return made.eval()


@torch.inference_mode()
def stream(model: Model, rows: int, flat: bool, padded: bool = False) -> list[Tensor]:
    """Hidden states of a prompt and of each token behind it; half way rows change places and one leaves."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 50, (rows, 5), generator=generator)
    valid = torch.arange(5) >= torch.arange(rows)[:, None] if padded else None
    pos = torch.arange(5) - (torch.arange(rows)[:, None] if padded else torch.zeros(rows, 1, dtype=torch.long))
    state = model.init_state(rows, 6)
    found = [model(ids, valid, pos=pos.clamp(min=-1), state=state)]
    at = pos[:, -1:] + 1
    step = step_of(model, state, rows) if flat else None
    for t in range(7):
        new = torch.randint(0, 50, (len(at), 1), generator=generator)
        found.append(step(new, at) if step else model(new, pos=at, state=state))
        at = at + 1
        if t == 3 and rows > 1:
            kept = torch.arange(rows - 1).flip(0)
            reorder(state, kept)
            at = at[kept]
            step = step_of(model, state, rows - 1) if flat else None
    return found[1:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows,padded", [(1, False), (3, False), (3, True)])
def test_a_flattened_step_is_the_models_own(kind: str, rows: int, padded: bool) -> None:
    model = net(kind)
    own, flat = (stream(model, rows, flat, padded) for flat in (False, True))
    for one, two in zip(own, flat, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(own[0][:1], own[1][:1], atol=1e-3), "steps that say the same prove nothing"


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_a_plain_decoder_steps_without_a_module(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(kind)
    model.stack.blocks = model.stack.blocks[:1]
    with torch.inference_mode():
        state = model.init_state(1, 8)
        model(torch.tensor([[1, 2]]), pos=torch.tensor([[0, 1]]), state=state)
        step = step_of(model, state, 1)
        monkeypatch.setattr(nn.Module, "__call__", None)
        step(torch.tensor([[3]]), torch.tensor([[2]]))


def test_who_watches_a_module_sees_every_step() -> None:
    model = net("GPT-2")
    for watched in (model, model.stack, model.stack.blocks[0], model.stack.blocks[1].mixer.inner):
        seen: list[int] = []
        handle = watched.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        stream(model, 1, flat=True)
        handle.remove()
        assert len(seen) == 8


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_prepared_weights_step_as_they_do_in_the_model(quantize: str | None) -> None:
    model = net("Llama")
    prepare(model, quantize)
    for one, two in zip(stream(model, 2, False), stream(model, 2, True), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)
