"""Claims about the flattened decoding step: the model's own numbers to the bit, for every wiring."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES
from torch import Tensor, nn

from headway import models
from headway.attend import forced, listening
from headway.block import reorder
from headway.generate import step as flattened
from headway.generate.step import step_of
from headway.mixers.attention import Attention
from headway.models.seq2seq import Model
from headway.quantize import is_prepared, prepare
from headway.text import BOS

LOOK = {"name": "attention", "heads": 4}
BLOCK = {"mixer": LOOK, "cross": LOOK, "feedforward": {}}
T5 = {"name": "attention", "heads": 4, "head_dim": 12, "scale": 1.0}
T5_BLOCK = {"mixer": T5, "cross": T5, "feedforward": {"gated": True, "activation": "gelu_tanh", "bias": False},
            "norm": "rms", "norm_eps": 1e-6}  # fmt: skip
BIASED = {**LOOK, "bias": True}
FAMILIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "t5": {"blocks": [T5_BLOCK, T5_BLOCK], "positions": {"name": "buckets", "buckets": 8, "distance": 6, "both": False},
           "spec": {"tie": True, "share": True, "head_bias": False, "logit_scale": 32**-0.5}},
    "bart": {"block": {"mixer": BIASED, "cross": BIASED, "wiring": "post"}, "first_norm": True, "final_norm": False,
             "positions": {"name": "learned", "length": 16, "offset": 2},
             "spec": {"tie": True, "share": True, "embed_scale": 32**0.5}},
}  # fmt: skip
DECODERS: dict[str, dict[str, Any]] = {
    "post": {"block": {"wiring": "post"}},
    "sandwich": {"block": {"wiring": "sandwich", "norm": "rms"}},
    "parallel": {"block": {"wiring": "parallel"}},
    "grouped heads": {"block": {"mixer": {**LOOK, "kv_heads": 2}, "cross": {**LOOK, "kv_heads": 1}}},
    "normed heads": {"block": {"mixer": {**LOOK, "qk_norm": True}, "cross": {**LOOK, "qk_norm": True}}},
    "wide heads": {"block": {"cross": {**LOOK, "head_dim": 12, "bias": True}}},
    "capped scores": {"block": {"mixer": {**LOOK, "softcap": 5.0}, "cross": {**LOOK, "softcap": 5.0}}},
    "window": {"block": {"mixer": {**LOOK, "window": [2, 0]}}},
    "gated": {"block": {"feedforward": {"gated": True, "activation": "silu", "bias": False}}},
    "relu2": {"block": {"feedforward": {"activation": "relu2"}}},
    "no feedforward": {"block": {"feedforward": None}},
    "recurrent": {"block": {"mixer": {"name": "rnn"}}},
    "convolution": {"block": {"mixer": {"name": "conv"}}},
    "fixed vector": {"block": {"cross": {"name": "summary"}}},
    "cross alone": {"block": {"mixer": None}},
    "learned": {"positions": {"name": "learned", "length": 16}},
    "sinusoidal": {"positions": {"name": "sinusoidal"}},
    "alibi": {"positions": {"name": "alibi"}},
    "no positions": {"positions": {"name": "none"}},
    "no last norm": {"final_norm": False},
    **FAMILIES,
}


def net(changed: dict[str, Any], width: int = 32) -> Model:
    stack = {key: value for key, value in changed.items() if key not in ("block", "spec")}
    decoder = {"blocks": [{**BLOCK, **changed.get("block", {})}, BLOCK], **stack}
    spec = {"kind": "seq2seq", "width": width, "encoder": ARCHITECTURES["transformer"]["encoder"], "decoder": decoder}
    made = models.build({**spec, "dropout": 0.1, "source_vocab": 12, "target_vocab": 12, **changed.get("spec", {})})
    assert isinstance(made, Model)
    return made.eval()


@torch.inference_mode()
def streams(model: Model, rows: int, padded: bool, flat: bool, tokens: int = 6) -> list[Tensor]:
    """The logits of each step of a stream whose rows change places half way."""
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(4, 12, (rows, 7), generator=generator)
    valid = torch.arange(7) < torch.arange(7, 7 - rows, -1)[:, None] if padded else None
    memory, state = model.encode(source, valid), model.init_state(rows, 4)
    last, logits = torch.full((rows, 1), BOS), []
    step = step_of(model, memory, state) if flat else None
    for t in range(tokens):
        pos = torch.full((rows, 1), t)
        logits.append(step(last, pos) if step else model.decode(last, memory, pos=pos, state=state))
        last = torch.randint(3, 12, (rows, 1), generator=generator)
        if t == tokens // 2:
            reorder(state, torch.arange(rows).flip(0))
            memory = type(memory)(memory.x.flip(0), None if valid is None else valid.flip(0))
            step = step_of(model, memory, state) if flat else None
    return logits


@pytest.mark.parametrize("changed", DECODERS.values(), ids=DECODERS)
@pytest.mark.parametrize("rows,padded", [(1, False), (3, True)])
def test_a_flattened_step_is_the_models_own_to_the_bit(changed: dict[str, Any], rows: int, padded: bool) -> None:
    model = net(changed)
    own, flat = (streams(model, rows, padded, flat) for flat in (False, True))
    assert all(torch.equal(one, two) for one, two in zip(own, flat, strict=True))
    assert not torch.equal(own[0], own[1]), "steps that say the same prove nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_weights_step_as_their_modules_do(family: str) -> None:
    model = net(FAMILIES[family], width=256)
    prepare(model)
    assert is_prepared(model)
    own, flat = (streams(model, 3, True, flat) for flat in (False, True))
    assert all(torch.equal(one, two) for one, two in zip(own, flat, strict=True))


def test_a_source_that_is_all_padding_is_left_to_attend() -> None:
    model, source = net({}), torch.tensor([[5, 6, 7], [5, 6, 7]])
    valid = torch.tensor([[True, True, False], [False, False, False]])
    with torch.inference_mode():
        memory = model.encode(source, valid)
        own, flat = ([], [])
        for logits, state in ((own, model.init_state(2, 8)), (flat, model.init_state(2, 8))):
            step = step_of(model, memory, state)
            for t in range(3):
                last, pos = torch.full((2, 1), 5 + t), torch.full((2, 1), t)
                logits.append(step(last, pos) if logits is flat else model.decode(last, memory, pos=pos, state=state))
    assert all(torch.equal(one, two) for one, two in zip(own, flat, strict=True))


@pytest.mark.parametrize("family", ["plain", "t5"])
@pytest.mark.parametrize("valid", [None, torch.tensor([[True, True, False]])], ids=["whole", "padded"])
def test_a_known_transformer_steps_without_a_module(
    monkeypatch: pytest.MonkeyPatch, valid: Tensor | None, family: str
) -> None:
    model = net(FAMILIES[family])
    source = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        memory, state = model.encode(source, valid), model.init_state(1, 8)
        step = step_of(model, memory, state)
        step(torch.tensor([[BOS]]), torch.tensor([[0]]))  # the cross mixers fill their states
        monkeypatch.setattr(nn.Module, "__call__", None)
        step(torch.tensor([[5]]), torch.tensor([[1]]))


def test_who_watches_a_module_sees_every_step() -> None:
    model = net({})
    for watched in (model.decoder, model.decoder.blocks[0], model.decoder.blocks[1].cross.inner, model.head):
        seen: list[int] = []
        handle = watched.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        streams(model, 1, False, flat=True)
        handle.remove()
        assert len(seen) == 6


def test_a_backend_that_is_asked_for_is_taken() -> None:
    with forced("reference"), listening() as heard:
        streams(net({}), 1, False, flat=True)
    assert {one.backend for one in heard} == {"reference"}
    assert len(heard) > 6 * 4, "two layers, self and cross, six steps"


def test_a_model_in_training_keeps_its_dropout() -> None:
    model = net({}).train()
    torch.manual_seed(0)
    own = streams(model, 2, False, flat=False)
    torch.manual_seed(0)
    flat = streams(model, 2, False, flat=True)
    assert all(torch.equal(one, two) for one, two in zip(own, flat, strict=True))


def test_a_kind_of_attention_that_is_not_known_is_called_as_it_is() -> None:
    class Louder(Attention):
        def forward(self, x: Tensor, **named: Any) -> Tensor:
            return 2 * super().forward(x, **named)

    model = net({})
    model.decoder.blocks[0].mixer.inner.__class__ = Louder
    assert not flattened._plain(model.decoder.blocks[0].mixer.inner, torch.zeros(1, 7, 32))
    own, flat = (streams(model, 1, False, flat) for flat in (False, True))
    assert all(torch.equal(one, two) for one, two in zip(own, flat, strict=True))
