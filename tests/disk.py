"""A run on a disk that fails: what `test_safety.py` starts as a program, with `disk.c` below it.

`python disk.py RECIPE BASE WORK AGAIN NUMBER...` goes on with the run in BASE once for each number: from that write
on, the disk is full or read-only. Where AGAIN is 1, it is then mended, and the run goes on once more. It prints what
came of each as a line of JSON.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import sys
import traceback
from pathlib import Path

import rapidfuzz.distance.Levenshtein  # noqa: F401  all that would load later
import tokenizers  # noqa: F401
import torch
import torch._dynamo
import torch.utils.flop_counter

from headway import cli
from headway.train.proof import prove


def go_on(recipe: str, folder: Path, said: Path, number: int, code: int) -> int:
    """The exit status of `headway train --resume` in a process of its own."""
    child = os.fork()
    if not child:
        status = 99
        try:
            handle = os.open(said, os.O_WRONLY | os.O_CREAT, 0o600)
            os.dup2(handle, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            ctypes.CDLL(None).disk_fails(f"{folder}/".encode(), number or -1, code)
            sys.argv = ["headway", "train", recipe, "--out", str(folder), "--resume"]
            cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(recipe: str, base: Path, work: Path, mended: bool, numbers: list[int]) -> None:
    for number in numbers:
        for code in (errno.ENOSPC, errno.EROFS):
            folder, said = work / f"{number}-{code}", work / f"{number}-{code}.txt"
            shutil.copytree(base, folder)
            outcome = {
                "status": go_on(recipe, folder, said, number, code),
                "said": said.read_text("utf-8"),
                "proof": [(str(path.relative_to(folder)), fault) for path, _, fault in prove(folder)],
                "left": [str(path.relative_to(folder)) for path in folder.rglob("*") if path.name.endswith(".part")],
            }
            if mended:
                outcome["again"] = go_on(recipe, folder, work / "again.txt", 0, 0)
                outcome["weights"] = hashlib.sha256((folder / "model/model.safetensors").read_bytes()).hexdigest()
            print(json.dumps({"number": number, "code": code, **outcome}), flush=True)
            shutil.rmtree(folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4] == "1", list(map(int, sys.argv[5:])))
