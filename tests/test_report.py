"""Claims about the comparison page: self-contained, complete, safe with hostile strings, calm without figures."""

from __future__ import annotations

import copy
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from headway.compare.figures import bar_chart, heat_map, line_chart, log_ticks, ticks
from headway.compare.report import render, verdict, write_report

WORDS = [
    ("headway", "HH EH D W EY", "HH IY D W EY"),
    ("knight", "N AY T", "K N IH T"),
    ("psychology", "S AY K AA L AH JH IY", "S AY K AA L JH IY"),
    ("antidisestablish", "AE N T IY D IH S IH S T AE B L IH SH", "AE N T IY D IH S T AE B AH L SH SH"),
    ("choir", "K W AY ER", "CH OY R"),
    ("zebra", "Z IY B R AH", "Z EH B R AH"),
]
# name, title, source, parameters, tokens/s, valid loss, PER, WER, words/s, bytes, PER by length, samples right
MODELS = [
    (
        "rnn",
        "RNN encoder-decoder",
        "Cho et al. 2014",
        1.31e6,
        21400.0,
        0.512,
        0.182,
        0.561,
        2300.0,
        3.1e8,
        (0.12, 0.168, 0.31),
        {5},
    ),
    (
        "rnn_attention",
        "RNN with attention",
        "Bahdanau et al. 2015",
        1.42e6,
        15800.0,
        0.338,
        0.094,
        0.362,
        1750.0,
        3.6e8,
        (0.1, 0.088, 0.101),
        {0, 2, 5},
    ),
    (
        "conv",
        "Convolutional",
        "Gehring et al. 2017",
        1.38e6,
        38900.0,
        0.371,
        0.108,
        0.401,
        1490.0,
        4.1e8,
        (0.109, 0.104, 0.118),
        {0, 5},
    ),
    (
        "transformer",
        "Transformer",
        "Vaswani et al. 2017",
        1.35e6,
        31200.0,
        0.315,
        0.083,
        0.331,
        1620.0,
        4.4e8,
        (0.088, 0.079, 0.09),
        {0, 1, 2, 3, 5},
    ),
]
BUCKETS = ("short (1-6)", "middle (7-9)", "long (10+)")


def alignment(word: str, output: str, sharp: float) -> dict[str, Any]:
    letters, phonemes = [*word, "end"], [*output.split(), "end"]
    rows = []
    for i in range(len(phonemes)):
        at = i * (len(letters) - 1) / max(len(phonemes) - 1, 1)
        raw = [math.exp(-sharp * (j - at) ** 2) for j in range(len(letters))]
        rows.append([w / sum(raw) for w in raw])
    return {"input": letters, "output": phonemes, "weights": rows}


def model(row: tuple[Any, ...], number: int) -> dict[str, Any]:
    name, title, source, parameters, speed, loss, per, wer, decode, memory, lengths, right = row
    curve = []
    for i in range(26):
        seconds = 2.0 * i
        train = loss + (3.6 - loss) * math.exp(-seconds / (7 + 2 * number)) + 0.03 * math.sin(i * (number + 2))
        tokens = int(seconds * speed)
        curve.append(
            {
                "step": 40 * i,
                "seconds": seconds,
                "tokens": tokens,
                "loss": train,
                "valid_loss": train + 0.02 if i % 5 == 0 else None,
            }
        )
    samples = [
        {"input": word, "expected": [good], "predicted": good if i in right else bad, "correct": i in right}
        for i, (word, good, bad) in enumerate(WORDS)
    ]
    aligned = [] if name == "rnn" else [alignment(word, good, 0.4 + number) for word, good, _ in WORDS[:4]]
    return {
        "name": name,
        "title": title,
        "source": source,
        "parameters": int(parameters),
        "train_tokens_per_second": speed,
        "valid_loss": loss,
        "per": per,
        "wer": wer,
        "decode_words_per_second": decode,
        "peak_memory_bytes": int(memory),
        "seconds": 50.0,
        "steps": 1000,
        "tokens": int(50 * speed),
        "by_length": [
            {"bucket": b, "words": 2100, "per": p, "wer": min(3.6 * p, 1.0)}
            for b, p in zip(BUCKETS, lengths, strict=True)
        ],
        "curve": curve,
        "samples": samples,
        "alignments": aligned,
    }


@pytest.fixture
def results() -> dict[str, Any]:
    return example()


