"""Claims about filling a network: exact, strict, both ways, and in little more memory than the weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from headway import weights
from headway.transfer import Rule, blank, fill, published
from headway.weights import open_weights, write_shards, write_weights


class Net(nn.Module):
    """A tied head, a fused key and value, a norm, a scalar, a table that is saved and one that is not, a recurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.query, self.key_value = nn.Linear(6, 6), nn.Linear(6, 8)
        self.norm = nn.LayerNorm(6)
        self.rnn = nn.GRU(6, 6, batch_first=True)
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embedding.weight
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("rates", torch.arange(6).float().exp(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.rnn(self.embedding(ids))[0]) * self.rates
        k, v = self.key_value(self.query(x)).chunk(2, -1)
        return self.head(x * self.scale + (k * v).sum(-1, keepdim=True))


LINEARS = [
    (("query.weight", "key_value.weight"), ("qkv.weight",), True),
    (("query.bias", "key_value.bias"), ("qkv.bias",), False),
]
SPLIT = [
    (("query.weight",), ("q.weight",), False),
    (("query.bias",), ("q.bias",), False),
    (("key_value.weight",), ("k.weight", "v.weight"), False),
    (("key_value.bias",), ("k.bias", "v.bias"), False),
]
REST = [
    (("embedding.weight",), ("wte",), False),
    (("norm.weight",), ("ln.gamma",), False),
    (("norm.bias",), ("ln.beta",), False),
    *(((f"rnn.{name}",), (f"rnn.{name}",), False) for name, _ in nn.GRU(1, 1).named_parameters()),
    (("scale",), ("scale",), False),
    (("head.weight",), ("lm_head.weight",), False),
    (("head.bias",), ("lm_head.bias",), False),
    (("steps",), ("steps",), False),
    ((), ("attn.mask",), False),
]  # fmt: skip
FUSED = REST + LINEARS
SEPARATE = REST + SPLIT
SHAPES = {"wte": (1, 11, 6), "q.weight": (6, 1, 3, 2), "ln.gamma": (1, 1, 6), "scale": (1, 1), "steps": (1,)}
SHAPED = [(*rule, SHAPES.get(rule[1][0])) for rule in SEPARATE]
IDS = torch.arange(8)[None]


@pytest.fixture
def net() -> Net:
    made = Net().eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    made.steps.fill_(7)
    return made


def saved(net: nn.Module, folder: Path, rules: list[Any], **more: Tensor) -> Path:
    tensors = dict(published(net, rules))
    write_weights(folder, {**tensors, **more}, 300)
    return folder


def filled(folder: Path, rules: Any, **options: Any) -> Net:
    with blank():
        net = Net()
    fill(net, open_weights(folder), rules, **{"dtype": torch.float32, "where": folder, **options})
    return net.eval()


def refusal(folder: Path, rules: Any, **options: Any) -> str:
    with pytest.raises(ValueError) as fault:
        filled(folder, rules, **options)
    text = str(fault.value)
    assert "\n" not in text
    assert str(folder) in text
    return text


# both ways


@pytest.mark.parametrize("window", [8, 50, 2**24])
@pytest.mark.parametrize("rules", [FUSED, SEPARATE, SHAPED], ids=["fused and transposed", "separate", "reshaped"])
def test_a_network_comes_back_as_it_was_through_published_names(
    net: Net, rules: list[Any], window: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "WINDOW", window)
    again = filled(saved(net, tmp_path / "m", rules), rules)
    assert torch.equal(again(IDS), net(IDS))
    assert again.steps == 7
    assert {name: p.requires_grad for name, p in again.named_parameters()} == {
        name: True for name, _ in net.named_parameters()
    }
    assert dict(published(again, rules)).keys() == dict(published(net, rules)).keys()


def test_published_tensors_are_what_the_rules_say(net: Net) -> None:
    fused, separate = published(net, FUSED), published(net, SEPARATE)
    whole = torch.cat([net.query.weight, net.key_value.weight])
    assert torch.equal(fused["qkv.weight"], whole.T)
    assert torch.equal(separate["k.weight"], whole[6:10])
    assert torch.equal(separate["v.bias"], net.key_value.bias[4:])
    assert "lm_head.weight" not in fused  # tied to the embedding
    assert "attn.mask" not in fused


def test_a_shape_is_what_the_published_tensor_has_and_must_have(net: Net, tmp_path: Path) -> None:
    tensors = dict(published(net, SHAPED))
    assert {name: tuple(tensors[name].shape) for name in SHAPES} == SHAPES
    assert torch.equal(tensors["q.weight"].flatten(), net.query.weight.flatten())
    for wrong in (tensors["q.weight"].reshape(6, 6), tensors["q.weight"].reshape(6, 1, 2, 3), torch.zeros(6, 1, 3, 3)):
        write_weights(tmp_path / "m", {**tensors, "q.weight": wrong})
        assert f"1 of another shape; first: q.weight is {tuple(wrong.shape)}" in refusal(tmp_path / "m", SHAPED)
    for rule in ((("query.weight",), ("q.weight",), True, (6, 6)), (("a", "b"), ("q.weight",), False, (6, 6))):
        with pytest.raises(ValueError, match="a rule with a shape is of one tensor"):
            published(net, [rule])


def test_a_rule_is_a_triple_or_an_object_with_its_three_names(net: Net, tmp_path: Path) -> None:
    class Other:
        def __init__(self, ours: Any, theirs: Any, transpose: Any) -> None:
            self.ours, self.theirs, self.transpose = ours, theirs, transpose

    folder = saved(net, tmp_path / "m", FUSED)
    for kind in (Rule, Other):
        again = filled(folder, (kind(*rule) for rule in FUSED))
        assert torch.equal(again(IDS), net(IDS))


def test_any_mapping_of_tensors_fills_a_network(net: Net) -> None:
    with blank():
        again = Net()
    fill(again, dict(published(net, FUSED)), FUSED, dtype=torch.float32, where="memory")
    assert torch.equal(again(IDS), net(IDS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_arrive_in_the_dtype_asked_for(net: Net, dtype: torch.dtype, tmp_path: Path) -> None:
    again = filled(saved(net, tmp_path / "m", FUSED), FUSED, dtype=dtype)
    expected = {name: t.to(dtype) if t.is_floating_point() else t for name, t in net.state_dict().items()}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
    assert all(tensor.dtype == expected[name].dtype for name, tensor in again.state_dict().items())


def test_a_filled_network_is_its_own(net: Net, tmp_path: Path) -> None:
    folder = saved(net, tmp_path / "m", FUSED)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    again = filled(folder, FUSED)
    again(IDS).sum().backward()
    torch.optim.SGD(again.parameters(), 1.0).step()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


# tied tensors


def test_tied_tensors_stay_one_and_may_stand_in_the_file_twice(net: Net, tmp_path: Path) -> None:
    folder = saved(net, tmp_path / "once", FUSED)
    assert "lm_head.weight" not in open_weights(folder)
    twice = saved(net, tmp_path / "twice", FUSED, **{"lm_head.weight": net.embedding.weight.detach()})
    for source in (folder, twice):
        again = filled(source, FUSED)
        assert again.head.weight is again.embedding.weight
        assert torch.equal(again.head.weight, net.head.weight)
    only = {("lm_head.weight" if name == "wte" else name): t for name, t in published(net, FUSED).items()}
    write_weights(tmp_path / "head", only)
    assert torch.equal(filled(tmp_path / "head", FUSED).embedding.weight, net.embedding.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_tensors_that_differ_in_the_file_are_refused(net: Net, dtype: torch.dtype, tmp_path: Path) -> None:
    other = net.embedding.weight.detach().clone()
    other[10, 5] += 1
    folder = saved(net, tmp_path / "m", FUSED, **{"lm_head.weight": other})
    assert "head.weight is tied" in refusal(folder, FUSED, dtype=dtype)


# strictness


def test_missing_unexpected_and_misshapen_tensors_are_counted_and_the_first_is_named(net: Net, tmp_path: Path) -> None:
    tensors = dict(published(net, FUSED))

    def said(change: dict[str, Tensor | None]) -> str:
        changed = {**tensors, **change}
        write_weights(tmp_path / "m", {name: t for name, t in changed.items() if t is not None})
        return refusal(tmp_path / "m", FUSED)

    assert "(1 missing, 0 unexpected, 0 of another shape; first: ln.beta)" in said({"ln.beta": None})
    assert "(2 missing, " in said({"qkv.weight": None})
    assert "first: qkv.weight)" in said({"qkv.weight": None})
    assert "(0 missing, 1 unexpected, 0 of another shape; first: 'new')" in said({"new": torch.zeros(1)})
    assert "qkv.weight is (20, 6) for query.weight (6, 6)" not in said({"qkv.bias": torch.zeros(15)})
    assert "1 of another shape; first: qkv.bias is (15,)" in said({"qkv.bias": torch.zeros(15)})
    assert "1 of another shape" in said({"qkv.weight": tensors["qkv.weight"].T})
    assert "1 of another shape" in said({"wte": torch.zeros(11 * 6)})
    assert "1 of another shape" in said({"scale": torch.zeros(1)})
    assert "(1 missing, 1 unexpected, 1 of" in said({"ln.beta": None, "x": torch.zeros(1), "wte": torch.zeros(3)})
    assert "attn.mask" not in said({"attn.mask": torch.zeros(9, 9), "new": torch.zeros(1)})  # a rule lets it go


def test_parts_that_could_not_be_written_back_are_not_read(net: Net, tmp_path: Path) -> None:
    """8 rows of key and value as 3 and 5: the way back would divide them evenly."""
    tensors = dict(published(net, SEPARATE))
    both = torch.cat([tensors["k.weight"], tensors["v.weight"]])
    write_weights(tmp_path / "m", {**tensors, "k.weight": both[:3].clone(), "v.weight": both[3:].clone()})
    assert "1 of another shape; first: k.weight" in refusal(tmp_path / "m", SEPARATE)


def test_one_of_several_parts_may_not_be_missing(net: Net, tmp_path: Path) -> None:
    tensors = dict(published(net, SEPARATE))
    del tensors["v.weight"]
    write_weights(tmp_path / "m", tensors)
    assert "(1 missing, 0 unexpected, 0 of another shape; first: v.weight)" in refusal(tmp_path / "m", SEPARATE)


@pytest.mark.parametrize("name", ["wte", "steps"])
def test_whole_numbers_never_become_weights_nor_weights_whole_numbers(net: Net, name: str, tmp_path: Path) -> None:
    tensors = dict(published(net, FUSED))
    tensors[name] = tensors[name].to(torch.int8 if name == "wte" else torch.float32)
    write_weights(tmp_path / "m", tensors)
    assert f"{name} is stored as" in refusal(tmp_path / "m", FUSED)


def test_a_refused_network_is_as_it_was(net: Net, tmp_path: Path) -> None:
    folder = saved(net, tmp_path / "m", FUSED, extra=torch.zeros(1))
    with blank():
        other = Net()
    with pytest.raises(ValueError, match="1 unexpected"):
        fill(other, open_weights(folder), FUSED, dtype=torch.float32, where=folder)
    assert all(parameter.is_meta for name, parameter in other.named_parameters() if name != "scale")


def test_a_table_that_no_file_holds_must_have_been_computed(net: Net, tmp_path: Path) -> None:
    folder = saved(net, tmp_path / "m", FUSED)
    with torch.device("meta"):
        other = Net()
    with pytest.raises(ValueError, match="rates is in no file"):
        fill(other, open_weights(folder), FUSED, dtype=torch.float32, where=folder)


def test_a_rule_of_many_to_many_or_for_what_is_not_there_is_refused(net: Net, tmp_path: Path) -> None:
    folder = saved(net, tmp_path / "m", FUSED)
    with pytest.raises(ValueError, match="one name on at least one side"):
        filled(folder, [(("a", "b"), ("c", "d"), False)])
    assert "1 unexpected" not in refusal(folder, [*FUSED[:-1], (("nowhere",), ("qkv.bias",), False)])
    with pytest.raises(ValueError, match="no such tensor"):
        published(net, [*FUSED, (("nowhere",), ("x",), False)])
    with pytest.raises(ValueError, match="not divided evenly"):
        published(net, [*FUSED[:-2], (("query.weight",), ("a", "b", "c", "d"), False)])
    with pytest.raises(ValueError, match=r"2 tensors have no published name; first: query\.bias"):
        published(net, FUSED[:-1])


# new tensors


def test_only_what_the_caller_names_is_initialised_and_it_is_reported(net: Net, tmp_path: Path) -> None:
    tensors = dict(published(net, FUSED))
    for name in ("lm_head.bias", "ln.gamma", "scale", "rnn.weight_hh_l0"):
        del tensors[name]
    write_weights(tmp_path / "m", tensors)
    assert "(4 missing" in refusal(tmp_path / "m", FUSED)
    assert "(1 missing" in refusal(tmp_path / "m", FUSED, allow_fresh={"head.*", "norm.*", "rnn.*"})
    with blank():
        again = Net()
    fresh = fill(again, open_weights(tmp_path / "m"), FUSED, dtype=torch.float32, where=tmp_path, allow_fresh={"*"})
    assert fresh == ["scale", "norm.weight", "rnn.weight_hh_l0", "head.bias"]
    assert again.scale == 1
    assert again.norm.weight.eq(1).all()
    assert again.head.bias.eq(0).all()
    assert 0 < again.rnn.weight_hh_l0.detach().std() < 1
    changed = {name for name, t in again.state_dict().items() if not torch.equal(t, net.state_dict()[name])}
    assert changed == set(fresh)
    assert again.eval()(IDS).isfinite().all()


def test_what_no_table_initialises_is_refused(tmp_path: Path) -> None:
    class Prompted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prompt = nn.Parameter(torch.empty(3))

    with blank():
        net = Prompted()
    with pytest.raises(ValueError, match="prompt is missing, and there is no rule to initialise it by"):
        fill(net, {}, [], dtype=torch.float32, where="here", allow_fresh={"prompt"})


# memory


MEASURE = """
import json, sys
from pathlib import Path
import torch
from torch import nn
torch.set_num_threads(1)
from headway.transfer import blank, fill
from headway.weights import open_weights
import safetensors.torch
folder, dtype, transpose = Path(sys.argv[1]), getattr(torch, sys.argv[2]), sys.argv[3] == "transposed"

def status():
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}

with blank():
    net = nn.ModuleList([nn.Linear(1024, 1024, bias=False) for _ in range(18)] + [nn.Embedding(32768, 1024)])
rules = [((name,), (name,), transpose) for name in net.state_dict()]
opened = open_weights(folder)
Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what there is now
before = status()
fill(net, opened, rules, dtype=dtype, where=folder)
after = status()
print(json.dumps({
    "file": opened.nbytes, "weights": sum(p.nbytes for p in net.parameters()),
    "peak": after["VmHWM"] - before["VmRSS"], "kept": after["VmRSS"] - before["VmRSS"],
}))
"""
SLACK = 2 * weights.WINDOW + 2**23  # the window that is left, the one that is entered, and the allocator's own


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured as Linux tells it")
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        ("float32", "sharded"),
        ("bfloat16", "transposed"),
        pytest.param("float32", "single", marks=pytest.mark.long),
        pytest.param("bfloat16", "single", marks=pytest.mark.long),
        pytest.param("float32", "transposed", marks=pytest.mark.long),
    ],
)
def test_filling_takes_no_more_memory_than_the_weights_and_a_window(dtype: str, layout: str, tmp_path: Path) -> None:
    """200 MB, most of it one tensor. VmHWM is the strictest measure that there is: beside the process's own memory it
    counts the pages of mapped files that the process has touched, though the kernel could take those back. So a
    mapping of a whole file, or of a whole tensor, would fail here."""
    tensors = {f"{i}.weight": torch.ones(1024, 1024) for i in range(18)} | {"18.weight": torch.ones(32768, 1024)}
    if layout == "transposed":
        tensors = {name: tensor.T for name, tensor in tensors.items()}
    folder = tmp_path / "m"
    folder.mkdir()
    write_shards(folder, tensors, 2**40 if layout != "sharded" else 40 * 2**20)
    del tensors
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), dtype, layout], capture_output=True, text=True, check=True
    )
    found = json.loads(ran.stdout)
    print(dtype, layout, {name: f"{size / 1e6:.1f} MB" for name, size in found.items()})
    assert found["file"] > 200_000_000
    assert found["weights"] * (1 if dtype == "float32" else 2) == found["file"]
    assert found["peak"] < 1.02 * found["weights"] + SLACK
    assert found["peak"] < 1.2 * found["file"]
    assert found["kept"] < 1.02 * found["weights"] + 2**23


def test_blank_costs_nothing_and_keeps_what_is_computed() -> None:
    with blank():
        net = nn.Linear(2**20, 2**20)
        table = torch.arange(3)
    assert net.weight.is_meta
    assert table.tolist() == [0, 1, 2]
    assert not nn.Linear(2, 2).weight.is_meta


def test_files_written_by_others_fill_too(net: Net, tmp_path: Path) -> None:
    save_file({name: t.contiguous() for name, t in published(net, FUSED).items()}, tmp_path / "x.safetensors")
    assert torch.equal(filled(tmp_path / "x.safetensors", FUSED)(IDS), net(IDS))
    assert load_file(tmp_path / "x.safetensors").keys() == published(net, FUSED).keys()
