"""Claims about models that ranks cut as they are built: the weights of one process, never two blocks whole at once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_ranks import DECODER, TOWERS
from tiny import ARCHITECTURES
from torch import Tensor, nn

from headway import models
from headway.store import read_folder, write_folder
from headway.train.deferred import draw, hollow
from headway.train.ranks import Gathered, alone
from headway.weights import open_weights

SIZES = {"source_vocab": 12, "target_vocab": 14}
TIED = {"lm": {"outputs": 12, "bias": False, "tie": True}}
TOWER = {**TOWERS["towers"]["letters"], "vocab": 12}  # type: ignore[index]
SHARING = {
    **DECODER,
    "vocab": 12,
    "kind": "encoder",
    "stack": {
        "positions": {"name": "learned", "length": 16},
        "blocks": [{"mixer": {"name": "linformer", "heads": 2, "length": 16, "rank": 4, "sharing": "layerwise"}}],
        "repeat": 2,
    },
}
SPECS: dict[str, dict[str, Any]] = {
    "decoder": {**DECODER, "vocab": 12, "heads": TIED},
    "dual": {"kind": "dual", "towers": {"letters": TOWER, "sounds": TOWER}},
    **{name: {**spec, **SIZES} for name, spec in ARCHITECTURES.items()},
}


def built(spec: dict[str, Any], seed: int = 3) -> tuple[dict[str, Tensor], Tensor]:
    """One process's weights, and the next number that it would draw."""
    torch.manual_seed(seed)
    net = models.build(spec)
    return net.state_dict(), torch.rand(1)


@pytest.mark.parametrize("name", SPECS)
def test_a_model_drawn_in_parts_has_the_bits_of_one_drawn_whole(name: str) -> None:
    wanted, following = built(SPECS[name])
    torch.manual_seed(3)
    with hollow():
        net = models.assemble(SPECS[name])
    linears = [m for m in net.modules() if isinstance(m, nn.Linear) and m.weight is not getattr(net, "embedding", m)]
    assert all(m.weight.is_meta for m in linears if "heads" not in SPECS[name])
    seen: list[dict[str, Tensor]] = []

    def cut(block: nn.Module) -> None:
        """Keeps what a rank would keep, and gives the whole back."""
        assert not any(p.is_meta for p in block.parameters())
        seen.append(copy.deepcopy(block.state_dict()))
        for other in blocks:
            if other is not block:
                assert all(m.weight.is_meta for m in other.modules() if isinstance(m, nn.Linear))
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.to("meta")

    blocks = list(alone(net))
    assert blocks
    draw(net, blocks, cut)
    assert torch.equal(torch.rand(1), following), "as many numbers were drawn"
    assert len(seen) == len(blocks)
    names = {id(module): name for name, module in net.named_modules()}
    found = {k: v for k, v in net.state_dict().items() if not v.is_meta}
    for block, state in zip(blocks, seen, strict=True):
        found |= {f"{names[id(block)]}.{key}": value for key, value in state.items()}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_matrices_that_blocks_share_are_drawn_whole_and_stay_shared() -> None:
    wanted, _ = built(SHARING)
    torch.manual_seed(3)
    with hollow():
        net = models.assemble(SHARING)
    draw(net, alone(net), lambda block: pytest.fail("such blocks are not cut one by one"))
    own = net.state_dict()
    assert all(torch.equal(own[key], wanted[key]) for key in wanted)
    assert len(list(net.parameters())) == len(list(models.build(SHARING).parameters()))


def test_tensors_that_are_gathered_one_by_one_make_the_file_that_all_at_once_make(tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.randn(3, 5),
        "half": torch.randn(7).bfloat16(),
        "step": torch.tensor(4.0),
        "turned": torch.randn(4, 2).T,
        "whole": torch.arange(3),
        "none": torch.zeros(0, 4),
    }
    for name, group in (("dict", tensors), ("lazy", Gathered(tensors)), ("empty", Gathered({}))):
        write_folder(tmp_path / name, {"model": group}, {})
    found = load_file(tmp_path / "lazy" / "model.safetensors")
    again, _ = read_folder(tmp_path / "lazy", open_weights)
    for name, wanted in load_file(tmp_path / "dict" / "model.safetensors").items():
        for one in (found[name], again["model"][name]):
            assert one.dtype == wanted.dtype and torch.equal(one, wanted)
    assert load_file(tmp_path / "empty" / "model.safetensors") == {}
