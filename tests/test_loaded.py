"""Raw tensors of a loaded model: no option is ignored, padding is nobody's business, packing does what is asked."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from published import TINY, label, saved
from torch import nn

import headway
from headway import families, mixers, models
from headway.hub import Loaded
from headway.mask import Mask
from headway.quantize import Int8Linear, is_prepared
from headway.transfer import blank


def model(name: str) -> Loaded:
    return headway.load(saved(next(case for case in TINY if label(case).startswith(name))))


def wide() -> Loaded:
    """Narrow maps are left as they are by packing."""
    case = next(case for case in TINY if label(case).startswith("GPT2LMHead"))
    found = families.read({**families.family("gpt2").tiny()[case[1]], "n_embd": 256}, "config.json")
    return Loaded(models.build(found.spec), found.spec, facts=found.facts)


IDS, PIXELS, VALID = torch.tensor([[5, 6, 7]]), torch.zeros(1, 3, 24, 24), torch.ones(1, 3, dtype=torch.bool)
IGNORED: list[tuple[str, Callable[[Loaded], Any], str]] = [
    ("GPT2LMHead", lambda m: m.hidden(m.batch([[5, 6], [7]]), torch.ones(2, 2, dtype=torch.bool)), "valid= is for ids"),
    ("GPT2LMHead", lambda m: m.logits(IDS, target=IDS), "target= is for encoder-decoders, and this is a decoder"),
    ("BartForCond", lambda m: m.logits(IDS, target=IDS, head="lm"), "no head="),
    ("BartForCond", lambda m: m.logits(IDS), "pass target="),
    ("ViTForImage", lambda m: m.hidden(PIXELS, VALID), "valid= and mask= are for tokens"),
    ("ViTForImage", lambda m: m.logits(PIXELS, mask=Mask(causal=True)), "valid= and mask= are for tokens"),
    ("ViTForImage", lambda m: m.hidden(["a cat"]), "this model takes pixels"),
    ("ViTForImage", lambda m: m.logits(IDS), "this model takes pixels"),
]


@pytest.mark.parametrize(("name", "call", "said"), IGNORED)
def test_what_would_be_ignored_is_refused(name: str, call: Callable[[Loaded], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        call(model(name))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("pad", [-1, None, 10**6])
def test_an_id_of_padding_that_no_table_has_pads_all_the_same(pad: int | None) -> None:
    ours, rows = model("LlamaForCausalLM"), [[5, 6, 7], [8]]
    expected = ours.logits(ours.batch(rows)), [found.ids for found in ours.generate(rows, max_tokens=3)]
    ours.facts = msgspec.structs.replace(ours.facts, pad=pad)
    batch = ours.batch(rows)
    assert torch.equal(ours.logits(batch)[batch.valid], expected[0][batch.valid])
    assert [found.ids for found in ours.generate(rows, max_tokens=3)] == expected[1]


def test_int8_is_int8_whatever_was_packed_before() -> None:
    ours = wide()
    ours.pack()
    ours.pack("int8")
    assert any(isinstance(module, Int8Linear) for module in ours.net.modules())


def test_a_machine_without_bfloat16_runs_it_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    ours = wide()
    ours.net.to(torch.bfloat16)
    ours.pack()
    assert not is_prepared(ours.net) and any(type(module) is nn.Linear for module in ours.net.modules())


def test_a_dtype_that_overflows_is_refused_from_a_folder_of_headways_too(tmp_path: Path) -> None:
    model("T5ForCond").save(tmp_path / "t5")
    for folder in (tmp_path / "t5", saved(next(case for case in TINY if case[0] == "t5"))):
        with pytest.raises(ValueError, match="T5 overflows float16"):
            headway.load(folder, dtype="float16")


def test_a_pickle_by_itself_is_refused_with_the_line_that_converts_it(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(1)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="a pickle can run code and is never opened; in a sandbox, convert it"):
        headway.load(tmp_path / "model.pt")


def test_a_path_is_never_looked_up_in_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("headway.fetch._download", lambda *_: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no such folder or file"):
        headway.load(Path("owner/name"))


MIXERS = {"attention": {"heads": 2}, "longformer": {"heads": 2, "window": 4}, "performer": {"heads": 2},
          "linformer": {"heads": 2, "rank": 4, "length": 16}, "linear": {"heads": 2}}  # fmt: skip


@pytest.mark.parametrize("name", mixers.names())
def test_a_folder_of_any_mixer_loads_to_the_same_model(name: str, tmp_path: Path) -> None:
    named = {"name": name, **MIXERS.get(name, {})}
    causal = "causal" in mixers.find(name).CAN and name != "linformer"
    if name == "summary":  # it looks at a context alone
        pytest.skip("no mixer of the tokens themselves")
    stack = {"blocks": [{"mixer": named, "feedforward": {}}], "repeat": 2}
    spec = {"kind": "decoder" if causal else "encoder", "width": 16, "vocab": 20, "stack": stack}
    model = Loaded(models.build(spec), spec)
    model.save(tmp_path / "m")
    ids = torch.randint(0, 20, (2, 9))
    again = headway.load(tmp_path / "m", "cpu")
    assert torch.equal(again.hidden(ids), model.hidden(ids))
    assert not any(tensor.is_meta for tensor in (*again.net.parameters(), *again.net.buffers()))


def test_tables_that_no_file_holds_come_along_to_the_device(tmp_path: Path) -> None:
    stack = {"blocks": [{"mixer": {"name": "attention", "heads": 2}}], "positions": {"name": "rotary"}}
    spec = {"kind": "decoder", "width": 16, "vocab": 20, "stack": stack}
    Loaded(models.build(spec), spec).save(tmp_path / "m")
    published = saved(next(case for case in TINY if label(case).startswith("LlamaForCausalLM")))
    for folder, dtype, kind in (
        (tmp_path / "m", "float32", torch.float32),
        (tmp_path / "m", "bfloat16", torch.bfloat16),
        (published, "bfloat16", torch.bfloat16),
    ):
        net = headway.load(folder, "meta", dtype=dtype).net  # a device that is not the CPU, wherever this runs
        assert net.stack.positions.rates.is_meta and net.stack.positions.rates.dtype == torch.float32
        assert all(p.is_meta and p.dtype == kind for p in net.parameters())


MEASURE = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import headway
def status():
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
headway.load(sys.argv[2], "cpu")  # what is imported and read once is not the model's
Path("/proc/self/clear_refs").write_text("5")
before = status()["VmRSS"]
model = headway.load(sys.argv[1], "cpu")
print(json.dumps({"peak": status()["VmHWM"] - before, "weights": sum(p.nbytes for p in model.net.parameters())}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured as Linux tells it")
def test_a_headway_folder_takes_no_more_memory_than_its_weights_and_a_fifth(tmp_path: Path) -> None:
    stack = {"blocks": [{"mixer": {"name": "attention", "heads": 8}, "feedforward": {}}], "repeat": 12}
    for name, width in (("m", 1024), ("small", 16)):
        spec = {"kind": "decoder", "width": width, "vocab": 4096, "stack": stack}
        with blank():
            net = models.assemble(spec)
        Loaded(net.to_empty(device="cpu"), spec).save(tmp_path / name)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "m"), str(tmp_path / "small")]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["weights"] > 500_000_000
    assert found["peak"] < 1.2 * found["weights"], found
