"""What the laboratory's contests promise: refusals are rows, verdicts follow from figures, numbers can be had again."""

import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from headway.compare import claims, contest, growth, published, tasks, trial
from headway.compare.claims import How, _trials, bias, blends, efficient, encoder_decoder, fewer_pictures, long_range
from headway.compare.claims import scaling as scaling_claim
from headway.compare.contest import Entry
from headway.compare.trial import Outcome, Trial

MINE = ("recall", "efficient", "copying", "induction", "long_range", "blends", "scaling", "bias", "fewer_pictures",
        "encoder_decoder")  # fmt: skip
LONG = lambda name: pytest.param(name, marks=pytest.mark.long)
SMALL = Trial(task={"name": "mqar", "pairs": 2, "symbols": 4}, mixers=({"name": "identity"},), length=16, steps=2,
              rows=4, width=16, test_rows=8)  # fmt: skip


def reached(accuracy: float, speed: float = 1000.0, steps: int = 2, asked: int = 1000, **more: Any) -> Entry:
    """An entry of SMALL as if it had been measured so."""
    outcome = Outcome(
        accuracy={16: accuracy}, asked={16: asked}, loss=1.0, loss_by_eighth=(1.0,), steps=steps, seconds=1.0,
        tokens_per_second=speed, parameters=100, kept_bytes=10, state_bytes=more.get("state", 10), curve=(),
    )  # fmt: skip
    return Entry(title="", trial=SMALL, outcome=outcome)


@pytest.mark.parametrize("name", MINE)
def test_a_claim_says_what_it_measures_and_what_decides(name: str) -> None:
    claim = claims.find(name)
    assert claim.SECTION in "ADFG" and claim.SAID.endswith(".") and claim.METHOD.endswith(".")
    assert "olds" in claim.RULE or "beats" in claim.RULE


@pytest.mark.parametrize("name", ["recall", "copying", "induction", "blends", "scaling", "bias", LONG("efficient"),
                                  LONG("long_range")])  # fmt: skip
