"""Cost: time and memory of every mixer and kernel by length, on this machine, and from where each beats full attention.

Each subject is measured by a process of its own (`cost_worker`), length by length, shortest first. A length is skipped,
and the reason kept, where those already measured foretell that its time or memory would be too much.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from headway import machine
from headway.compare.cost_subjects import Subject, device_of, subjects_of
from headway.compare.cost_worker import Job
from headway.compare.growth import Curve, crossover, fit, foretold
from headway.store import write_text

PATIENCE = 60  # seconds beyond ten times a point's own, after which its process is ended
SHARE_OF_FREE = 0.9  # memory that a point may take of what is free


@dataclass(frozen=True)
class Event:
    """Progress: `done` of `total` points, and which comes next. `left`: seconds, at most where `bound`."""

    done: int
    total: int
    title: str
    length: int
    left: float
    bound: bool


Watch = Callable[[Event], None]


def measure(
    chosen: Sequence[str] = (),
    *,
    lengths: Sequence[int],
    width: int = 512,
    heads: int = 8,
    train: bool = False,
    device: str | None = None,
    seconds: float = 5.0,
    watch: Watch = lambda event: None,
) -> dict[str, Any]:
    """Measures what is `chosen` (`longformer:window=256`, `kernel:sdpa`; everything by default) at each length.

    Full attention is always among it. Forward, or with `train` forward and backward; one row, fp32, `heads` of `width`.
    `seconds` bounds each point. Ctrl-C ends the measuring: what was measured is returned, with `stopped` set.
    """
    if min(width, heads) < 1 or width % heads:
        raise ValueError(f"cost: width {width} is no multiple of {heads} heads: choose another --width or --heads")
    if not 0 < seconds < float("inf"):
        raise ValueError(f"cost: --seconds bounds the time of each point and is above 0, not {seconds:g}")
    on = device_of(device)
    like = Job({}, width=width, heads=heads, train=train, device=str(on), seconds=seconds)
    subjects = subjects_of(chosen, like, min(lengths))
    settings = {"width": width, "heads": heads, "train": train, "device": str(on), "seconds": seconds}
    peak = machine.gemm_peak(on)
    results: dict[str, Any] = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(chosen, lengths, settings),
        "hardware": machine.hardware(),
        "versions": machine.versions(),
        "threads": torch.get_num_threads(),
        "settings": {**settings, "lengths": list(lengths)},
        "gemm_peak_flops": peak,
        "stopped": False,
    }
    clock = _Clock(len(subjects), lengths, seconds)
    try:
        for one in subjects:
            _measure_subject(one, lengths, on, clock, watch)
    except KeyboardInterrupt:
        results["stopped"] = True
    results["subjects"] = [one.record() for one in subjects]
    conclude(results["subjects"], peak)
    return results


def _measure_subject(one: Subject, lengths: Sequence[int], on: torch.device, clock: _Clock, watch: Watch) -> None:
    """Appends a point a length: its figures, or why there are none (`skipped`, `refused` or `failed`)."""
    with _Worker(one.job) as worker:
        for length in sorted(lengths):
            watch(clock.event(one.record()["title"], length))
            began = time.monotonic()
            reason = skipped(one.points, length, one.job.seconds, machine.free_memory(on))
            point = {"length": length, "skipped": reason} if reason else worker.ask(length)
            one.points.append(point)
            clock.took(length, time.monotonic() - began)


def skipped(points: Sequence[Mapping[str, Any]], length: int, seconds: float, free: int | None) -> str:
    """Why a length is not worth trying after the shorter ones, or ""."""
    if points and "failed" in points[-1]:
        return f"it failed at {points[-1]['length']:,} tokens"
    if points and "skipped" in points[-1]:
        return points[-1]["skipped"]
    known = [point for point in points if "seconds" in point]
    run = foretold([(p["length"], p["seconds"]["median"]) for p in known], length)
    if run is not None and 2 * run > seconds:
        return (
            f"at {length:,} tokens a run would take some {run:.1f} s, and two must fit into {seconds:g} s (--seconds)"
        )
    held = foretold([(p["length"], p["peak_extra_bytes"] or 0) for p in known], length)
    if held is not None and free is not None and held > SHARE_OF_FREE * free:
        return f"at {length:,} tokens it would need some {held / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
    return ""


class _Worker:
    """A process that measures one job. Its death is an answer like others."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  (it lives as long as the process)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "headway.compare.cost_worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, encoding="utf-8",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            start_new_session=True,  # Ctrl-C is for the parent alone
        )  # fmt: skip
        self._tell(json.dumps(asdict(job)))

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def ask(self, length: int) -> dict[str, Any]:
        """The point at a length, or `failed` with how the process ended."""
        assert self.process.stdout is not None
        limit = PATIENCE + 10 * self.job.seconds
        late = threading.Event()

        def end() -> None:
            late.set()
            self.process.kill()

        timer = threading.Timer(limit, end)
        timer.start()
        try:
            self._tell(str(length))
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
        if line.endswith("\n"):
            return json.loads(line)
        return {
            "length": length,
            "failed": f"it took over {limit:.0f} s and was ended" if late.is_set() else self._end(),
        }

    def _tell(self, line: str) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, which the empty answer will tell

    def _end(self) -> str:
        code = self.process.wait()
        if code == -signal.SIGKILL:
            return "its process was killed, most likely because memory ran out"
        if code < 0:
            return f"its process was ended by {signal.Signals(-code).name}"
        self.errors.seek(0)
        said = self.errors.read().decode("utf-8", "replace").strip().splitlines()
        return f"its process ended with status {code}" + (f": {said[-1][:300]}" if said else "")