def example() -> dict[str, Any]:
    """What `headway demo` might write: four models, every field filled."""
    return {
        "name": "demo",
        "title": "From letters to sounds: four ways to read a word",
        "created": "2026-11-23T21:00:00+00:00",
        "command": "headway demo --seconds 50",
        "hardware": {"cpu": "AMD EPYC 7B13", "cores": 2, "memory_bytes": 8_340_000_000, "device": "cpu"},
        "versions": {"headway": "0.1.0", "torch": "2.13.0+cpu", "python": "3.11.7"},
        "budget": {"seconds": 50.0},
        "data": {
            "source": "cmudict",
            "input": "word",
            "target": "pronunciation",
            "train": 113000,
            "valid": 6200,
            "test": 6300,
        },
        "models": [model(row, i) for i, row in enumerate(MODELS)],
    }


class Page(HTMLParser):
    """What is needed of a page: its attributes, text, table cells, and that its tags nest."""

    VOID = frozenset({"meta", "link", "br", "img", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self.text = ""
        self.stack: list[str] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if not self.stack or self.stack[-1] != "style":
            self.text += data


def best_cells(text: str) -> list[tuple[int, int, str]]:
    """(row, column, figure) of every cell marked best in the cost table."""
    body = text.split('<table class="costs">')[1].split("</table>")[0].split("<tbody>")[1]
    found = []
    for r, row in enumerate(body.split("</tr>")):
        for c, (marked, figure) in enumerate(re.findall(r'<td( class="best")?>([^<]*)', row)):
            if marked:
                found.append((r, c, figure))
    return found


def test_page_loads_nothing_from_anywhere(results: dict[str, Any]) -> None:
    text = render(results)
    page = Page(text)
    loading = {"src", "href", "xlink:href", "srcset", "poster", "action", "data"}
    assert [a for a in page.attributes if a[1] in loading] == []
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    assert "url(" not in text and "@import" not in text and "http:" not in text and "https:" not in text


def test_every_model_and_figure_is_on_the_page(results: dict[str, Any]) -> None:
    page = Page(render(results))
    for entry in results["models"]:
        assert entry["title"] in page.text and entry["source"] in page.text
    for figure in (
        "1.35 M",
        "31.2 k",
        "0.315",
        "8.3%",
        "33.1%",
        "1,620",
        "440 MB",
        "31.0%",
        "8.3 GB",
        "2.13.0+cpu",
        "50 seconds",
    ):
        assert figure in page.text, figure
    assert "headway demo --seconds 50" in page.text and "23 November 2026, 21:00 UTC" in page.text
    assert page.tags.count("polyline") == 8  # four models, two charts
    assert sum(tag == "rect" and key == "class" and "bar" in value for tag, key, value in page.attributes) == 24
    assert sum(value == "heat" for _, key, value in page.attributes if key == "class") == 12  # three models, four words


def test_ids_do_not_repeat_and_drawings_are_labelled(results: dict[str, Any]) -> None:
    page = Page(render(results))
    ids = [value for _, key, value in page.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    labelled = sum(key in ("aria-label", "aria-hidden") for tag, key, _ in page.attributes if tag == "svg")
    assert labelled == page.tags.count("svg")
    assert page.tags.count("caption") == page.tags.count("table")


def test_best_is_marked_in_each_column_the_right_way_round(results: dict[str, Any]) -> None:
    best = {(column, row) for row, column, _ in best_cells(render(results))}
    # parameters, tokens/s, validation loss, PER, WER, words/s, memory
    assert best == {(0, 0), (1, 2), (2, 3), (3, 3), (4, 3), (5, 0), (6, 0)}


def test_figures_that_read_the_same_share_the_mark(results: dict[str, Any]) -> None:
    results["models"][1]["per"] = results["models"][3]["per"] + 1e-5
    assert [row for row, column, _ in best_cells(render(results)) if column == 3] == [1, 3]


def test_a_missing_figure_is_a_dash_and_never_best(results: dict[str, Any]) -> None:
    results["models"][3].update(per=math.nan, wer=None, valid_loss=math.inf)
    del results["models"][3]["peak_memory_bytes"]
    best = {(column, row) for row, column, _ in best_cells(render(results))}
    assert {(2, 1), (3, 1), (4, 1)} <= best
    row = render(results).split("<tbody>")[1].split("</tr>")[3]
    assert re.findall(r"<td[^>]*>([^<]*)", row).count("\N{EN DASH}") == 4
    assert "nan" not in Page(render(results)).text.lower().replace("rnn", "").split()


HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>&amp;"


def test_hostile_strings_are_escaped_wherever_they_stand(results: dict[str, Any]) -> None:
    clean = Page(render(results))

    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poison(item) for key, item in value.items()}
        if isinstance(value, list):
            return [poison(item) for item in value]
        return HOSTILE + value if isinstance(value, str) else value

    page = Page(render(poison(results)))
    assert set(page.tags) == set(clean.tags)
    assert {key for _, key, _ in page.attributes} == {key for _, key, _ in clean.attributes}
    assert HOSTILE in page.text


def test_lone_surrogates_and_bidirectional_text_do_not_stop_the_page(results: dict[str, Any], tmp_path: Path) -> None:
    results["models"][0]["samples"][0]["predicted"] = "\ud800 שלום"
    write_report(results, tmp_path / "report.html")
    assert "שלום" in (tmp_path / "report.html").read_text("utf-8")


def emptied(results: dict[str, Any], **fields: Any) -> dict[str, Any]:
    for entry in results["models"]:
        entry.update(copy.deepcopy(fields))
    return results


def test_a_page_with_nothing_drawn_says_so_in_words(results: dict[str, Any]) -> None:
    text = Page(render(emptied(results, curve=[], alignments=[], by_length=[], samples=[]))).text
    for sentence in (
        "No learning curve",
        "None of the models has attention",
        "No error by input length",
        "No sample predictions",
    ):
        assert sentence in text


def test_the_barest_results_make_a_page() -> None:
    Page(render({}))
    Page(render({"models": [{}]}))
    Page(
        render(
            {
                "models": [{"name": "a", "curve": [{}], "samples": [{}], "alignments": [{}], "by_length": [{}]}],
                "created": "soon",
            }
        )
    )


@pytest.mark.parametrize("count", [1, 2, 8, 11])
def test_any_number_of_models_makes_a_page(results: dict[str, Any], count: int) -> None:
    base = results["models"]
    results["models"] = [
        copy.deepcopy(base[i % 4]) | {"name": f"m{i}", "title": f"A model with a long name, number {i}"}
        for i in range(count)
    ]
    page = Page(render(results))
    assert all(f"number {i}" in page.text for i in range(count))
    assert page.tags.count("polyline") == 2 * count


def test_one_model_alone_is_not_called_best(results: dict[str, Any]) -> None:
    results["models"] = results["models"][3:]
    text = render(results)
    assert best_cells(text) == [] and "Transformer reaches a phoneme error rate of 8.3%." in text
    assert "One model was trained" in text


def test_a_model_without_validation_loss_is_drawn_by_training_loss_and_named(results: dict[str, Any]) -> None:
    for record in results["models"][0]["curve"]:
        record["valid_loss"] = None
    results["models"][1]["curve"] = []
    page = Page(render(results))
    assert "Training loss is shown for RNN encoder-decoder" in page.text
    assert "No curve was recorded for RNN with attention" in page.text
    assert page.tags.count("polyline") == 6


def test_heat_maps_stand_under_their_word(results: dict[str, Any]) -> None:
    for entry in results["models"][1]["alignments"]:
        entry["text"] = "".join(entry["input"][:-1])  # said outright, or found from the tokens: the same heading
    headings = re.findall(r'<div class="group">\s*<h3><bdi>(.*?)</bdi>', render(results))
    assert headings == [word for word, _, _ in WORDS[:4]]


def test_models_without_attention_are_named(results: dict[str, Any]) -> None:
    assert (
        "Nothing is drawn for RNN encoder-decoder (a fixed vector), which has no attention"
        in Page(render(results)).text
    )


def test_wrong_predictions_are_marked_by_symbol_and_token(results: dict[str, Any]) -> None:
    text = render(results)
    wrong = sum(not s["correct"] for m in results["models"] for s in m["samples"])
    assert text.count('<td class="answer wrong">') == wrong and text.count('<td class="answer right">') == 24 - wrong
    assert "HH <mark>IY</mark> D W EY" in text  # a wrong token
    assert "S AY K AA L <del>AH</del> JH IY" in text  # one left out


def judged(results: dict[str, Any]) -> str:
    text = Page(render(results)).text
    return text[text.index("held out from training.") :].splitlines()[1]


def test_verdict_names_the_lowest_error_and_the_fixed_vector(results: dict[str, Any]) -> None:
    sentence = judged(results)
    assert sentence.startswith(
        "Transformer has the lowest phoneme error rate, 8.3%, against 9.4% for RNN with attention"
    )
    assert "fixed vector of RNN encoder-decoder falls behind" in sentence
    assert (
        "from 2.0 points behind RNN with attention on short (1-6) inputs to 20.9 points behind on long (10+) ones."
        in sentence
    )


def test_verdict_is_silent_on_the_fixed_vector_where_its_gap_does_not_grow(results: dict[str, Any]) -> None:
    for row in results["models"][0]["by_length"]:
        row["per"] = 0.2
    assert "fixed vector" not in judged(results)
    results["models"][0]["by_length"][2]["per"] = 0.215  # within two standard errors of 2,100 words
    assert "fixed vector" not in judged(results)


def test_verdict_does_not_crown_a_lead_within_sampling_error(results: dict[str, Any]) -> None:
    results["models"][1]["per"] = 0.085
    assert "too close behind to tell apart" in judged(results)


def test_verdict_without_any_error_ranks_nobody(results: dict[str, Any]) -> None:
    assert "nothing to rank" in judged(emptied(results, per=None))


def test_other_tasks_speak_of_tokens_and_sequences(results: dict[str, Any]) -> None:
    results["data"] = {"source": "pairs.tsv", "input": "french", "target": "english", "test": 6300}
    text = Page(render(results)).text
    assert "to turn each french into its english (pairs.tsv)" in text
    assert "lowest token error rate" in text and "phoneme" not in text


@pytest.mark.parametrize(
    ("budget", "words"), [({"steps": 2000}, "2,000 training steps"), ({"tokens": 1.5e6}, "1,500,000 training tokens")]
)
def test_the_equal_budget_is_said_in_its_own_unit(results: dict[str, Any], budget: dict[str, Any], words: str) -> None:
    results["budget"] = budget
    assert f"each with the same budget of {words}" in Page(render(results)).text


def test_report_is_written_whole_or_not_at_all(
    results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "report.html"
    write_report(results, path)
    before = path.read_text("utf-8")
    assert before == render(results)

    def refuse(source: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(ValueError, match="disk full"):
        write_report(results | {"title": "another"}, path)
    assert path.read_text("utf-8") == before
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_ticks_cover_the_range_in_round_steps() -> None:
    assert ticks(0.0, 50.0) == [0, 10, 20, 30, 40, 50]
    assert ticks(0.0, 0.31, 4) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert log_ticks(0.3, 12.0) == pytest.approx([0.5, 1, 2, 5, 10])


def test_points_land_where_their_values_say() -> None:
    chart = line_chart([(0, "a", [(0.0, 1.0), (10.0, 2.0)])], "x", "label")
    assert chart is not None and not chart.log
    (x0, y0), (x1, y1) = (tuple(map(float, point.split(","))) for point in chart.lines[0].points.split())
    assert (x0, x1) == (chart.frame.left, chart.frame.right) and y1 < y0
    bars = bar_chart([("all", [0.1, 0.2, None])], ["a", "b", "c"], "label")
    assert bars is not None
    heights = [bar.height for bar in bars.groups[0].bars]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2) and heights[2] == 0


def test_heat_map_is_one_row_an_output_token() -> None:
    drawn = heat_map(
        0, "m", {"input": ["a", " "], "output": ["A", "B", "C"], "weights": [[1.0, 0.0], [math.nan, 0.5], [0.25]]}
    )
    assert drawn is not None
    assert [cell.opacity for cell in drawn.cells] == [1.0, 0.0, 0.0, 0.5, 0.25]
    assert [tick.label for tick in drawn.columns] == ["a", "␣"] and [tick.label for tick in drawn.rows] == [
        "A",
        "B",
        "C",
    ]
    assert drawn.cells[1].x > drawn.cells[0].x and drawn.cells[2].y > drawn.cells[0].y
    assert heat_map(0, "m", {"input": [], "output": [], "weights": []}) is None


def test_verdict_needs_no_template(results: dict[str, Any]) -> None:
    from headway.compare.report import Terms

    assert verdict([], {}, Terms.of({})) == "No model has a token error rate, so there is nothing to rank."
