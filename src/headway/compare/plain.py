"""The comparison page of models that are not measured by error rates: their own metrics, beside plain baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from headway.compare.figures import compact, listed, number
from headway.compare.report import (
    COUNTED,
    Column,
    Model,
    budget_words,
    cost_rows,
    filled,
    megabytes,
    page,
    percent,
    title,
    variance,
    write_page,
)


def write_plain(results: Mapping[str, Any], path: Path) -> None:
    """Write the page for `results` (the contents of results.json) to `path`, whole or not at all."""
    write_page(render(results), path)


def render(results: Mapping[str, Any]) -> str:
    """The page as text."""
    models, metric = results.get("models") or [], results["metric"]
    chosen = columns(models, metric)
    more = {
        "errors": False,
        "note": note(models, metric),
        "what": what_was_compared(results, models),
        "verdict": verdict(models, metric, number((results.get("data") or {}).get("test"))),
        "columns": chosen,
        "costs": cost_rows(models, chosen),
    }
    return filled("report.html.j2", {**page(results), **more})


def columns(models: Sequence[Model], metric: Mapping[str, Any]) -> list[Column]:
    """What it costs, and every metric of any model; sizes of the test are no merit."""
    found = [
        Column("parameters", "Parameters", "", True, compact),
        Column("train_tokens_per_second", "Training", "tokens/s", False, compact),
        Column("valid_loss", "Validation loss", "nats", True, lambda value: f"{value:.3f}"),
    ]
    names = dict.fromkeys(name for model in models for name in model.get("metrics") or [])
    for name in names:
        values = [number(model.get(name)) for model in models]
        if all(value is None for value in values) or name.startswith("test_"):
            continue
        lower = name.removesuffix("_baseline") in (metric["name"],) and metric["lower"]
        found.append(Column(name, name.replace("_", " ").capitalize(), "", lower, shown(name, models), bar=True))
    return [*found, Column("peak_memory_bytes", "Peak memory", "", True, megabytes)]


def shown(name: str, models: Sequence[Model]) -> Callable[[float], str]:
    """Shares in percent, all else as a number."""
    values = [value for model in models if (value := number(model.get(name))) is not None]
    share = "loss" not in name and "bits" not in name and all(0 <= value <= 1 for value in values)
    return percent if share else lambda value: f"{value:.3g}"


def what_was_compared(results: Mapping[str, Any], models: Sequence[Model]) -> str:
    """One sentence: what was compared, on what, and under what equal budget."""
    count, data = len(models), results.get("data") or {}
    who = f"{COUNTED[count].capitalize() if count < len(COUNTED) else count} model{'s were' if count != 1 else ' was'}"
    allowance = budget_words(results.get("budget") or {})
    share = f", {'each with the same' if count != 1 else 'with a'} budget of {allowance}" if allowance else ""
    tested = number(data.get("test"))
    held_out = f", and tested on {tested:,.0f} rows held out from training" if tested is not None else ""
    return f"{who} trained on {data.get('source', 'data')} ({results.get('objective', '')}){share}{held_out}."


def verdict(models: Sequence[Model], metric: Mapping[str, Any], tested: float | None) -> str:
    """One sentence: who is best by the objective's metric, if it can be told, and what the baseline reaches."""
    name, lower = metric["name"], metric["lower"]
    ranked = sorted((m for m in models if number(m.get(name)) is not None), key=lambda m: m[name], reverse=not lower)
    if not ranked:
        return f"No model has a figure for {name.replace('_', ' ')}, so there is nothing to rank."
    show, best = shown(name, models), ranked[0]
    said = f"{title(best)} has the {'lowest' if lower else 'highest'} {name.replace('_', ' ')}, {show(best[name])}"
    if len(ranked) > 1:
        second = ranked[1]
        apart = abs(best[name] - second[name])
        if show is percent and tested and apart < 2 * (
            variance(best[name], tested) + variance(second[name], tested)
        ) ** 0.5:  # fmt: skip
            said += f", though {title(second)} ({show(second[name])}) is too close behind to tell apart on this test"
        else:
            said += f", against {show(second[name])} for {title(second)}, the next best"
    plain = number(best.get(f"{name}_baseline"))
    return said + ("" if plain is None else f"; {best.get('baseline', 'the baseline')} reaches {show(plain)}") + "."


def note(models: Sequence[Model], metric: Mapping[str, Any]) -> str:
    """What the baselines are."""
    kinds = list(dict.fromkeys(str(model["baseline"]) for model in models if model.get("baseline")))
    told = f" Baselines learn from the same rows: {listed(kinds)}." if kinds else ""
    return f"Models are ranked by {metric['name'].replace('_', ' ')}.{told}"
