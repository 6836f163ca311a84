"""Raw tensors of a loaded model: no option is ignored, padding is nobody's business, packing does what is asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from published import TINY, label, saved
from torch import nn

import headway
from headway import families, models
from headway.hub import Loaded
from headway.mask import Mask
from headway.quantize import Int8Linear, is_prepared


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
