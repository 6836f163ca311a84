"""Claims about alignments: they are what the model really used, and looking changes nothing."""

from __future__ import annotations

import pytest
import torch
from tiny import ARCHITECTURES, eight_pairs, fresh
from torch import Tensor, nn

from headway import models
from headway.compare import alignment
from headway.data.pairs import Pairs
from headway.hub import Loaded
from headway.mask import Mask
from headway.mixers.attention import Attention
from headway.models.seq2seq import Model
from headway.probe.alignment import cross_maps
from headway.text import EOS, Tokenizer, TokenizerSpec

ATTENDING = ["conv", "rnn_attention", "transformer"]


@pytest.fixture
def batch() -> Pairs:
    batch = eight_pairs()
    assert batch.source_valid is not None and not batch.source_valid.all()
    return batch


def hooks(net: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in net.modules())


@pytest.mark.parametrize("name", ATTENDING)
def test_each_row_is_a_share_of_the_source_and_padding_has_none(name: str, batch: Pairs) -> None:
    (weights,) = cross_maps(fresh(name), batch.source, batch.target_in, batch.source_valid)
    assert weights.shape[0] == 8 and weights.shape[2:] == (batch.target_in.shape[1], batch.source.shape[1])
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))
    assert batch.source_valid is not None
    assert not weights.masked_select(~batch.source_valid[:, None, None]).any()
    assert float(weights.max() - weights.min()) > 0.3, "a flat map proves nothing"


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", ATTENDING)
def test_the_map_times_the_values_is_what_the_mixer_made(name: str, padded: bool, batch: Pairs) -> None:
    """`out` is the mixer's last projection; what enters it was caught while the model ran its fast kernel."""
    net = fresh(name)
    mixer: Attention = net.decoder.blocks[-1].cross.inner
    caught: list[Tensor] = []
    source, valid = (batch.source, batch.source_valid) if padded else (batch.source[:, :3], None)
    with torch.no_grad():
        handle = mixer.out.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
        net(source, batch.target_in, valid)
        handle.remove()
        memory = net.encode(source, valid).x
        values = mixer.key_value(memory).chunk(2, -1)[1].unflatten(-1, (mixer.kv_heads, mixer.head_dim))
        weights = cross_maps(net, source, batch.target_in, valid)[-1]
        by_hand = torch.einsum("bhts,bshd->bthd", weights, values).flatten(2)
    torch.testing.assert_close(by_hand, caught[0])


def test_there_is_one_map_for_each_block_first_to_last(batch: Pairs) -> None:
    spec = {**ARCHITECTURES["transformer"], "source_vocab": 12, "target_vocab": 12}
    net = models.build({**spec, "decoder": {**spec["decoder"], "repeat": 3}}).eval()
    assert isinstance(net, Model)
    maps = cross_maps(net, batch.source, batch.target_in, batch.source_valid)
    assert len(maps) == 3
    assert not torch.equal(maps[0], maps[1])
    block = net.decoder.blocks[0]
    with torch.no_grad():  # what the first block asks with depends on nothing behind it
        for later in net.decoder.blocks[1:]:
            for parameter in later.parameters():
                parameter.zero_()
        again = cross_maps(net, batch.source, batch.target_in, batch.source_valid)
    assert torch.equal(maps[0], again[0])
    assert block.cross is not None


@pytest.mark.parametrize("name", ATTENDING)
def test_looking_changes_no_bit_of_the_answer(name: str, batch: Pairs) -> None:
    net = fresh(name)
    seen: list[Tensor] = []
    inputs = (batch.source, batch.target_in, batch.source_valid)
    with torch.no_grad():
        plain = net(*inputs)
        handle = net.register_forward_hook(lambda module, given, logits: seen.append(logits))
        cross_maps(net, *inputs)
        handle.remove()
        after = net(*inputs)
    assert torch.equal(plain, seen[0]) and torch.equal(plain, after)


def test_no_hook_is_left_behind(batch: Pairs) -> None:
    net = fresh("transformer")
    cross_maps(net, batch.source, batch.target_in, batch.source_valid)
    assert hooks(net) == 0


def test_no_hook_is_left_behind_by_a_failure(batch: Pairs) -> None:
    net = fresh("conv")
    with pytest.raises(ValueError, match="learned positions end"):
        cross_maps(net, batch.source, torch.full((8, 99), 5))
    assert hooks(net) == 0


def test_a_fixed_vector_looks_nowhere(batch: Pairs) -> None:
    assert cross_maps(fresh("rnn"), batch.source, batch.target_in, batch.source_valid) == []


def test_a_map_masks_what_the_mask_says() -> None:
    """By hand: softmax of q k / sqrt(d) over the two visible ones of four keys."""
    mixer = Attention(4, heads=1)
    x, context = torch.randn(1, 2, 4), torch.randn(1, 4, 4)
    valid = torch.tensor([[True, False, True, False]])
    with torch.no_grad():
        found = mixer.map(x, mask=Mask(valid=valid), pos=torch.arange(2)[None], context=context)
        scores = (mixer.query(x) @ mixer.key_value(context)[..., :4].mT / 2.0)[..., [0, 2]]
    torch.testing.assert_close(found[0, 0][:, [0, 2]], scores[0].softmax(-1))
    assert not found[0, 0][:, [1, 3]].any()


def test_an_answer_as_long_as_positions_reach_still_has_its_map() -> None:
    """A model that never ends writes one token more than `max_tokens`; what it reads with BOS would be one beyond."""
    source, target = Tokenizer.train(TokenizerSpec(), ["ab"]), Tokenizer.train(TokenizerSpec("whitespace"), ["A B"])
    side = {"positions": {"name": "learned", "length": 13}}
    spec = {**ARCHITECTURES["conv"], "source_vocab": source.vocab, "target_vocab": target.vocab}
    net = models.build({**spec, **{name: {**spec[name], **side} for name in ("encoder", "decoder")}})
    assert isinstance(net, Model)
    with torch.no_grad():
        net.head.bias[EOS], net.head.bias[5] = -1e4, 1e4
    model = Loaded(net, spec, source, target, max_tokens=12)
    assert len(model.generate(["ab"])[0].tokens) == 13
    found = alignment(model, "ab")
    assert found is not None
    assert found["input"] == ["a", "b", "end"]
    assert found["output"] == ["B"] * 12 + ["end"]
    assert len(found["weights"]) == 13
