"""From a recipe to what a loop reads: pairs split, tokenizers trained, every pair as ids."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from headway.data.batches import Batch, Batches, Example, collate
from headway.data.sources import Splits, load_splits
from headway.recipe import Recipe
from headway.text import Tokenizer

VALID_PAIRS = 1000  # for the points of a learning curve; the figure at the end takes all


@dataclass(frozen=True)
class Prepared:
    """Shared by every model of a comparison."""

    splits: Splits
    source: Tokenizer
    target: Tokenizer
    batches: Batches
    valid: list[Batch]
    curve: list[Batch]
    fingerprint: str  # of everything that is trained on
    lowercase: bool  # no training input has an upper-case letter, so a user's is lowered too


def prepare(recipe: Recipe) -> Prepared:
    """Loads, splits, trains the tokenizers on the training part alone, and encodes."""
    splits = load_splits(recipe.data)
    source = Tokenizer.train(recipe.tokenizers.input, (pair[0] for pair in splits.train))
    target = Tokenizer.train(recipe.tokenizers.target, (pair[1] for pair in splits.train))
    train = _encode(recipe, splits, splits.train, source, target)
    valid = _encode(recipe, splits, splits.valid, source, target)
    _encode(recipe, splits, splits.test, source, target)  # a pair that does not fit is refused before training
    for part, examples in (("train", train), ("valid", valid)):
        if not examples:
            raise ValueError(
                f"{recipe.data.source}: no pair for {part}; give more rows, or data.{part} a file of its own"
            )
    return Prepared(
        splits,
        source,
        target,
        Batches(train, tokens=recipe.batch_tokens, seed=recipe.seed),
        _in_batches(valid, recipe.batch_tokens),
        _in_batches(valid[:: max(1, len(valid) // VALID_PAIRS)], recipe.batch_tokens),
        fingerprint=hashlib.sha256(repr((train, valid)).encode()).hexdigest(),
        lowercase=all(text == text.lower() for text, _ in splits.train),
    )


def _encode(
    recipe: Recipe, splits: Splits, pairs: Sequence[tuple[str, str]], source: Tokenizer, target: Tokenizer
) -> list[Example]:
    examples, long = [], 0
    for input, output in pairs:
        example = (source.encode(input), target.encode(output))
        if not example[0] or max(map(len, example)) > recipe.max_tokens:
            if recipe.data.bad_rows == "refuse":
                raise ValueError(
                    f"{recipe.data.source}: the pair {input[:40]!r} is {len(example[0])} and {len(example[1])} tokens; "
                    f"the model takes 1 to {recipe.max_tokens}: raise max_tokens, or set data.bad_rows=skip"
                )
            long += 1
            continue
        examples.append(example)
    if long:
        splits.notes.append(f"{recipe.data.source}: {long} pairs longer than max_tokens={recipe.max_tokens} skipped")
    return examples


def _in_batches(examples: list[Example], tokens: int) -> list[Batch]:
    """In order of length, so that little is padded; every example once."""
    examples = sorted(examples, key=lambda e: (len(e[0]), len(e[1])))
    rows = max(1, tokens // 32)
    return [collate(examples[i : i + rows]) for i in range(0, len(examples), rows)]
