"""The laboratory's engine: claims are kept as they come, a broken one stops no other, mistakes cost no measurement."""

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_report import HOSTILE, Page

from headway import cli
from headway.compare import claims
from headway.compare.claims import FAILS, HOLDS, PARTLY, Found, How, Line, Plot, Table
from headway.compare.lab import Event, command, lab, page
from headway.compare.lab.drawing import picture
from headway.compare.lab.folder import Folder

CALLS: list[str] = []


def made(name: str, section: str, verdict: str = HOLDS, seconds: float = 1.0) -> Any:
    """A claim whose measurement is a constant."""
    module: Any = types.ModuleType(f"headway.compare.claims.{name}")
    module.SECTION, module.TITLE, module.SECONDS = section, f"Title of {name}", (seconds, 10 * seconds)
    module.SAID, module.METHOD, module.RULE = "It is said.", "By counting.", "It holds if one is one."

    def measure(how: How) -> Found:
        CALLS.append(name)
        how.tell("half", 0.5)
        return Found(
            verdict=verdict,
            because="one is one",
            tables=(
                Table(title="Figures", columns=("", "n"), rows=(("a", 1.5), ("b", None)), spread={"0,1": (1.0, 2.0)}),
            ),
            plots=(
                Plot(
                    title="A plot", sentence="It rises.", x="n", y="t", lines=(Line(name="a", points=((1, 1), (2, 4))),)
                ),
            ),
            settings={"seed": how.seed},
        )

    module.measure = measure
    return module


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Three claims in place of all there are."""
    found = {
        "first": made("first", "A"),
        "second": made("second", "B", PARTLY),
        "third": made("third", "B", FAILS, 2.0),
    }
    monkeypatch.setattr(claims, "names", lambda: list(found))
    monkeypatch.setattr(claims, "find", lambda name: found[name])
    CALLS.clear()
    yield found


def test_claims_are_measured_in_turn_and_written_as_json_and_page(three: Any, tmp_path: Path) -> None:
    results = lab(out=tmp_path, device="cpu")
    assert CALLS == ["first", "second", "third"]
    assert json.loads((tmp_path / "lab.json").read_text("utf-8")) == results
    assert [c["verdict"] for c in results["claims"]] == [HOLDS, PARTLY, FAILS]
    assert results["hardware"]["cpu"] and results["versions"]["torch"] and not results["stopped"]
    text = Page((tmp_path / "lab.html").read_text("utf-8")).text
    assert "Of three common claims, one holds, one holds in part and one does not hold here." in text
    assert all(f"Title of {name}" in text for name in three)


def test_an_interrupted_run_goes_on_where_it_stood(three: Any, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if event.number == 2 and event.what:
            raise KeyboardInterrupt

    stopped = lab(out=tmp_path, device="cpu", watch=stop)
    assert stopped["stopped"] and [c["name"] for c in stopped["claims"]] == ["first"]
    assert "Stopped before the end" in (tmp_path / "lab.html").read_text("utf-8")
    CALLS.clear()
    whole = lab(out=tmp_path, device="cpu", resume=True)
    assert CALLS == ["second", "third"] and not whole["stopped"]
    assert [c["name"] for c in whole["claims"]] == ["first", "second", "third"]
    assert whole["claims"][0] == stopped["claims"][0]


def test_a_claim_that_breaks_is_told_stops_no_other_and_is_tried_again(three: Any, tmp_path: Path) -> None:
    whole = three["second"].measure
    three["second"].measure = lambda how: 1 / 0
    results = lab(out=tmp_path, device="cpu")
    assert [bool(c["failed"]) for c in results["claims"]] == [False, True, False]
    assert results["claims"][1]["failed"] == "ZeroDivisionError: division by zero"
    assert "ZeroDivisionError" in Page((tmp_path / "lab.html").read_text("utf-8")).text
    three["second"].measure = whole
    CALLS.clear()
    assert not any(c["failed"] for c in lab(out=tmp_path, device="cpu", resume=True)["claims"]) and CALLS == ["second"]


def test_a_mixer_that_cannot_join_costs_its_own_row_and_not_the_claim(three: Any, tmp_path: Path) -> None:
    whole = three["first"].measure
    three["first"].measure = lambda how: 1 / 0 if how.mixers else whole(how)
    found = lab(["first"], mixers=["identity"], out=tmp_path, device="cpu")["claims"][0]
    assert found["verdict"] == HOLDS and found["failed"] is None
    assert found["notes"] == ["Measured without identity, with which it broke off: ZeroDivisionError: division by zero"]


def test_a_folder_of_another_run_is_not_mixed_with_this_one(three: Any, tmp_path: Path) -> None:
    lab(["first"], out=tmp_path, device="cpu")
    with pytest.raises(ValueError, match="add --resume, or name another --out"):
        lab(out=tmp_path, device="cpu")
    with pytest.raises(ValueError, match=r"first.json: was measured with seed 0, and this is 1"):
        lab(out=tmp_path, device="cpu", seed=1, resume=True)
    (tmp_path / "claims" / "first.json").write_text("{", "utf-8")
    with pytest.raises(ValueError, match="is no measurement"):
        lab(out=tmp_path, device="cpu", resume=True)


def test_trainings_are_on_the_disk_as_soon_as_they_are_known(tmp_path: Path) -> None:
    folder = Folder(tmp_path, How(), resume=False)
    folder.memory["one"] = {"accuracy": 0.5}
    assert Folder(tmp_path, How(), resume=True).memory == {"one": {"accuracy": 0.5}}


def test_progress_ends_at_the_whole_and_guesses_by_what_was_measured(three: Any, tmp_path: Path) -> None:
    seen: list[Event] = []
    lab(out=tmp_path, device="cpu", watch=seen.append)
    shares = [event.share for event in seen]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 0.75  # half of the last, whose share is half
    assert [event.number for event in seen] == [1, 1, 2, 2, 3, 3]
    assert [event.bound for event in seen] == [True, True, False, False, False, False]
    assert seen[0].left == pytest.approx(4, abs=0.1) and seen[-1].left < 1  # all said 4 seconds and took none


def test_a_figure_that_is_not_finite_is_null_in_the_json(three: Any, tmp_path: Path) -> None:
    table = Table(title="T", columns=("", "n"), rows=(("a", float("nan")),))
    three["first"].measure = lambda how: Found(verdict=HOLDS, because="", tables=(table,))
    results = lab(["first"], out=tmp_path, device="cpu")
    assert results["claims"][0]["tables"][0]["rows"] == [["a", None]]
    assert "NaN" not in (tmp_path / "lab.json").read_text("utf-8")


def test_what_is_to_be_typed_again_names_everything_that_matters() -> None:
    how = How(quick=False, device="cuda", seed=3, mixers=({"name": "my.own", "heads": 2},))
    assert command(how, ["recall"]) == (
        "headway lab --full --only recall --device cuda --seed 3 --mixer my.own:heads=2"
    )


def test_a_plot_puts_numbers_where_they_belong_and_leaves_out_what_has_no_place() -> None:
    plot = {"title": "T", "sentence": "", "x": "n", "y": "t", "kind": "line", "log_x": True, "log_y": True}
    lines = [
        {"name": "a", "points": [[1, 1], [10, 10], [100, 100]]},
        {"name": "b", "points": [[1, 0], [10, None], [100, 5]]},
    ]
    found = picture({**plot, "lines": lines})
    assert found is not None
    (x1, y1), (x2, y2), (x3, y3) = found.lines[0].marks
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2) and y1 - y2 == pytest.approx(y2 - y3, abs=0.2)
    assert y1 > y3 and len(found.lines[1].marks) == 1
    assert picture({**plot, "lines": [{"name": "a", "points": [[0, 1]]}]}) is None


def test_whatever_a_claim_says_is_escaped() -> None:
    one, other = HOSTILE[:2]
    record = {
        "name": "x", "section": "A", "title": one, "said": other, "method": "m", "rule": "r", "verdict": HOLDS,
        "because": one, "failed": None, "seconds": 1.0, "command": other, "notes": [one], "settings": {"a": other},
        "tables": [{"title": one, "columns": ["", other], "rows": [[one, 1]], "spread": {}}], "plots": [],
    }  # fmt: skip
    results = {"created": "2026-01-01T00:00:00+00:00", "command": "c", "hardware": {"cpu": "c", "device": "cpu"},
               "versions": {"torch": "2"}, "threads": 1, "stopped": False, "claims": [record],
               "settings": {"quick": True, "device": "cpu", "seed": 0, "mixers": [], "tasks": []}}  # fmt: skip
    text = page.render(results)
    assert "<script" not in text.lower() and HOSTILE[0] in Page(text).text


# the command


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["headway", "lab", *map(str, words)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        cli.main()
    except SystemExit as end:
        return (int(end.code or 0), *capsys.readouterr())
    raise AssertionError("no exit status")


def test_the_command_measures_and_tells_each_verdict(
    three: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(monkeypatch, capsys, "--only", "second", "--out", tmp_path / "new", "--device", "cpu")
    assert code == 0 and "◐ B  Title of second: one is one" in out and "lab.html" in out
    assert CALLS == ["second"] and (tmp_path / "new" / "lab.html").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--only", "recal"), "no claim 'recal'; did you mean 'recall'?"),
        (("--mixer", "no.such"), "--mixer no.such: cannot import it"),
        (("--mixer", "atention"), "did you mean 'attention'?"),
        (("--mixer", "attention:heads"), "write MODULE:KEY=VALUE"),
        (("--task", "mqarr"), "did you mean 'mqar'?"),
        (("--device", "tpu"), "there is cpu"),
    ],
)
def test_every_mistake_is_one_line_before_anything_is_measured(
    words: tuple[str, ...],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys.modules["headway.compare.lab"], "measure", None)
    code, out, err = run(monkeypatch, capsys, *words, "--out", tmp_path / "new")
    assert code == 1 and said in err, err
    assert err.startswith("headway: ") and err.count("\n") == 1 and out == ""
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("values", [[2.1 + 0.1 * n for n in range(9)], [3.05 + 0.1 * n for n in range(9)], [5.0]])
@pytest.mark.parametrize("log", [True, False])
def test_a_narrow_axis_has_ticks(values: list[float], log: bool) -> None:
    points = [[value, value] for value in values]
    found = picture({"title": "T", "sentence": "", "x": "n", "y": "t", "kind": "line", "log_x": log, "log_y": log,
                     "lines": [{"name": "a", "points": points}]})  # fmt: skip
    assert found is not None and len(found.lines[0].marks) == len(values)
