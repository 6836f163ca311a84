"""Every published decoder writes, token by token out of its state, what transformers writes, with padding or not."""

from __future__ import annotations

import pytest
import torch
from published import TINY, ids_and_padding, label, oracle, saved
from torch import Tensor

import headway
from headway import families
from headway.models import decoder
from headway.positions import positions_of
from headway.state import KeyValue, Ring

NEW, PROMPT = 16, 11
SPECS = {case: families.read(families.family(case[0]).tiny()[case[1]], "x").spec for case in TINY}
WRITERS = [case for case, spec in SPECS.items() if spec["kind"] == "decoder" and "lm" in spec["heads"]]
WINDOWED = [case for case in WRITERS if any(b["mixer"].get("window") for b in SPECS[case]["stack"]["blocks"])]


def stream(net: decoder.Model, ids: Tensor, valid: Tensor | None, new: int, chunk: int) -> tuple[Tensor, Tensor, list]:
    """The new tokens, the logits they were chosen by, the states: the prompt `chunk` tokens at a time, then singly."""
    rows, length = ids.shape
    state = net.init_state(rows, length + new)
    pos = positions_of(valid, rows, length, ids.device)
    for at in range(0, length, chunk):
        part = slice(at, at + chunk)
        hidden = net(ids[:, part], None if valid is None else valid[:, part], pos=pos[:, part], state=state)
    said, scores, last = [], [], pos[:, -1:]
    for _ in range(new):
        scores.append(net.head("lm", hidden[:, -1:])[:, 0])
        said.append(scores[-1].argmax(-1))
        last = last + 1
        hidden = net(said[-1][:, None], pos=last, state=state)
    return torch.stack(said, 1), torch.stack(scores, 1), state


def prompts(case: tuple[str, int], side: str) -> tuple[Tensor, Tensor | None]:
    ids, valid = ids_and_padding(SPECS[case]["vocab"], 4, PROMPT, side)
    return torch.where(valid, ids, 0), valid if side != "none" else None


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("case", WRITERS, ids=label)
def test_greedy_tokens_out_of_a_state_are_those_of_transformers(case: tuple[str, int], side: str) -> None:
    ids, valid = prompts(case, side)
    endless = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": 10**6, "pad_token_id": 0}
    there = torch.ones_like(ids) if valid is None else valid.long()
    with torch.inference_mode():
        wanted = oracle(case).generate(ids, attention_mask=there, **endless)[:, PROMPT:]
        found, _, _ = stream(headway.load(saved(case), "cpu").net, ids, valid, NEW, PROMPT)
    assert torch.equal(found, wanted)
    assert len({tuple(row) for row in found.tolist()}) > 1  # rows that all say the same would prove little


@pytest.mark.parametrize("case", WRITERS, ids=label)
def test_a_stream_in_chunks_scores_as_the_whole_does_at_once(case: tuple[str, int]) -> None:
    ids, valid = prompts(case, "left")
    assert valid is not None
    net = headway.load(saved(case), "cpu").net
    with torch.inference_mode():
        said, scores, _ = stream(net, ids, valid, NEW, 4)
        longer = torch.cat([valid, torch.ones_like(said, dtype=torch.bool)], 1)
        whole = net.head("lm", net(torch.cat([ids, said], 1), longer))[:, PROMPT - 1 : -1]
    assert float((scores - whole).abs().max() / whole.abs().max()) < 3e-5


@pytest.mark.parametrize("case", WINDOWED, ids=label)
def test_a_window_is_remembered_in_a_ring_that_does_not_grow(case: tuple[str, int]) -> None:
    ids, valid = prompts(case, "left")
    net = headway.load(saved(case), "cpu").net
    with torch.inference_mode():
        _, _, states = stream(net, ids, valid, NEW, PROMPT)
    blocks = SPECS[case]["stack"]["blocks"] * SPECS[case]["stack"]["repeat"]
    assert any(isinstance(state, Ring) for state, _ in states)
    for block, (state, _) in zip(blocks, states, strict=True):
        if window := block["mixer"].get("window"):
            assert isinstance(state, Ring) and state.k is not None and state.k.shape[2] == window[0] < PROMPT
        else:
            assert isinstance(state, KeyValue) and state.length == PROMPT + NEW
