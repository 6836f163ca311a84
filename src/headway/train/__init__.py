"""Training: one loop for every model. `headway.train(recipe)` trains one and says what it reached and what it cost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from headway import recipe as recipes
from headway.hub import Loaded, safe_name
from headway.machine import Peak, hardware, versions
from headway.recipe import Entry, Recipe
from headway.store import read_json, sweep, write_text
from headway.train.board import check_log
from headway.train.card import card_of
from headway.train.data import Prepared, prepare
from headway.train.deferred import shared
from headway.train.loop import Interrupted, Status, Trainer
from headway.train.network import network, refuse_redraw, spec_of
from headway.train.optim import build_optimizers
from headway.train.ranks import OfRank, Ranks

__all__ = ["Interrupted", "Status", "check_run", "open_run", "rehearse", "run_entry", "train"]

Watch = Callable[[str, Status], None]


def train(
    recipe: str | Path | dict[str, Any],
    *,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    watch: Watch = lambda name, status: None,
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Trains the one model of a recipe in `out` (default `runs/NAME`) and returns what it reached and cost.

    The folder then holds `model/`, `result.json`, `card.json` (all that one needs to have it again), `log.jsonl` and
    the last checkpoints; `headway.load(out)` uses it.
    """
    read = recipes.read(recipe, overrides)
    if read.model is None:
        raise ValueError(f"recipe {read.name} has several models: use headway compare, or set `model`")
    folder = Path(out or Path("runs") / safe_name(read.name))
    check_run(folder, read, resume=resume, overwrite=overwrite)
    with Ranks() as ranks:
        _check_ranks(read, ranks.size)
        note(f"reading {read.data.source} and training its tokenizers")
        entry, prepared = Entry(model=read.model), prepare(read)
        for line in prepared.splits.notes:
            note(line)
        rehearse(read, entry, prepared, ranks)
        ranks.wait()  # until all have seen the folder as it was
        if ranks.first:
            open_run(folder, read, overwrite=overwrite)
        ranks.wait()
        try:
            return run_entry(read, "model", entry, prepared, folder, resume=resume, watch=watch, ranks=ranks, note=note)
        except ValueError as error:
            if ranks.first:
                raise
            raise OfRank(f"rank {ranks.rank}: {error}") from None


