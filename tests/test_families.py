"""Every family equals transformers, in hidden states and logits, loaded from its folder and saved back into one."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch
from published import TINY, ids_and_padding, label, oracle, output, saved

import headway
from headway import families
from headway.mask import Mask
from headway.models import decoder, encoder

CLOSE = 3e-5
TOKENS = [case for case in TINY if families.read(families.family(case[0]).tiny()[case[1]], "x").spec["kind"] in
          ("encoder", "decoder")]  # fmt: skip


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    apart = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1))
    assert apart < CLOSE, apart


@pytest.mark.parametrize("case", TINY, ids=label)
def test_a_configuration_goes_there_and_back(case: tuple[str, int]) -> None:
    made = json.loads((saved(case) / "config.json").read_text())
    found = families.read(made, "config.json")
    again = families.read(families.family(case[0]).write(headway.load(saved(case)).spec, found.facts), "config.json")
    assert again.spec == found.spec and again.facts == found.facts and again.rules == found.rules


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("case", TOKENS, ids=label)
def test_hidden_states_and_logits_equal_transformers(case: tuple[str, int], side: str) -> None:
    theirs, ours = oracle(case), headway.load(saved(case))
    assert isinstance(ours.net, encoder.Model | decoder.Model)
    ids, valid = ids_and_padding(ours.spec["vocab"], 3, 12, side)
    if ours.facts.pad is not None:
        ids = torch.where(valid, ids, ours.facts.pad)
    if end := next((head["end"] for head in ours.spec["heads"].values() if head.get("pool") == "end"), None):
        ids[torch.arange(3), valid.cumsum(1).argmax(1)] = end
    given = {"attention_mask": valid.long()}
    if "position_ids" in inspect.signature(theirs.base_model.forward).parameters:
        given["position_ids"] = (valid.cumsum(1) - 1).clamp(min=0) + getattr(ours.net.stack.positions, "offset", 0)
    if "global_attention_mask" in inspect.signature(theirs.forward).parameters:  # a task's own are tested elsewhere
        given["global_attention_mask"] = torch.zeros_like(ids)
    with torch.no_grad():
        base = theirs.base_model(ids, **given)
        said = theirs(ids, **given)
    keep = valid if side != "none" else None
    hidden = ours.hidden(ids, keep)
    close(hidden[valid], base.last_hidden_state[valid])
    if ours.spec["heads"]:
        name = next(iter(ours.spec["heads"]))
        if side == "left" and ours.spec["heads"][name].get("pool") == "first":
            return  # theirs is what padding became, ours the first token that is there
        found, wanted = ours.logits(ids, keep, head=name, mask=Mask()), output(said)
        close(*((t[valid] if t.shape[:2] == valid.shape else t) for t in (found, wanted)))


@pytest.mark.parametrize("case", TINY, ids=label)
def test_what_headway_saves_transformers_loads_with_equal_weights(case: tuple[str, int], tmp_path: Path) -> None:
    theirs = oracle(case)
    headway.load(saved(case)).save(tmp_path / "back", format="transformers")
    again, told = type(theirs).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not told["missing_keys"] and not told["mismatched_keys"], told
    state = again.state_dict()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("case", TINY, ids=label)
def test_a_headway_folder_loads_to_the_same_weights(case: tuple[str, int], tmp_path: Path) -> None:
    model = headway.load(saved(case))
    model.save(tmp_path / "own")
    again = headway.load(tmp_path / "own")
    assert again.facts == model.facts
    for name, tensor in model.net.state_dict().items():
        assert torch.equal(again.net.state_dict()[name], tensor), name


@pytest.mark.parametrize("case", TINY, ids=label)
def test_a_depth_that_lies_is_refused_before_rules_are_made_of_it(case: tuple[str, int]) -> None:
    config = families.family(case[0]).tiny()[case[1]]
    towers = {name: {**config[name], "num_hidden_layers": 4096} for name in ("text_config",) if name in config}
    deep = {name: 4096 for name in config if name in ("n_layer", "n_layers") or name.endswith("_layers")}
    with pytest.raises(ValueError, match="4096, and a stack has at most 1024 blocks here"):
        families.read({**config, **deep, **towers}, "config.json")


@pytest.mark.parametrize("case", TINY, ids=label)
def test_a_field_that_nobody_knows_is_refused_by_name(case: tuple[str, int]) -> None:
    config = families.family(case[0]).tiny()[case[1]]
    with pytest.raises(ValueError, match=r"'zzz_scale' .* may change the result"):
        families.read({**config, "zzz_scale": 2.0}, "config.json")
    with pytest.raises(ValueError, match="auto_map asks to run code"):
        families.read({**config, "auto_map": {"AutoModel": "evil.Model"}}, "config.json")


BARE = [case for case in TINY if label(case).split("-")[0] in ("BertModel", "RobertaModel", "GPT2Model", "LlamaModel")]


@pytest.mark.parametrize("case", BARE, ids=label)
def test_a_new_head_goes_to_transformers_in_its_form_or_not_at_all(case: tuple[str, int], tmp_path: Path) -> None:
    import transformers

    ours = headway.load(saved(case), heads={"tokens": {"outputs": 5}})
    ours.save(tmp_path / "new", format="transformers")
    theirs = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "new").eval()
    ids, _ = ids_and_padding(ours.spec["vocab"], 2, 9, "none")
    close(ours.logits(ids), theirs(ids).logits.detach())
    assert torch.equal(headway.load(tmp_path / "new").logits(ids), ours.logits(ids))
    other = headway.load(
        saved(case), heads={"classify": {"pool": "mean", "dense": True, "activation": "silu", "outputs": 2}}
    )
    with pytest.raises(ValueError, match=r"has a head 'classify' with .*give the new head that form"):
        other.save(tmp_path / "other", format="transformers")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]