class _Clock:
    """Time left: a point yet to come takes as long as others of its length did, or, with none known, its full time."""

    def __init__(self, subjects: int, lengths: Sequence[int], seconds: float) -> None:
        self.total, self.seconds, self.done = subjects * len(lengths), seconds, 0
        self.subjects = subjects
        self.walls: dict[int, list[float]] = {length: [] for length in lengths}

    def took(self, length: int, wall: float) -> None:
        self.walls[length].append(wall)
        self.done += 1

    def event(self, title: str, length: int) -> Event:
        left = sum(
            (self.subjects - len(walls)) * (mean(walls) if walls else self.seconds) for walls in self.walls.values()
        )
        return Event(self.done, self.total, title, length, left, bound=not all(self.walls.values()))


# --- What follows from the points


def curve(record: Mapping[str, Any]) -> Curve:
    """Seconds by length, of the points that have been measured."""
    return {p["length"]: p["seconds"]["median"] for p in record["points"] if "seconds" in p}


def conclude(records: Sequence[dict[str, Any]], gemm_peak: float) -> None:
    """Adds to each record the share of the peak, the fitted growth, and where it beats full attention of its kind."""
    full = {(r["job"]["kernel"], r["job"]["causal"]): r for r in records if r["full"]}
    for record in records:
        for point in record["points"]:
            if "seconds" in point:
                point["share_of_peak"] = point["flops"] / point["seconds"]["median"] / gemm_peak
        found = fit(curve(record))
        record["fit"] = None if found is None else asdict(found)
        record["crossover"] = None
        if not record["full"]:
            against = full[record["job"]["kernel"], record["job"]["causal"]]
            where = crossover(curve(record), curve(against))
            record["crossover"] = {"against": against["title"], **asdict(where), "words": str(where)}


def check_writable(file: Path | None) -> None:
    """Refuses a file that cannot be written, before anything is measured rather than after."""
    if file is None:
        return
    try:
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise ValueError(f"{file}: cannot write it ({error.strerror}); name another file") from None


def save(results: Mapping[str, Any], file: Path) -> None:
    """Writes the figures as JSON, whole or not at all."""
    write_text(file, json.dumps(results, indent=1) + "\n")


def _command(chosen: Sequence[str], lengths: Sequence[int], settings: Mapping[str, Any]) -> str:
    words = ["headway", "cost", *(["--mixers", ",".join(chosen)] if chosen else [])]
    words += ["--lengths", ",".join(map(str, lengths))]
    words += ["--width", f"{settings['width']}", "--heads", f"{settings['heads']}"]
    words += [*(["--train"] if settings["train"] else []), "--device", settings["device"]]
    return shlex.join([*words, "--seconds", f"{settings['seconds']:g}"])
