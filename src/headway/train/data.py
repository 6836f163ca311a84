"""From a recipe to what a loop reads: rows split, tools learned from the training part alone, every row as integers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec

from headway import hub, objectives
from headway.adapt._base import adaptation_of
from headway.adapt._hash import base_hash
from headway.data.batches import Order
from headway.data.examples import Examples
from headway.data.rows import Rows
from headway.data.sources import Splits, Values, fewer, load_splits
from headway.objectives import Base, Unfit, _tools
from headway.objectives._pictures import spec_for
from headway.objectives._tools import Tools
from headway.recipe import Recipe, Sides

VALID_ROWS = 1000  # for the points of a learning curve; the figure at the end takes all


@dataclass(frozen=True)
class Prepared:
    """Shared by every model of a comparison. `batches` are what is trained on; `valid` and `curve` what is held out,
    all of it and a sample; `fingerprint` is of everything that is trained on. `adapt` and `freeze` are the recipe's."""

    splits: Splits
    objective: Base
    tools: Tools
    batches: Order
    valid: Order
    curve: Order
    fingerprint: str
    adapt: dict[str, Any] | None = None
    freeze: tuple[str, ...] = ()


def prepare(recipe: Recipe) -> Prepared:
    """Loads, splits, learns and encodes."""
    objective: Base = objectives.build(recipe.objective)
    columns = objective.columns()
    splits = load_splits(recipe.data, tuple(columns))
    start = _start(recipe)
    tools = _tools.learn(
        columns,
        objective.EXTRA,
        splits.train,
        (recipe.tokenizers.input, recipe.tokenizers.target),
        max_tokens=recipe.max_tokens,
        start=start,
        lender=objective.lender(),
        image=start.image if start is not None else spec_for(_models(recipe)),
    )
    objective.ready(tools)
    encode = partial(_encode, recipe, splits, objective, tools)
    (train, _), (valid, told) = encode(splits.train), encode(splits.valid)
    _, asked = encode(splits.test)  # a row that does not fit is refused before training
    splits = replace(splits, valid=told, test=asked)  # what is measured is what the model takes
    for part, examples in (("train", train), ("valid", valid)):
        if not len(examples):
            raise ValueError(
                f"{recipe.data.source}: no row for {part}; give more rows, or data.{part} a file of its own"
            )
    order = lambda examples: objective.order(examples, **_room(recipe))
    every, whole = max(1, len(valid) // VALID_ROWS), order(valid)
    held = [recipe.objective, tools.labels, train.fingerprint(), valid.fingerprint()]
    if tools.start is not None and (recipe.adapt or adaptation_of(tools.start.net) is not None):
        held.append(base_hash(tools.start.net))  # checkpoints hold adapters alone, which belong to these weights
    record = msgspec.json.encode(held)
    return Prepared(
        splits,
        objective,
        tools,
        order(train),
        whole,
        order(Examples(valid[i] for i in range(0, len(valid), every))) if every > 1 else whole,
        fingerprint=hashlib.sha256(record).hexdigest(),
        adapt=recipe.adapt,
        freeze=recipe.freeze,
    )


def narrowed(recipe: Recipe, prepared: Prepared, count: int | None) -> Prepared:
    """The same with so many of the training rows only; what is held out, and all tools, stay."""
    if count is None:
        return prepared
    splits = replace(prepared.splits, train=fewer(prepared.splits.train, count))
    train, _ = _encode(recipe, splits, prepared.objective, prepared.tools, splits.train)
    record = f"{prepared.fingerprint} {train.fingerprint()}"
    return replace(
        prepared,
        splits=splits,
        batches=prepared.objective.order(train, **_room(recipe)),
        fingerprint=hashlib.sha256(record.encode()).hexdigest(),
    )


def all_of(order: Order, rank: int = 0, ranks: int = 1) -> Iterator[tuple[Any, bool]]:
    """This rank's share of the batches of held-out examples, the same at every call. Ranks that share a model take
    equally many: where they do not divide, some get the last one once more, and are told that it does not count."""
    for first in range(0, len(order), ranks):
        yield order.batch(min(first + rank, len(order) - 1)), first + rank < len(order)


def _models(recipe: Recipe) -> list[dict[str, Any]]:
    return [recipe.model] if recipe.model is not None else [entry.model for entry in (recipe.models or {}).values()]


def _start(recipe: Recipe) -> hub.Loaded | None:
    """The checkpoint that a recipe goes on from."""
    if recipe.model is None or "load" not in recipe.model:
        return None
    unknown = sorted(recipe.model.keys() - {"load", "heads"})
    if unknown:
        raise ValueError(
            f"model.{unknown[0]}: a model that is loaded has its own spec; beside load, only heads is told"
        )
    if recipe.tokenizers != Sides():
        raise ValueError("tokenizers: a model that is loaded brings its own; leave them out beside model.load")
    return hub.load(recipe.model["load"], device="cpu")


def _encode(
    recipe: Recipe, splits: Splits, objective: Base, tools: Tools, rows: Sequence[Values]
) -> tuple[Examples, Sequence[Values]]:
    """The examples of rows, and the rows that have any."""
    found, unfit = Examples(), set()
    for number, row in enumerate(rows):
        try:
            for example in objective.encode(row, tools):
                found.append(example)
        except Unfit as reason:
            if recipe.data.bad_rows == "refuse":
                raise ValueError(f"{recipe.data.source}: {reason}, or set data.bad_rows=skip") from None
            unfit.add(number)
    if not unfit:
        return found, rows
    splits.notes.append(f"{recipe.data.source}: {len(unfit)} rows cannot be used by this model: skipped")
    return found, Rows(row for number, row in enumerate(rows) if number not in unfit).rows


def _room(recipe: Recipe) -> dict[str, int]:
    """What batches are made by."""
    return {"tokens": recipe.batch_tokens, "length": recipe.max_tokens, "seed": recipe.seed}