def test_a_claim_tells_all_it_measured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every training cut to two steps: nothing is learned, and all is told."""
    held = contest._held
    cut = lambda one: msgspec.structs.replace(one, steps=2, rows=4, test_rows=8, every=2)
    monkeypatch.setattr(contest, "_held", lambda title, one, device, tell: held(title, cut(one), device, tell))
    found = claims.find(name).measure(How(mixers=({"name": "average"},), tasks=({"name": "counting"},)))
    assert found.verdict in (claims.HOLDS, claims.PARTLY, claims.FAILS, claims.OPEN) and found.because
    assert found.tables and found.plots and found.settings["trials"]
    for table in found.tables:
        assert all(len(row) == len(table.columns) for row in table.rows), table.title
        for key, (least, greatest) in table.spread.items():
            row, column = map(int, key.split(","))
            value = table.rows[row][column]
            assert isinstance(value, float) and least <= value <= greatest
    assert msgspec.json.decode(msgspec.json.encode(found), type=claims.Found) == found


def test_what_a_mixer_refuses_is_a_row_that_says_why() -> None:
    linformer = {"name": "linformer", "heads": 1, "rank": 4, "length": 16}
    entries = contest.hold(contest.each(SMALL, {"attention": ({"name": "attention", "heads": 1},),
                                                "linformer": (linformer,)}))  # fmt: skip
    assert entries["attention"].outcome is not None and entries["linformer"].outcome is None
    row = _trials.table("", entries).rows[1]
    assert row[0] == "linformer" and row[1] is None and "refused: linformer cannot do causal" in str(row[-1])


def test_every_contestant_answers_or_refuses_for_what_it_sees_or_lacks() -> None:
    """At one step each; of the causal task only what looks ahead by nature is refused."""
    refused = {}
    for task, length in (({"name": "mqar", "pairs": 2, "symbols": 4}, 16), ({"name": "listops"}, 16)):
        base = msgspec.structs.replace(SMALL, task=task, steps=1)
        entries = contest.hold(contest.each(base, contest.contestants(length)))
        refused[task["name"]] = {name for name, entry in entries.items() if entry.refused}
    assert refused["mqar"] == {"linformer, rank 4", "Fourier"}
    assert refused["listops"] <= {"Fourier"}, refused["listops"]


def test_a_mixer_of_ones_own_joins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "__init__.py").write_text("")
    (tmp_path / "own" / "nothing.py").write_text(
        "from headway.mixers import Mixer, Cost\n"
        "class Nothing(Mixer):\n"
        "    CAN = frozenset({'causal', 'bidirectional'})\n"
        "    def __init__(self, width, *, positions=None):\n"
        "        super().__init__()\n"
        "    def forward(self, x, *, mask, pos, state=None, context=None):\n"
        "        return x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import importlib

    importlib.import_module("own.nothing")
    try:
        chosen = contest.contestants(16, own=({"name": "own.nothing"},))
        entry = contest.hold(contest.each(SMALL, {"mine": chosen["yours: own.nothing"]}))["mine"]
        assert entry.outcome is not None and entry.outcome.state_bytes is None
    finally:
        del sys.modules["own.nothing"], sys.modules["own"]


def test_what_is_remembered_is_not_measured_again() -> None:
    memory: dict[str, Any] = {}
    heard: list[str] = []
    tell = lambda what, share: heard.append(what)
    first = contest.hold({"a": SMALL}, tell=tell, memory=memory)
    count = len(heard)
    again = contest.hold({"b": SMALL}, tell=tell, memory=memory)
    assert count and len(heard) == count and again["b"].outcome == first["a"].outcome and again["b"].title == "b"


def test_numbers_can_be_had_again_from_the_settings_that_are_kept() -> None:
    entries = contest.hold({"a": SMALL})
    kept = msgspec.json.decode(msgspec.json.encode(_trials.settings(How(), entries)))
    again = trial.run(msgspec.convert(kept["trials"]["a"], Trial, strict=False))
    assert entries["a"].outcome is not None and again.accuracy == entries["a"].outcome.accuracy


def test_an_accuracy_stands_between_what_other_questions_would_give() -> None:
    table = _trials.table("", {"few": reached(0.5, asked=100), "many": reached(0.5, asked=10_000)})
    assert table.spread["0,1"] == pytest.approx((40.2, 59.8)) and table.spread["1,1"] == pytest.approx((49.0, 51.0))


def test_the_frontier_is_whom_nobody_beats_in_both() -> None:
    points = {"slow": (4.0, 0.9), "fast": (1.0, 0.5), "worse": (2.0, 0.4), "equal": (4.0, 0.9), "dear": (9.0, 0.95)}
    assert contest.frontier(points) == ["fast", "slow", "dear"]


def test_a_pareto_plot_leaves_out_what_has_no_state() -> None:
    entries = {"a": reached(0.5, state=1000), "b": reached(0.9, state=None)}
    assert [line.name for line in _trials.pareto("", entries, "state").lines] == ["a"]
    assert len(_trials.pareto("", entries, "time").lines) == 2


# Verdicts follow from the figures


def test_an_efficient_mixer_is_as_good_and_takes_less_time() -> None:
    entries = {"attention": reached(0.99), "quick": reached(0.985, speed=2000.0), "slow": reached(0.99, speed=10.0),
               "poor": reached(0.5, speed=9000.0)}  # fmt: skip
    assert efficient.cheaper(entries) == ["quick"]


def test_a_blend_beats_both_parts_or_neither() -> None:
    better = {"window": reached(0.5), "full": reached(0.6), "window + full": reached(0.9)}
    level = {"window": reached(0.5), "full": reached(0.9), "window + full": reached(0.9)}
    sooner = {"window": reached(0.5), "full": reached(1.0), "window + full": reached(1.0, steps=1)}
    assert blends.beats(better, "window", "full") and not blends.beats(level, "window", "full")
    assert blends.beats(sooner, "window", "full")


def test_a_bias_wins_unless_another_is_surely_better() -> None:
    near = {"attention": reached(0.80), "recurrence": reached(0.79), "convolution": reached(0.5)}
    assert bias.wins(near, "attention") and bias.wins(near, "recurrence") and not bias.wins(near, "convolution")


def test_as_good_as_attention_allows_for_the_error() -> None:
    entries = {"attention": reached(0.80), "close": reached(0.79), "far": reached(0.6)}
    assert long_range.near(entries) == ["close"]


def test_a_task_of_ones_own_joins_the_long_range() -> None:
    own = ({"name": "counting"},)
    for how in (How(tasks=own), How(tasks=own, quick=False), How(tasks=own, quick=False, device="cuda")):
        named = [(task["name"], length) for task, length, _ in long_range.settings_of(how)]
        assert "counting" in dict(named) and len({n for name, n in named if name == "listops"}) == (
            1 if how.quick else 2
        )


@pytest.mark.long
def test_attention_recalls_at_width_64_where_the_gated_convolution_falls_short() -> None:
    found = claims.find("recall").measure(How())
    assert found.verdict == claims.HOLDS, found.because


@pytest.mark.long
def test_a_recurrence_takes_induction_to_longer_rows_and_attention_does_not() -> None:
    found = claims.find("induction").measure(How())
    assert found.verdict == claims.HOLDS, found.because


def test_a_known_exponent_is_found() -> None:
    assert scaling_claim.exponent(growth.fit({n: 3.0 * n**-0.2 for n in (100, 1000, 10_000)})) == pytest.approx(0.2)


def test_a_published_setting_is_one_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = published.trial_of("listops", "linformer")
    assert (full.length, full.examples, full.steps) == (2000, 96_000, 5000) and full.mixers[0]["rank"] == 500
    with pytest.raises(ValueError, match="did you mean 'pathfinder'"):
        published.trial_of("pathfinde", "attention")
    small = {"length": 24, "width": 16, "depth": 1, "hidden": 16, "rows": 4, "steps": 9, "examples": 8, "test_rows": 8}
    monkeypatch.setitem(published.SIZES, "listops", small)
    published.main("listops", "attention", device="cpu", steps=2)
    record = msgspec.json.decode(capsys.readouterr().out)
    assert record["outcome"]["steps"] == 2 and record["published"]["attention"] == "36.4%"


# Encoder and decoder


def net_of(task: dict[str, Any], **changed: Any) -> Any:
    one = Trial(task=task, mixers=(encoder_decoder.ATTENTION,), width=16, hidden=16, **changed)
    return trial.build(one, tasks.build(task)).eval()


def test_a_decoder_leaks_nothing_and_an_encoder_does() -> None:
    ids = torch.randint(256, (4, 24))
    assert encoder_decoder.leak(net_of({"name": "prose"}), ids) == 0.0
    assert encoder_decoder.leak(net_of({"name": "prose", "hidden": 0.15}), ids) > 0.0


def test_an_untrained_model_needs_about_eight_bits_a_byte() -> None:
    ids = torch.randint(256, (200, 8))
    for task, masked in (({"name": "prose"}, False), ({"name": "prose", "hidden": 0.15}, True)):
        assert 7 < encoder_decoder.last_byte(net_of(task), ids, masked) < 12


def test_a_windows_stream_stays_as_small_as_it_is() -> None:
    window = {**encoder_decoder.ATTENTION, "window": (8, 0)}
    sizes = {}
    for name, mixer in (("window", window), ("full", encoder_decoder.ATTENTION)):
        one = Trial(task={"name": "prose"}, mixers=(mixer,), width=16)
        net = trial.build(one, tasks.build(one.task)).eval()
        sizes[name] = [encoder_decoder.step_of(net, n, "cpu")[1] for n in (32, 256)]
    assert sizes["window"][0] == sizes["window"][1] and sizes["full"][0] < sizes["full"][1]


# Pictures


def test_shuffling_moves_every_picture_s_pixels_alike() -> None:
    plain, labels = fewer_pictures.pictures(False, 0)
    moved, same = fewer_pictures.pictures(True, 0)
    assert torch.equal(labels, same) and not torch.equal(plain, moved)
    assert torch.equal(plain.flatten(1).sort(1).values, moved.flatten(1).sort(1).values)
    spread = lambda x: x.flatten(1).var(0).sort().values
    assert torch.allclose(spread(plain), spread(moved))


def test_digits_are_learned_in_a_few_steps() -> None:
    data = fewer_pictures.pictures(False, 0)
    assert fewer_pictures.learn(fewer_pictures.MODELS["ConvNet"], data, 400, 20, 0, "cpu") > 30


def test_nothing_learned_proves_nothing() -> None:
    level = {"attention": reached(0.001), "quick": reached(0.001, speed=9000.0)}
    assert efficient.cheaper(level) == []


def test_a_mixer_of_the_users_never_takes_the_name_of_ours() -> None:
    own = ({"name": "attention", "heads": 1, "window": [8, 0]}, {"name": "attention", "heads": 2})
    found = contest.contestants(32, own=own)
    assert found["attention"][0].get("window") is None and len({t for t in found if t.startswith("yours")}) == 2
