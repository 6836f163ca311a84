"""Comparing: several models, one task, one equal budget; what each reached, what it cost, and the best one kept."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from headway import recipe as recipes
from headway.data.sources import references
from headway.hub import Loaded, safe_name
from headway.machine import hardware, versions
from headway.objectives._rates import Scored
from headway.probe.alignment import cross_maps
from headway.recipe import Recipe
from headway.store import write_text
from headway.text import BOS, EOS
from headway.train import Watch, check_run, open_run, rehearse, run_entry
from headway.train.data import Prepared, narrowed, prepare
from headway.train.ranks import Ranks

SAMPLES = 12
ALIGNED = 4


def compare(
    recipe: str | Path | dict[str, Any],
    *,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    watch: Watch = lambda name, status: None,
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Trains every model of a recipe under the same budget and writes `results.json` and `report.html` in `out`.

    Each model's folder (`out/NAME`) loads with `headway.load`. `watch` sees every step, `note` what is being done.
    """
    read = recipes.read(recipe, overrides)
    if not read.models:
        raise ValueError(f"recipe {read.name} has one model: use headway train, or list several under `models`")
    from headway.compare.plain import write_plain  # jinja2 is an extra: better to miss it before hours of training
    from headway.compare.report import write_report

    if Ranks().size > 1:
        raise ValueError("headway compare trains in one process: start it without torchrun, or train models one by one")
    for name, entry in read.models.items():
        safe_name(name)
        if "load" in entry.model:
            raise ValueError(
                f"models.{name}: a comparison trains models anew; go on from a checkpoint by headway train"
            )
    folder = Path(out or Path("runs") / safe_name(read.name))
    check_run(folder, read, resume=resume, overwrite=overwrite)
    note(f"reading {read.data.source} and training its tokenizers")
    prepared = prepare(read)
    for line in prepared.splits.notes:
        note(line)
    parts = {name: narrowed(read, prepared, entry.train_rows) for name, entry in read.models.items()}
    for name, entry in read.models.items():
        rehearse(read, entry, parts[name])
    open_run(folder, read, overwrite=overwrite)
    results = _head(read, prepared, _command(recipe, overrides))
    pairs = prepared.objective.METRIC[0] == "wer"
    inputs = _samples(prepared, read) if pairs else []
    for name, entry in read.models.items():
        result = run_entry(
            read, name, entry, parts[name], folder / name, resume=resume, watch=watch,
            after=lambda model, scored: _look(model, scored, inputs) if pairs else {}, note=note,
        )  # fmt: skip
        results["models"].append(result)
    write_text(folder / "results.json", json.dumps(results, indent=1))
    (write_report if pairs else write_plain)(results, folder / "report.html")
    return results


def best(results: dict[str, Any]) -> dict[str, Any]:
    """The best model by the objective's own metric; of equals, the one with the fewer token errors."""
    name, sign = results["metric"]["name"], 1 if results["metric"]["lower"] else -1
    return min(results["models"], key=lambda model: (sign * model[name], model.get("per", 0.0)))


def _head(recipe: Recipe, prepared: Prepared, command: str) -> dict[str, Any]:
    splits, objective = prepared.splits, prepared.objective
    roles = {role: getattr(recipe.data, role) for role in objective.columns()}
    tested = splits.test or splits.valid
    return {
        "name": recipe.name,
        "title": recipe.title or recipe.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "hardware": hardware(),
        "versions": versions(),
        "budget": {key: value for key, value in recipe.budget.asdict().items() if value is not None},
        "data": {
            "source": recipe.data.source,
            **roles,
            "train": len(splits.train),
            "valid": len(splits.valid),
            "test": len(references(splits.test)) if objective.METRIC[0] == "wer" else len(tested),
        },
        "objective": recipe.objective.get("name", "seq2seq"),
        "metric": {"name": objective.METRIC[0], "lower": objective.METRIC[1]},
        "models": [],
    }


def _command(recipe: str | Path | dict[str, Any], overrides: Sequence[str]) -> str:
    """What to type to run it again; a recipe given as a dict stands in the run's recipe.json."""
    source = "runs/.../recipe.json" if isinstance(recipe, dict) else str(recipe)
    words = ["headway", "compare", source, *(word for one in overrides for word in ("--set", one))]
    return shlex.join(words)


def _samples(prepared: Prepared, recipe: Recipe) -> list[str]:
    """A fixed dozen of test inputs, spread over their lengths: chosen by hash, not by how well they go."""
    texts = {text for text, _ in prepared.splits.test or prepared.splits.valid}
    texts = {text for text in texts if len(prepared.tools.ids(text)) <= min(16, recipe.max_tokens)} or texts
    order = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())[: 20 * SAMPLES]
    order.sort(key=len)
    return order[:: max(1, len(order) // SAMPLES)][:SAMPLES]


def _look(model: Loaded, scored: list[Scored], inputs: list[str]) -> dict[str, Any]:
    """What the report shows of one model: its answers to the sample inputs, and where it looked."""
    found = {s.input: s for s in scored}
    samples = [
        {"input": s.input, "expected": s.expected, "predicted": s.predicted, "correct": s.edits == 0}
        for s in (found[text] for text in inputs if text in found)
    ]
    shown = inputs[len(inputs) // 4 :: max(1, len(inputs) // ALIGNED)][:ALIGNED]
    return {"samples": samples, "alignments": [a for text in shown if (a := alignment(model, text)) is not None]}


def alignment(model: Loaded, text: str) -> dict[str, Any] | None:
    """Where the last attending block looked while the model wrote its own answer, averaged over heads."""
    ids = model.encode(text)
    answer = model.generate([text])[0].ids[: model.max_tokens]  # what positions reach
    device = next(model.net.parameters()).device
    maps = cross_maps(
        model.net, torch.tensor([[*ids, EOS]], device=device), torch.tensor([[BOS, *answer]], device=device)
    )
    if not maps:
        return None
    assert model.source is not None and model.target is not None
    weights = maps[-1][0].mean(0)  # T S: row t wrote answer[t], the last one the end
    return {
        "text": text,
        "input": [*model.source.tokens(ids), "end"],
        "output": [*model.target.tokens(answer), "end"],
        "weights": [[round(value, 4) for value in row] for row in weights.tolist()],
    }
