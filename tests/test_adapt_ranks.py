"""Adapters that several processes train are those of one, whether the frozen base is cut over them or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_ranks import train
from tiny import ARCHITECTURES, task, write_pairs

import headway
from headway import adapt

LORA = {"method": "lora", "rank": 4, "targets": "blocks.*"}


@pytest.mark.parametrize(("parallel", "how", "changed"), [
    ("fsdp", LORA, {"optimizer": {"ema": 0.9, "name": "adamw", "warmup": 2}}),
    pytest.param("fsdp", {**LORA, "quantize": "int8"}, {}, marks=pytest.mark.long),
    pytest.param("ddp", {**LORA, "dora": True}, {}, marks=pytest.mark.long),
    pytest.param("ddp", {"method": "bitfit"}, {"activation_checkpointing": True}, marks=pytest.mark.long),
])  # fmt: skip
def test_ranks_train_adapters_as_one_process_does(
    tmp_path: Path, parallel: str, how: dict[str, Any], changed: dict[str, Any]
) -> None:
    pairs = write_pairs(tmp_path / "pairs.tsv", rows=200)
    headway.train(task(pairs, model=ARCHITECTURES["transformer"], budget={"steps": 2}), out=tmp_path / "base")
    given = {**task(pairs), "model": {"load": str(tmp_path / "base")}, "adapt": how, "parallel": parallel,
             "budget": {"steps": 8}, "accumulate": 4, "batch_tokens": 192, **changed}  # fmt: skip
    del given["tokenizers"]
    alone = train(tmp_path / "alone", given, 1)
    shared = train(tmp_path / "shared", given, 2, stop=False)
    assert shared == pytest.approx(alone, abs=1e-5)
    one, other = (adapt.state(headway.load(tmp_path / name)) for name in ("alone", "shared"))
    assert one.keys() == other.keys() and all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)