def _check_ranks(recipe: Recipe, ranks: int) -> None:
    if recipe.accumulate % ranks:
        more = -(-recipe.accumulate // ranks) * ranks
        raise ValueError(
            f"a step takes accumulate={recipe.accumulate} batches over all ranks, which {ranks} ranks cannot share "
            f"evenly: set accumulate={more} (and lower batch_tokens in proportion for the same training)"
        )


def check_run(folder: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """An old run is never written over unasked, and resumed only with its own recipe. Nothing is touched yet."""
    if resume and overwrite:
        raise ValueError("--resume goes on with a run and --overwrite removes it: choose one")
    path = folder / "recipe.json"
    # a recipe alone is a run that never began; one half written, of a run that was killed even before
    if folder.is_dir() and any(file != path and file.suffix != ".part" for file in folder.iterdir()):
        if not path.is_file():
            raise ValueError(f"{folder}: is not empty and holds no run, so it is left alone; choose another --out")
        if not (resume or overwrite):
            raise ValueError(f"{folder}: holds a run; --resume goes on with it, --overwrite starts anew")
        # read through the type: a key that Headway has learned since then, at its default, makes no other recipe
        if resume and _record(recipes.read(read_json(path, dict))) != _record(recipe):
            raise ValueError(f"{path}: the run there has another recipe; resume with that one, or choose another --out")


def open_run(folder: Path, recipe: Recipe, *, overwrite: bool) -> None:
    """The folder of a run that `check_run` allowed: an old one goes only now, when the new one is known to train."""
    if overwrite and (folder / "recipe.json").is_file():
        if strangers := sorted(path.name for path in folder.iterdir() if not _of_a_run(path)):
            raise ValueError(f"{folder}: holds {strangers[0]}, which no run wrote, so nothing is removed; choose "
                             "another --out, or move it away")  # fmt: skip
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be the folder of a run ({error.strerror}); choose another --out") from None
    sweep(folder)
    write_text(folder / "recipe.json", json.dumps(_record(recipe), indent=1))


WRITTEN = {
    "recipe.json",
    "card.json",
    "log.jsonl",
    "result.json",
    "results.json",
    "report.html",
    "model",
    "checkpoints",
    "tensorboard",
}


def _of_a_run(path: Path) -> bool:
    """Whether a run wrote it: by its name, or, a model of a comparison, by what is in it."""
    if path.name in WRITTEN or path.suffix == ".part" or path.name.startswith("stopped-step-"):
        return True
    return path.is_dir() and all(_of_a_run(inner) for inner in path.iterdir())


def _record(recipe: Recipe) -> dict[str, Any]:
    """Lists for tuples, as the file will give it back."""
    return msgspec.json.decode(msgspec.json.encode(recipe))


def rehearse(recipe: Recipe, entry: Entry, prepared: Prepared, ranks: Ranks | None = None) -> None:
    """Builds a model and shows it the longest it may meet: a mistake costs a second and no training. A model that its
    ranks cut is shown it in parts; it writes nothing yet."""
    check_log(recipe)
    spec, cut = spec_of(entry.model, prepared), ranks is not None and ranks.size > 1 and recipe.parallel == "fsdp"
    net = shared(spec, prepared.tools, ranks, "fsdp") if ranks and cut else network(spec, prepared.tools)
    optimizer = entry.optimizer or recipe.optimizer
    build_optimizers(net, optimizer)
    refuse_redraw(net, recipe, optimizer)
    longest = max((order.longest() for order in (prepared.batches, prepared.valid)), key=lambda batch: batch.tokens)
    if ranks and cut:
        with torch.no_grad():
            prepared.objective(net, longest.to(ranks.device))
    else:
        prepared.objective.rehearse(net, longest, prepared.tools)


def run_entry(
    recipe: Recipe,
    name: str,
    entry: Entry,
    prepared: Prepared,
    folder: Path,
    *,
    resume: bool = False,
    watch: Watch = lambda name, status: None,
    after: Callable[[Loaded, list[Any]], dict[str, Any]] = lambda model, scored: {},
    ranks: Ranks | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Trains and tests one model; `after` may add to the result. A finished one is not trained again on resume."""
    done = folder / "result.json"
    if resume and done.is_file():
        return read_json(done, dict)
    folder.mkdir(parents=True, exist_ok=True)
    peak = Peak()
    ranks = ranks or Ranks()
    trainer = Trainer(
        recipe,
        entry.model,
        entry.optimizer or recipe.optimizer,
        prepared,
        folder,
        lambda status: watch(name, status),
        ranks,
    )
    if resume:
        trainer.resume(note)
    if ranks.first and not (folder / "card.json").is_file():
        write_text(folder / "card.json", json.dumps(card_of(recipe, trainer, prepared.fingerprint), indent=1))
    model = trainer.fit()
    memory = peak.bytes
    if ranks.first:
        model.save(folder / "model")  # before it is measured, which may fail
    valid_loss = trainer.valid_loss(prepared.valid)
    model.net.eval()
    if not ranks.first:
        ranks.wait()
        return read_json(done, dict)
    metrics, scored = _measured(model, prepared, recipe)
    progress = trainer.progress
    result = {
        "name": name,
        "title": entry.title or name,
        "source": entry.source,
        "parameters": model.parameters,
        "train_tokens_per_second": progress.tokens / progress.seconds,
        "valid_loss": valid_loss,
        "tested_on": "test" if prepared.splits.test else "valid",
        "metrics": list(metrics),
        **metrics,
        "peak_memory_bytes": memory,
        "seconds": progress.seconds,
        "steps": progress.step,
        "tokens": progress.tokens,
        "curve": progress.curve,
        "use": prepared.objective.use(prepared.tools),
        "hardware": hardware(),
        "versions": versions(),
        **after(model, scored),
    }
    write_text(done, json.dumps(result, indent=1))
    ranks.wait()
    return result


def _measured(model: Loaded, prepared: Prepared, recipe: Recipe) -> tuple[dict[str, Any], list[Any]]:
    """The objective's metrics on held-out rows, beside plain baselines; and what was written or chosen for each."""
    objective, splits = prepared.objective, prepared.splits
    held_out = objective.asked(splits.test or splits.valid, recipe.test_limit)
    metrics, scored = objective.score(model, held_out, prepared.tools, recipe)
    return {**metrics, **objective.baseline(splits.train, held_out, recipe)}, scored
