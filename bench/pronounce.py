"""Quality: the longer built-in recipe (`headway train pronounce`) beside Phonetisaurus, on the same split.

Phonetisaurus is trained here on the very training pairs. Ours is trained in `runs/pronounce` if it is not there yet
(a stopped run goes on), then both answer the same test words.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import save

import headway
from headway import recipe as recipes
from headway.data.sources import load_splits, references
from headway.objectives._rates import by_length, evaluate, rates, score
from headway.train.data import prepare
from headway.train.loop import Trainer

RUN = Path("runs/pronounce")


def phonetisaurus() -> dict[str, object]:
    splits = load_splits(recipes.read("pronounce").data)
    listed = references(splits.test)
    with tempfile.TemporaryDirectory() as folder:
        lexicon, model = Path(folder) / "train.dict", Path(folder) / "g2p.fst"
        lexicon.write_text("".join(f"{word} {phonemes}\n" for word, phonemes in splits.train), "utf-8")
        program = [sys.executable, "-m", "phonetisaurus"]
        began = time.perf_counter()
        subprocess.run([*program, "train", "--model", model, lexicon], check=True, capture_output=True)
        trained = time.perf_counter()
        answers = subprocess.run(
            [*program, "predict", "--model", model],
            input="".join(f"{word}\n" for word in listed), check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        ended = time.perf_counter()
    said = dict(line.split(" ", 1) for line in answers.splitlines() if " " in line)
    scored = [score(word, expected, said.get(word, ""), "whitespace") for word, expected in listed.items()]
    return {
        **rates(scored)._asdict(),
        "answered": len(said),
        "train_seconds": trained - began,
        "words_per_second": len(listed) / (ended - trained),
        "by_length": by_length(scored),
    }


def training_speed() -> float:
    """Tokens a second of the same recipe on this machine now, with all its cores: median of 20 steps."""
    recipe = recipes.read("pronounce")
    prepared = prepare(recipe)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(recipe, recipe.model, recipe.optimizer, prepared, Path(folder))
        trainer.stream = trainer._stream()
        speeds = []
        for _ in range(22):
            tokens, seconds = trainer.progress.tokens, trainer.progress.seconds
            trainer._step()
            speeds.append((trainer.progress.tokens - tokens) / (trainer.progress.seconds - seconds))
    return statistics.median(speeds[2:])


def ours(beams: int) -> dict[str, object]:
    listed = references(load_splits(recipes.read("pronounce").data).test)
    scored, speed = evaluate(headway.load(RUN), listed, "whitespace", beams=beams)
    return {**rates(scored)._asdict(), "words_per_second": speed, "by_length": by_length(scored)}


if __name__ == "__main__":
    there = (RUN / "recipe.json").is_file()
    result = headway.train("pronounce", out=RUN, resume=there)
    keys = ("parameters", "seconds", "steps", "tokens", "train_tokens_per_second", "valid_loss")
    figures = {
        "phonetisaurus": phonetisaurus(),
        "training": {key: result[key] for key in keys} | {"cores": result["hardware"]["cores"]},
        "training_tokens_per_second_now": training_speed(),
        "headway greedy": ours(1),
        "headway beams 4": ours(4),
    }
    peer, best = figures["phonetisaurus"], figures["headway beams 4"]
    figures["relative_wer"] = best["wer"] / peer["wer"]
    figures["relative_per"] = best["per"] / peer["per"]
    save("pronounce", figures)
