"""Rewards: what an answer is worth, by a rule that can be checked. A higher one is better.

A reward is a function (prompt, answer) or (prompt, answer, expected) of texts to a finite number; `expected` are the
answers listed as right. One of your own is named by its dotted path, "my_rewards.length".
"""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headway.objectives._rates import score
from headway.spec import nearest

BUILT_IN = ("per", "match", "format")
NOT_REWARDS = {*sys.stdlib_module_names, "builtins", "torch", "numpy", "headway"}


@dataclass(frozen=True)
class Reward:
    """`expects`: whether it reads what is listed as right, so that rows need a target."""

    name: str
    function: Callable[..., float]
    expects: bool

    def __call__(self, prompt: str, answer: str, expected: Sequence[str]) -> float:
        value = float(self.function(prompt, answer, tuple(expected)) if self.expects else self.function(prompt, answer))
        if not math.isfinite(value):
            raise ValueError(f"reward {self.name}: is {value} of the answer {answer[:40]!r}; give a finite number")
        return value


def find(name: str, pattern: str | None = None) -> Reward:
    """The reward of a name, or of the dotted path of a function in a module that the user's own code has imported.

    per: minus the edits to the nearest right answer over its length, in what stands between spaces (phonemes). match:
    1 for a right answer; with a `pattern`, the first place where it is found is compared (its first group). format: 1
    where the whole answer is as the `pattern` says.
    """
    module, _, function = name.rpartition(".")
    if not module:
        return _built_in(name, pattern)
    if pattern is not None:
        raise ValueError(f"objective.pattern is for match and format, and the reward is {name}: leave it out")
    if module not in sys.modules:
        raise ValueError(
            f"reward '{name}': {module} is not imported, and a recipe never runs code: "
            f"`import {module}` before, or pass --plugin {module}"
        )
    if module.partition(".")[0] in NOT_REWARDS:
        raise ValueError(f"reward '{name}': {module} is no module of rewards, and a recipe calls nothing else: name a "
                         "function of your own")  # fmt: skip
    found = getattr(sys.modules[module], function, None)
    if not callable(found):
        raise ValueError(
            f"reward '{name}': {module} has no function {function}{nearest(function, vars(sys.modules[module]))}"
        )
    if getattr(found, "__module__", module) != module:
        raise ValueError(f"reward '{name}': was imported there from {found.__module__}: name a function of {module}")
    taken = list(inspect.signature(found).parameters)
    if len(taken) not in (2, 3):
        raise ValueError(
            f"reward '{name}' takes (prompt, answer) or (prompt, answer, expected), not ({', '.join(taken)})"
        )
    return Reward(name, found, len(taken) == 3)


def _built_in(name: str, pattern: str | None) -> Reward:
    if name not in BUILT_IN:
        raise ValueError(f"objective.reward: no reward '{name}' (there is {', '.join(BUILT_IN)}, or a dotted path)"
                         f"{nearest(name, BUILT_IN)}")  # fmt: skip
    if (pattern is None and name == "format") or (pattern is not None and name == "per"):
        raise ValueError(
            f"objective.pattern: format needs one, match may have one, and per has none; {name} has {pattern!r}"
        )
    try:
        wanted = re.compile(pattern or "")
    except re.error as fault:
        raise ValueError(f"objective.pattern {pattern!r} is no regular expression: {fault}") from None

    def per(prompt: str, answer: str, expected: tuple[str, ...]) -> float:
        found = score(prompt, list(expected), answer, "whitespace")
        return -found.edits / max(1, found.length)

    def match(prompt: str, answer: str, expected: tuple[str, ...]) -> float:
        said = answer.strip()
        if pattern is not None:
            place = wanted.search(answer)
            said = "" if place is None else (place[1] if wanted.groups else place[0]) or ""
        return float(said in {text.strip() for text in expected})

    def format(prompt: str, answer: str) -> float:
        return float(wanted.fullmatch(answer) is not None)

    built: dict[str, Callable[..., float]] = {"per": per, "match": match, "format": format}
    return Reward(name, built[name], name != "format")
