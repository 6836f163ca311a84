"""Weights that are rounded as they are read are those that are rounded afterwards, in a quarter of the memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from published import TINY, label, saved
from torch import Tensor, nn

import headway
from headway import models, quantize
from headway.hub import Loaded
from headway.quantize import Int8Embedding, Int8Linear, prepare, roundings
from headway.rounding import Rounded, round_weight
from headway.transfer import blank, fill

NAMES = ["GPT2LMHead", "LlamaForCausalLM", "BertForMaskedLM", "T5ForCond", "BartForCond", "ViTForImage", "CLIPModel"]


def case(name: str) -> Path:
    return saved(next(one for one in TINY if label(one).startswith(name)))


def rounded(net: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Whole numbers and scales of every int8 part, by name."""
    found = {}
    for name, module in net.named_modules():
        if isinstance(module, Int8Linear):
            weight = torch.ops.quantized.linear_unpack(module.packed)[0]
            found[name] = weight.int_repr(), weight.q_per_channel_scales()
        if isinstance(module, Int8Embedding):
            found[name] = module.rounded, module.scales
    return found


@pytest.mark.parametrize(("name", "dtype"), [*((name, "float32") for name in NAMES), ("GPT2LMHead", "bfloat16")])
def test_weights_rounded_as_they_are_read_are_those_rounded_afterwards(
    name: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "WORTH", 256)
    later = headway.load(case(name), "cpu", dtype=dtype)
    numbers = later.parameters
    later.pack("int8")
    ours = headway.load(case(name), "cpu", dtype=dtype, quantize="int8")
    found, wanted = rounded(ours.net), rounded(later.net)
    assert len(found) > 4 and found.keys() == wanted.keys()
    for name in found:
        assert all(map(torch.equal, found[name], wanted[name])), name
    kept = dict(later.net.named_parameters())
    for name, parameter in ours.net.named_parameters():
        assert torch.equal(parameter, kept[name]), name
    assert ours.parameters == numbers and ours.dtype == later.dtype and ours.device.type == "cpu"


def test_no_weight_of_an_int8_linear_is_ever_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "WORTH", 256)
    pack = Loaded.pack

    def packed(model: Loaded, how: str) -> None:
        linears = [module for module in model.net.modules() if type(module) is nn.Linear and module.weight.ndim == 2]
        assert all(isinstance(linear.weight, Rounded) for linear in linears if linear.weight.numel() >= 256)
        pack(model, how)

    monkeypatch.setattr(Loaded, "pack", packed)
    for name in NAMES[:5]:  # patches are laid out anew, and so stand whole
        headway.load(case(name), "cpu", quantize="int8")


def test_an_own_folder_is_rounded_as_it_is_read_too(tmp_path: Path) -> None:
    stack = {"blocks": [{"mixer": {"name": "attention", "heads": 4}, "feedforward": {}}], "repeat": 2}
    spec = {"kind": "decoder", "width": 256, "vocab": 300, "stack": stack, "heads": {"lm": {"outputs": 300}}}
    Loaded(models.build(spec), spec).save(tmp_path / "m")
    later = headway.load(tmp_path / "m", "cpu")
    later.pack("int8")
    ours, ids = headway.load(tmp_path / "m", "cpu", quantize="int8"), torch.arange(24).view(2, 12)
    assert torch.equal(ours.logits(ids), later.logits(ids))
    for again in (lambda: ours.save(tmp_path / "n"), ours.unpack):
        with pytest.raises(ValueError, match="cannot be restored: load the model again, without quantize"):
            again()
    assert not (tmp_path / "n").exists()


@pytest.mark.parametrize("mix", [1, 16])
def test_rows_and_columns_may_come_in_any_parts(mix: int) -> None:
    weight = torch.randn(70, 48)
    wanted = round_weight(weight, mix)
    rows, columns = (Rounded.blank(weight.shape, torch.float32, mix) for _ in range(2))
    for part in (slice(50, 70), slice(0, 50)):
        rows.receive(part, slice(None), weight[part])
    for half in (slice(30, 70), slice(0, 30)):
        for part in (slice(0, 16), slice(16, 48)):
            assert columns.scales.isnan().all()
            columns.receive(half, part, weight[half, part])
    for found in (rows, columns):
        assert torch.equal(found.data, wanted[0]) and torch.equal(found.scales, wanted[1])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(300, 256), nn.Linear(256, 300, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("transposed", [False, True])
def test_what_a_file_holds_twice_must_be_the_same(transposed: bool) -> None:
    table = torch.randn(300, 256)
    stored, rules = table.T if transposed else table, [((f"{n}.weight",), (n,), transposed) for n in ("embed", "head")]

    def filled(head: Tensor) -> Tied:
        with blank():
            net = Tied()
        into = roundings(net, torch.float32)
        assert list(into) == ["head.weight"]
        weights = {"embed": stored, "head": head}
        fill(net, weights, rules, dtype=torch.float32, where="here", rounded=into)
        return net

    with pytest.raises(ValueError, match="is tied to another tensor here, and the two differ"):
        filled(torch.zeros_like(stored))
    net = filled(stored.clone())
    prepare(net, "int8")
    assert torch.equal(net.embed.rounded, round_weight(table)[0])


def test_new_heads_are_initialised_and_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "WORTH", 256)
    ours = headway.load(case("BertForMaskedLM"), "cpu", quantize="int8", heads={"classify": {"outputs": 3}})
    assert rounded(ours.net) and ours.logits(torch.tensor([[5, 6, 7]])).isfinite().all()


def test_weights_rounded_for_another_mix_are_refused() -> None:
    with blank():
        net = nn.Sequential(nn.Linear(256, 256))
    into = roundings(net, torch.float32, 1)
    values = {name: torch.randn_like(tensor, device="cpu") for name, tensor in net.state_dict().items()}
    fill(net, values, [((name,), (name,)) for name in values], dtype=torch.float32, where="here", rounded=into)
    with pytest.raises(ValueError, match="rounded for mix=1 as they were read, not 16: read again"):
        prepare(net, "int8")


MEASURE = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import headway
from headway.quantize import nbytes
def status():
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
headway.load(sys.argv[2], "cpu", quantize="int8")  # what is imported and read once is not the model's
Path("/proc/self/clear_refs").write_text("5")
before = status()["VmRSS"]
model = headway.load(sys.argv[1], "cpu", quantize="int8")
print(json.dumps({"peak": status()["VmHWM"] - before, "held": nbytes(model.net), "numbers": model.parameters}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured as Linux tells it")
def test_int8_never_needs_the_memory_of_the_whole_model(tmp_path: Path) -> None:
    stack = {"blocks": [{"mixer": {"name": "attention", "heads": 8}, "feedforward": {}}], "repeat": 6}
    for name, width in (("m", 1024), ("small", 256)):
        spec = {"kind": "decoder", "width": width, "vocab": 16384, "stack": stack}
        spec["heads"] = {"lm": {"outputs": 16384, "tie": True, "bias": False}}
        with blank():
            net = models.assemble(spec).to_empty(device="cpu").requires_grad_(False)
        for parameter in net.parameters():
            parameter.fill_(0.5)
        Loaded(net, spec).save(tmp_path / name)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "m"), str(tmp_path / "small")]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["numbers"] > 90_000_000
    assert found["held"] < 1.25 * found["numbers"]  # the table is there for its rows, and packed for the head
    assert found["peak"] < found["held"] + 2**25, found  # the window of the file, what is being rounded
