"""Plain baselines, so that a figure can be judged: what counting or a linear model reaches on the same rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from headway.data.sources import Values, fewer, references
from headway.objectives._rates import rates, score


def classes(train: Sequence[Values], rows: Sequence[Values], of: str, seed: int) -> dict[str, Any]:
    """Accuracy of logistic regression on tf-idf of words or on pixels, where scikit-learn is there and pictures are of
    one size; else of the commonest class."""
    wanted = [str(row[-1]) for row in rows]
    labels = [str(row[-1]) for row in train]
    found, name = [Counter(labels).most_common(1)[0][0]] * len(rows), "the commonest class"
    features = _features(train, rows, of)
    if features is not None:
        from sklearn.linear_model import LogisticRegression

        fitted = LogisticRegression(max_iter=2000, C=10.0, random_state=seed).fit(features[0], labels)
        found = fitted.predict(features[1]).tolist()
        name = "logistic regression on " + ("pixels" if of == "image" else "tf-idf of words")
    right = sum(a == b for a, b in zip(wanted, found, strict=True))
    return {"accuracy_baseline": right / max(1, len(rows)), "baseline": name}


def _features(train: Sequence[Values], rows: Sequence[Values], of: str) -> tuple[Any, Any] | None:
    """Rows as vectors; None where that cannot be."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ModuleNotFoundError:
        return None
    if of == "image":
        pictures = [row[0] for row in (*train, *rows)]
        if any(isinstance(picture, str) for picture in pictures) or len({np.shape(p) for p in pictures}) > 1:
            return None
        flat = np.stack([np.asarray(picture, np.float32).ravel() / 255 for picture in pictures])
        return flat[: len(train)], flat[len(train) :]
    join = lambda row: " ".join(row[:-1])
    counts = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    return counts.fit_transform([join(row) for row in train]), counts.transform([join(row) for row in rows])


STEPS = 2**33  # of comparing letters, in which a look for the nearest inputs is over


def nearest_input(train: Sequence[Values], rows: Sequence[Values], kind: str) -> dict[str, Any]:
    """Error rates of answering with the target of the training input that is fewest edits away, the first of equals.

    `kind`: of the target's tokenizer. Where there are too many training inputs to compare with all, fewer are taken,
    and `baseline` says how many.
    """
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    wanted, known = references(rows), references(train)
    length = 1 + sum(map(len, known)) // max(1, len(known))
    count = max(1, STEPS // (length * -(-length // 64) * max(1, len(wanted))))
    inputs = [text for text, *_ in fewer([(text,) for text in known], count)]
    asked, nearest = list(wanted), []
    for i in range(0, len(asked), 64):  # so many rows of distances at a time
        distances = cdist(asked[i : i + 64], inputs, scorer=Levenshtein.distance, dtype=np.uint32)
        nearest += [known[inputs[j]][0] for j in distances.argmin(1)]
    said = rates([score(text, wanted[text], answer, kind) for text, answer in zip(asked, nearest, strict=True)])
    name = "the target of the nearest training input" + (f" of {count:,}" if count < len(known) else "")
    return {"per_baseline": said.per, "wer_baseline": said.wer, "baseline": name}


def words_alone(train: Sequence[Values], rows: Sequence[Values]) -> dict[str, Any]:
    """The F1 of spans by the label that each word has most often, whatever stands around it."""
    seen: dict[str, Counter[str]] = {}
    for text, labels in train:
        for word, label in zip(text.split(), labels.split(), strict=False):
            seen.setdefault(word, Counter())[label] += 1
    usual = {word: counts.most_common(1)[0][0] for word, counts in seen.items()}
    told = ((runs(labels.split()), runs([usual.get(word, "O") for word in text.split()])) for text, labels in rows)
    return {"span_f1_baseline": span_f1(told)[0], "baseline": "the label that each word has most often"}


def span_f1(pairs: Iterable[tuple[set[Any], set[Any]]]) -> tuple[float, int]:
    """The F1 of spans that are told whole, over pairs of the wanted and the given ones; and how many are wanted."""
    right = wanted = given = 0
    for one, two in pairs:
        right, wanted, given = right + len(one & two), wanted + len(one), given + len(two)
    return 2 * right / max(1, wanted + given), wanted


def runs(labels: Sequence[str]) -> set[tuple[str, int, int]]:
    """Spans of one label, as (label, first, last), without "O"."""
    from headway.use.classify import tag

    found: list[tuple[str, int, int]] = []
    last = ""
    for i, label in enumerate(labels):
        begins, name = tag(label)
        if name == last and not begins:
            found[-1] = (name, found[-1][1], i)
        else:
            found.append((name, i, i))
        last = name
    return {span for span in found if span[0] != "O"}
