"""A run that is killed again and again, and goes on by itself each time: what `test_safety.py` starts as a program.

`python lives.py RECIPE FOLDER KILLS SEED` imports everything once; each life is a fork of it. Half of the kills and
more strike inside a save, at a call of the operating system or up to 4 ms behind it; the others at any time of a life.
"""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import random
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import rapidfuzz.distance.Levenshtein  # noqa: F401  all that would load later
import tokenizers  # noqa: F401
import torch
import torch._dynamo
import torch.utils.flop_counter

from headway.train import train

STEPS = mmap.mmap(-1, 8)  # the last step that a life took
WRITING = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "shutil.rmtree"}


def strike_inside_a_save(folder: Path, draw: random.Random) -> None:
    """This process kills itself at some call of a save, or soon after it."""
    place, delay = draw.randint(1, 24), draw.choice([0.0, draw.uniform(0, 0.004)])
    wait = draw.randint(1, 3)  # the saves that are let be
    seen = {"saves": 0, "calls": 0}
    inside = str(folder / "checkpoints")

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event not in WRITING or not str(arguments[0]).startswith(inside):
            return
        seen["saves"] += event == "os.mkdir" and str(arguments[0]).endswith(".part")
        seen["calls"] += seen["saves"] >= wait
        if seen["calls"] == place:
            seen["calls"] += 1
            if (
                delay
            ):  # by the kernel's own clock, which ends a process as suddenly: a thread could not always start here
                signal.setitimer(signal.ITIMER_REAL, delay)
            else:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def life(recipe: dict[str, object], folder: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """A process of its own that trains until it is done; its id."""
    child = os.fork()
    if child:
        return child
    faulthandler.dump_traceback_later(float(os.environ.get("LIFE", "120")), exit=True)  # where one hangs, it is told
    try:
        prepare()
        note = lambda name, status: STEPS.__setitem__(slice(0, 8), struct.pack("q", status.step))
        train(recipe, out=folder, resume=True, watch=note)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0 if (folder / "result.json").is_file() else 1)


def newest(folder: Path) -> int:
    """The step of the newest checkpoint; 0 where there is none."""
    return max((int(p.name.removeprefix("step-")) for p in folder.glob("checkpoints/step-*")), default=0)


def main(recipe: dict[str, object], out: Path, kills: int, seed: int) -> dict[str, object]:
    draw = random.Random(seed)
    began = time.monotonic()
    assert os.waitpid(life(recipe, out / "whole"), 0)[1] == 0
    length = time.monotonic() - began
    killed, inside, lost, runs = 0, 0, 0, 0
    while killed < kills:
        folder = out / f"killed-{runs}"
        runs += 1
        while killed < kills and not (folder / "result.json").is_file():
            STEPS[0:8] = struct.pack("q", newest(folder))
            own = random.Random(draw.random())
            if draw.random() < 0.65:
                child = life(recipe, folder, partial(strike_inside_a_save, folder, own))
            else:
                child = life(recipe, folder)
                time.sleep(draw.uniform(0, length))
                os.kill(child, signal.SIGKILL)
            if os.WIFSIGNALED(os.waitpid(child, 0)[1]):
                killed += 1
                inside += any(folder.glob("checkpoints/.*.part"))
                lost = max(lost, struct.unpack("q", STEPS[0:8])[0] - newest(folder))
        assert os.waitpid(life(recipe, folder), 0)[1] == 0, "it goes on unaided"
    return {"killed": killed, "inside": inside, "lost": lost, "runs": runs}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
