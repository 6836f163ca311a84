"""Claims about `headway cost`: the fits are right, a dead mixer stops no other, and no mistake costs a measurement."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_report import HOSTILE, Page

from headway import cli, machine
from headway.compare.cost import Event, conclude, measure, skipped
from headway.compare.cost_page import render, write_cost_page
from headway.compare.cost_subjects import entries_of, lengths_of, named_subject, subjects_of
from headway.compare.cost_worker import Job, answer, point
from headway.compare.cost_worker import measure as measure_run
from headway.compare.growth import crossover, fit, foretold
from headway.display import cost_summary
from headway.mixers import build
from headway.positions import Positions

LIKE = Job({}, width=16, heads=2)
cost: Any = sys.modules["headway.compare.cost"]


# growth


def test_the_fit_recovers_a_known_exponent_within_its_error() -> None:
    draw = random.Random(0)
    for exponent in (0.5, 1.0, 2.0):
        errors = []
        for _ in range(40):
            curve = {512 << i: 3e-6 * (512 << i) ** exponent * math.exp(draw.gauss(0, 0.05)) for i in range(8)}
            found = fit(curve)
            assert found is not None and found.error is not None
            errors.append((found.exponent - exponent) / found.error)
        within = sum(abs(error) < 3 for error in errors)
        assert within >= 30, f"{within} of 40 within three standard errors, at {exponent}"
        assert abs(sum(errors)) / len(errors) < 1, "the fit leans to one side"


def test_the_fit_takes_the_upper_half_where_fixed_costs_do_not_bend_it() -> None:
    found = fit({512 << i: 1e-2 + 1e-9 * (512 << i) ** 2 for i in range(8)})
    assert found is not None
    assert (found.shortest, found.longest, found.points) == (8192, 65536, 4)
    assert found.exponent == pytest.approx(2, abs=0.1)


def test_two_points_have_an_exponent_without_an_error_and_one_has_neither() -> None:
    found = fit({100: 1.0, 200: 4.0})
    assert found is not None and found.exponent == pytest.approx(2) and found.error is None
    assert fit({100: 1.0}) is None and fit({}) is None


def power(scale: float, exponent: float, lengths: range = range(8)) -> dict[int, float]:
    return {512 << i: scale * (512 << i) ** exponent for i in lengths}


def test_a_crossover_is_found_between_two_lengths() -> None:
    quadratic = power(1e-9, 2)
    found = crossover(power(3e-6, 1), quadratic)  # equal at 3,000 tokens
    assert found.kind == "from" and found.length == pytest.approx(3000, rel=1e-6)
    assert str(found) == "from 3,000"
    again = crossover(quadratic, power(3e-6, 1))
    assert (again.kind, str(again)) == ("until", "only until 3,000")


def test_a_crossover_that_was_not_seen_is_not_invented() -> None:
    quadratic = power(1e-9, 2)
    assert str(crossover(power(1e-3, 1), quadratic)) == "never up to 65,536"
    assert str(crossover(power(1e-8, 1), quadratic)) == "always, from 512"
    assert crossover(quadratic, quadratic).kind == "never"
    some = crossover(power(3e-6, 1), power(1e-9, 2, range(2)))  # full attention measured at 512 and 1,024 alone
    assert (str(some), some.longest) == ("never up to 1,024", 1024)
    assert crossover({512: 1.0}, {1024: 1.0}).kind == "unknown"


def test_the_future_is_foretold_between_linear_and_square() -> None:
    assert foretold([], 100) is None
    assert foretold([(100, 1.0)], 200) == pytest.approx(4)
    assert foretold([(100, 1.0), (200, 3.0)], 400) == pytest.approx(9)
    assert foretold([(100, 1.0), (200, 1.0)], 400) == pytest.approx(2)
    assert foretold([(100, 1.0), (200, 9.0)], 400) == pytest.approx(36)


# what is skipped


def measured_point(length: int, seconds: float, held: int = 0) -> dict[str, Any]:
    return {"length": length, "seconds": {"median": seconds}, "peak_extra_bytes": held}


def test_a_length_that_would_take_too_long_is_skipped_and_says_so() -> None:
    points = [measured_point(512, 1.0), measured_point(1024, 4.0)]
    assert skipped(points, 2048, 33.0, None) == ""
    assert skipped(points, 2048, 31.0, None) == (
        "at 2,048 tokens a run would take some 16.0 s, and two must fit into 31 s (--seconds)"
    )


def test_a_length_that_would_not_fit_into_memory_is_skipped_and_says_so() -> None:
    points = [measured_point(512, 1e-3, 2**28), measured_point(1024, 1e-3, 2**30)]
    assert skipped(points, 2048, 5.0, 5 * 2**30) == ""
    assert "need some 4.0 GiB, and 4.0 GiB are free" in skipped(points, 2048, 5.0, 4 * 2**30)


def test_after_a_failure_longer_lengths_are_not_tried() -> None:
    assert skipped([{"length": 512, "failed": "it died"}], 1024, 5.0, None) == "it failed at 512 tokens"
    assert skipped([{"length": 512, "refused": "a ValueError"}], 1024, 5.0, None) == ""


# one point


def test_a_point_has_all_its_figures() -> None:
    found = point(Job({"name": "attention"}, width=16, heads=2, seconds=0.5), 64)
    times = found["seconds"]
    assert 0 < times["min"] <= times["median"] <= times["max"]
    assert found["tokens_per_second"] == pytest.approx(64 / times["median"])
    assert found["state_bytes"] == 64 * (2 * 16 * 4 + 8) and found["activation_bytes"] > 0
    assert found["kernels"] == ["sdpa: is_causal, queries and keys start together"]


def test_the_form_that_is_run_is_the_one_whose_cost_is_stated() -> None:
    named = {"name": "performer", "features": 16}
    causal, both = (point(Job(named, causal=c, width=16, heads=2, seconds=0.1), 64) for c in (True, False))
    mixer = build(named | {"heads": 2}, 16, Positions())
    assert causal["flops"] == mixer.cost(64, causal=True).flops != both["flops"]
    assert both["flops"] == mixer.cost(64, causal=False).flops


@pytest.mark.parametrize(("named", "pairs"), [({}, 64 * 65 // 2), ({"window": 3}, 4 * 64 - 6)])
def test_what_the_mask_hides_is_no_work(named: dict[str, Any], pairs: int) -> None:
    found = point(Job({"name": "sdpa", **named}, kernel=True, width=16, heads=2, seconds=0.5), 64)
    assert found["flops"] == pytest.approx(4 * 16 * pairs)
    trained = point(Job({"name": "sdpa", **named}, kernel=True, width=16, heads=2, train=True, seconds=0.5), 64)
    assert trained["flops"] == pytest.approx(3 * found["flops"])


def test_options_follow_the_length_where_they_are_told_to() -> None:
    assert Job({"name": "linformer", "rank": 4}).options(96) == {
        "name": "linformer",
        "rank": 4,
        "heads": 8,
        "length": 96,
    }
    assert Job({"name": "conv", "kernel": "length"}).options(96)["kernel"] == 96
    assert Job({"name": "attention", "heads": 2}).options(96)["heads"] == 2


def test_a_refusal_is_an_answer_and_so_is_an_error() -> None:
    refused = answer(Job({"name": "fourier"}, width=16), 8)  # asked to be causal
    assert refused["length"] == 8 and "cannot be causal" in refused["refused"]
    failed = answer(Job({"name": "attention"}, width=16, heads=2, device="meta:no"), 8)
    assert failed["failed"].startswith("RuntimeError: ")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells the peak of a process")
def test_extra_memory_is_what_a_run_adds() -> None:
    held = torch.ones(2**24)  # 64 MiB that were there before
    _, extra = measure_run(lambda: torch.ones(2**23).sum(), torch.device("cpu"), 0.1)
    assert extra is not None and extra == pytest.approx(2**25, rel=0.1)
    assert held.sum() == 2**24


def test_runs_end_with_their_seconds() -> None:
    taken, _ = measure_run(lambda: None, torch.device("cpu"), 0.0)
    assert len(taken) == 1
    taken, _ = measure_run(lambda: None, torch.device("cpu"), 5.0)
    assert len(taken) == 50


# what is named


def test_lengths_double_or_are_listed() -> None:
    assert lengths_of("512..4096") == [512, 1024, 2048, 4096]
    assert lengths_of("512..5000") == [512, 1024, 2048, 4096]
    assert lengths_of("1024, 7,7") == [7, 1024]
    assert lengths_of("64") == [64]


@pytest.mark.parametrize("text", ["", "a..b", "512..", "0..8", "1.5", "-4", "64..32", "512,,8", "99999999999"])
def test_lengths_without_sense_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"--lengths {text}"):
        lengths_of(text)


def test_entries_are_split_outside_brackets() -> None:
    assert entries_of("attention:window=[512,0], rnn,") == ["attention:window=[512,0]", "rnn"]
    assert named_subject("attention:window=512", LIKE, 8).job.named["window"] == [512, 0]
    found = named_subject("attention:window=[512,0]:causal=false", LIKE, 8)
    assert found.job.named == {"name": "attention", "window": [512, 0]} and not found.job.causal
    assert found.record()["title"] == "attention:window=[512,0] (bidirectional)"
    kernel = named_subject("kernel:sdpa:window=4", LIKE, 8)
    assert kernel.job.kernel and kernel.job.causal and kernel.job.named == {"name": "sdpa", "window": 4}


def test_what_cannot_be_causal_is_measured_bidirectional_and_held_against_its_like() -> None:
    found = subjects_of(["fourier", "average"], LIKE, 8)
    said = [(one.record()["title"], one.full) for one in found]
    assert said == [
        ("attention (bidirectional)", True),
        ("attention", True),
        ("fourier (bidirectional)", False),
        ("average", False),
    ]


def test_everything_is_measured_unasked() -> None:
    from headway import kernels, mixers

    found = subjects_of((), Job({}), 512)
    assert {one.job.named["name"] for one in found} == {*mixers.names(), *kernels.names()} - {"summary"}
    titles = [one.record()["title"] for one in found]
    assert len(titles) == len(set(titles))
    assert sum(one.full for one in found) == 3  # causal, bidirectional, and the kernel


# the command


Headway = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Headway:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "gemm_peak", lambda on: 1e11)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["headway", "cost", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
        except SystemExit as end:
            return (int(end.code or 0), *capsys.readouterr())
        raise AssertionError("no exit status")

    return call


MORTAL = '''
import os, signal
from typing import ClassVar
from headway.mixers import Cost, Mixer

class Mortal(Mixer):
    """Dies of a text that is too long, as by a system short of memory."""
    CAN: ClassVar = frozenset({"causal"})
    def __init__(self, width, *, positions=None, most: int = 64):
        super().__init__()
        self.most = most
    def forward(self, x, *, mask, pos, state=None, context=None):
        if x.shape[1] > self.most:
            os.kill(os.getpid(), signal.SIGKILL)
        return x + 0
    def cost(self, length, context_length=None):
        return Cost(0, 0, 0)
'''


def test_a_run_writes_figures_and_a_page_and_a_dead_mixer_stops_no_other(run: Headway, tmp_path: Path) -> None:
    (tmp_path / "of_my_own").mkdir()
    (tmp_path / "of_my_own" / "mortal.py").write_text(MORTAL, "utf-8")
    code, out, err = run(
        "--mixers", "of_my_own.mortal,average", "--lengths", "32..128", "--width", 16, "--heads", 2, "--device", "cpu",
        "--json", "new/cost.json", "--html", "new/cost.html", "--plugin", "of_my_own.mortal",
    )  # fmt: skip
    assert (code, err) == (0, ""), err
    results = json.loads(Path("new/cost.json").read_text("utf-8"))
    assert [one["title"] for one in results["subjects"]] == ["attention", "of_my_own.mortal", "average"]
    full, mortal, average = results["subjects"]
    for one in (full, average):
        assert [p["length"] for p in one["points"]] == [32, 64, 128] and all("seconds" in p for p in one["points"])
        assert one["fit"]["points"] == 3
    assert average["crossover"]["against"] == "attention" and full["crossover"] is None
    assert mortal["points"][2] == {
        "length": 128,
        "failed": "its process was killed, most likely because memory ran out",
    }
    assert "of_my_own.mortal, 128 tokens, failed: its process was killed" in out
    assert results["command"].startswith("headway cost --mixers of_my_own.mortal,average --lengths 32,64,128")
    assert "of_my_own.mortal" in Page(Path("new/cost.html").read_text("utf-8")).text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--mixers", "atention"), "no mixer 'atention'; did you mean 'attention'?"),
        (("--mixers", "kernel:sdpaa"), "no kernel 'sdpaa'; did you mean 'sdpa'?"),
        (("--mixers", "rnn:cel=gru"), "did you mean 'cell'?"),
        (("--mixers", "rnn:gru"), "write NAME:OPTION=VALUE"),
        (("--mixers", "kernel:sdpa:windw=4"), "did you mean 'window'?"),
        (("--mixers", "kernel:sdpa:window=-4"), "window is a number of tokens"),
        (("--mixers", "rnn:causal=7"), "causal is true or false, not 7"),
        (("--mixers", "rnn:cell=["), "rnn:cell=["),
        (("--lengths", "64..32"), "swap them"),
        (("--width", 10, "--heads", 4), "width 10 is no multiple of 4 heads"),
        (("--seconds", 0), "above 0, not 0"),
        (("--device", "tpu"), "there is cpu"),
        (("--device", "cuda:99"), "GPUs here"),
        (("--json", "."), "it is a folder"),
        (("--html", "taken/cost.html"), "cannot write it"),
        (("--json", "same", "--html", "same"), "--json and --html both name same"),
    ],
)
def test_every_mistake_is_one_line_before_anything_is_measured(
    run: Headway, monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...], said: str
) -> None:
    Path("taken").write_text("a file", "utf-8")
    monkeypatch.setattr(cost, "_Worker", None)  # whoever measures, fails
    code, out, err = run(*arguments)
    assert code == 1 and said in err, err
    assert err.startswith("headway: ") and err.count("\n") == 1 and out == ""


# measuring, in processes of its own


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gemm_peak", lambda on: 1e11)


SMALL: dict[str, Any] = {"lengths": [8, 16, 32], "width": 16, "heads": 2, "device": "cpu"}


def test_past_its_seconds_a_mixer_is_measured_no_further(quick: None) -> None:
    results = measure(["attention"], **SMALL, seconds=1e-6)
    first, *others = results["subjects"][0]["points"]
    assert first["runs"] == 1
    assert all("two must fit into 1e-06 s (--seconds)" in point["skipped"] for point in others)
    assert len(others) == 2


def test_ctrl_c_keeps_what_was_measured(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(event: Event) -> None:
        if event.done == 1:
            raise KeyboardInterrupt

    results = measure(["attention", "average"], **SMALL, watch=stop)
    assert results["stopped"]
    assert [len(one["points"]) for one in results["subjects"]] == [1, 0]
    cost_summary(results)
    assert "attention" in capsys.readouterr().out
    assert "Stopped before the end" in Page(render(results)).text


def test_a_point_that_never_ends_is_ended(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "PATIENCE", -49.9)  # with ten times five seconds: a tenth of a second
    results = measure(["attention"], **SMALL, seconds=5.0)
    assert results["subjects"][0]["points"][0] == {"length": 8, "failed": "it took over 0 s and was ended"}


def test_time_left_is_a_bound_until_every_length_has_been_seen(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Instant:
        def __init__(self, job: Job) -> None:
            self.job = job

        def __enter__(self) -> Instant:
            return self

        def __exit__(self, *error: object) -> None: ...

        def ask(self, length: int) -> dict[str, Any]:
            return {**measured_point(length, 1e-3), "flops": 0}

    monkeypatch.setattr(cost, "_Worker", Instant)
    events: list[Event] = []
    measure(["attention", "average"], **SMALL, seconds=4.0, watch=events.append)
    assert [e.done for e in events] == list(range(6)) and {e.total for e in events} == {6}
    assert [e.bound for e in events] == [True, True, True, False, False, False]
    assert events[0].left == 24.0 and events[5].left < 1


# the page


def example() -> dict[str, Any]:
    """What a run might return: full attention, which stops early, and alternatives that cross it, or not, or fail."""
    lengths = [512 << i for i in range(8)]
    found = subjects_of(
        ["average", "rnn", "fourier", "conv:kernel=length:depthwise=true", "kernel:tiled"], Job({}), 512
    )
    scales = {"attention": (1e-9, 2), "sdpa": (0.8e-9, 2), "average": (1e-8, 1), "rnn": (3e-6, 1), "fourier": (1e-2, 1)}
    for one in found:
        scale, exponent = scales.get(one.job.named["name"], (0.0, 0))
        for n in lengths:
            if not scale:
                one.points.append({"length": n, "refused": "it would rather not"})
                continue
            if one.full and n > 16384:
                one.points.append({"length": n, "skipped": "it would take too long"})
                continue
            t = scale * n**exponent
            one.points.append(
                {
                    "length": n,
                    "seconds": {"median": t, "min": 0.9 * t, "max": 1.2 * t},
                    "runs": 5,
                    "tokens_per_second": n / t,
                    "peak_extra_bytes": 2048 * n,
                    "flops": 8 * 512 * 512 * n,
                    "state_bytes": None,
                    "activation_bytes": 4096 * n,
                    "kernels": [],
                }
            )
    records = [one.record() for one in found]
    conclude(records, 180e9)
    return {
        "created": "2026-11-24T03:00:00+00:00",
        "command": "headway cost --mixers average,rnn",
        "hardware": {"cpu": "AMD EPYC", "cores": 2, "memory_bytes": 8_340_000_000, "device": "cpu"},
        "versions": {"headway": "0.1.0", "torch": "2.13.0+cpu", "python": "3.11.7"},
        "threads": 2,
        "settings": {"width": 512, "heads": 8, "train": False, "device": "cpu", "seconds": 5.0, "lengths": lengths},
        "gemm_peak_flops": 180e9,
        "stopped": False,
        "subjects": records,
    }


def test_the_page_loads_nothing_and_tells_all() -> None:
    text = render(example())
    page = Page(text)
    assert [a for a in page.attributes if a[1] in {"src", "href", "xlink:href", "srcset"}] == []
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert "url(" not in text and "@import" not in text and "http" not in text.replace("http-equiv", "")
    for figure in (
        "from 3,000",
        "always, from 512",
        "never up to 16,384",
        "2.00 ± 0.00",
        "1.00 ± 0.00",
        "5.5x at 16,384",
        "conv:kernel=length:depthwise=true, 512 to 65,536 tokens, refused: it would rather not",
        "180 GFLOP/s",
        "AMD EPYC with 2 threads",
        "headway cost --mixers average,rnn",
    ):
        assert figure in page.text, figure
    assert page.tags.count("polyline") == 2 * (
        2 + 2 + 4 + 1
    )  # exact, recurrences, controls, kernels; conv has no points
    assert page.tags.count("caption") == page.tags.count("table")


def test_the_verdict_leaves_controls_and_kernels_out() -> None:
    text = Page(render(example())).text
    assert "Faster than full attention here, first of 2: rnn, from 3,000." in text


def test_the_verdict_names_them_where_there_is_nothing_else() -> None:
    results = example()
    results["subjects"] = [r for r in results["subjects"] if r["full"] or r["title"] == "average"]
    assert "first of 1: average, always, from 512." in Page(render(results)).text


def test_hostile_names_are_escaped() -> None:
    results = example()
    clean = Page(render(results))

    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: poison(item) if key not in ("kind", "group", "device") else item for key, item in value.items()
            }
        if isinstance(value, list):
            return [poison(item) for item in value]
        return HOSTILE + value if isinstance(value, str) else value

    page = Page(render(poison(results)))
    assert set(page.tags) == set(clean.tags)
    assert {key for _, key, _ in page.attributes} == {key for _, key, _ in clean.attributes}


def test_a_page_without_a_single_figure_says_so(tmp_path: Path) -> None:
    results = example()
    for one in results["subjects"]:
        one["points"] = [{"length": 512, "failed": "it died"}]
    conclude(results["subjects"], 1.0)
    write_cost_page(results, tmp_path / "cost.html")
    text = Page((tmp_path / "cost.html").read_text("utf-8")).text
    assert "Nothing was measured" in text and "failed: it died" in text


def test_the_terminal_shows_the_same_figures(capsys: pytest.CaptureFixture[str]) -> None:
    cost_summary(example())
    out = capsys.readouterr().out
    for figure in ("from 3,000", "never up to", "2.00 ± 0.00", "16,384", "100 ms |", "refused: it would rather not"):
        assert figure in out, figure
