"""Lab: what is commonly said of architectures, measured on this machine: one JSON file and one page of all claims.

Claims (`compare/claims/`) are measured in turn. What one found is kept in the folder at once, so a run that ends early
goes on where it stood; a claim that breaks is told on the page and stops no other.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import torch

from headway import machine, mixers
from headway.compare import claims, tasks
from headway.compare.claims import OPEN, Claim, Found, How
from headway.compare.cost_subjects import device_of
from headway.compare.lab.folder import Folder, settings_of
from headway.store import write_text

SHARES = (20.0, 240.0)  # seconds of a claim that states none, quick and full


@dataclass(frozen=True)
class Event:
    """Progress: what claim `number` of `total` is doing; `share` of the whole; seconds `left`, a guess from the claims'
    stated seconds while `bound`, that is until one was measured here."""

    title: str
    what: str
    number: int
    total: int
    share: float
    left: float
    bound: bool


Watch = Callable[[Event], None]


def lab(
    names: Sequence[str] | None = None,
    quick: bool = True,
    device: str | None = None,
    mixers: Sequence[dict[str, Any] | str] = (),
    tasks: Sequence[dict[str, Any] | str] = (),
    *,
    out: str | Path = "lab",
    seed: int = 0,
    resume: bool = False,
    watch: Watch = lambda event: None,
) -> dict[str, Any]:
    """Measures claims (all by default) and writes `lab.json` and `lab.html` in `out`, after each of them.

    mixers, tasks: your own, imported before, by dotted path or {"name": ..., option: value}; they join every table
    they can. resume: what `out` holds of the same settings is kept and not measured again. Ctrl-C ends the measuring:
    what was found is written and returned, with `stopped` set.
    """
    from headway.compare.lab.page import write_lab_page  # jinja2 is an extra: better missed before measuring

    how = How(quick=quick, device=str(device_of(device)), seed=seed, mixers=_own(mixers), tasks=_own(tasks))
    chosen = _chosen(names, how)
    folder = Folder(Path(out), how, resume)
    how = msgspec.structs.replace(how, memory=folder.memory)
    results = _head(how)
    clock = _Clock([name for name in chosen if name not in folder.records], quick, watch)
    try:
        for name in clock.names:
            folder.keep(measure(name, how, clock))
            _write(results, folder, write_lab_page)
    except KeyboardInterrupt:
        results["stopped"] = True
    _write(results, folder, write_lab_page)
    return results


def measure(name: str, how: How, clock: _Clock | None = None) -> dict[str, Any]:
    """One claim: what it says and what was found. An error inside is a record that tells it in `failed`."""
    claim, began = claims.find(name), time.monotonic()
    tell = (lambda what, share: None) if clock is None else clock.tell
    tell("", 0.0)
    found, failed = _found(claim, msgspec.structs.replace(how, tell=tell))
    if failed and how.mixers:  # a mixer of the user's that cannot do this costs its own row, not the claim
        found, without = _found(claim, msgspec.structs.replace(how, tell=tell, mixers=()))
        who = ", ".join(one["name"] for one in how.mixers)
        note = f"Measured without {who}, with which it broke off: {failed}"
        found, failed = msgspec.structs.replace(found, notes=(*found.notes, note)), without
    record = {
        "name": name,
        "section": claim.SECTION,
        "title": claim.TITLE,
        "said": claim.SAID,
        "method": claim.METHOD,
        "rule": claim.RULE,
        **json.loads(msgspec.json.encode(found)),  # what is not finite becomes null on the way
        "failed": failed,
        "seconds": round(time.monotonic() - began, 2),
        "command": command(how, [name]),
    }
    if clock is not None:
        clock.took(name, record["seconds"])
    return record


def _found(claim: Claim, how: How) -> tuple[Found, str | None]:
    """What a claim finds, or an empty finding and the line that tells why."""
    with torch.random.fork_rng(devices=[how.device] if how.device != "cpu" else []):
        torch.manual_seed(how.seed)
        try:
            return claim.measure(how), None
        except Exception as error:
            line = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
            return Found(verdict=OPEN, because="The measurement broke off.", tables=()), line


def seconds_of(name: str, quick: bool) -> float:
    """What a claim says that it takes on two cores."""
    return float(getattr(claims.find(name), "SECONDS", SHARES)[0 if quick else 1])


def command(how: How, names: Sequence[str] = ()) -> str:
    """What to type to measure it again."""
    words = ["headway", "lab", "--quick" if how.quick else "--full", *(w for name in names for w in ("--only", name))]
    words += ["--device", how.device, *(["--seed", str(how.seed)] if how.seed else [])]
    for option, own in (("--mixer", how.mixers), ("--task", how.tasks)):
        for one in own:
            options = [f"{key}={json.dumps(value)}" for key, value in one.items() if key != "name"]
            words += [option, ":".join([one["name"], *options])]
    return shlex.join(words)


def _own(given: Sequence[dict[str, Any] | str]) -> tuple[dict[str, Any], ...]:
    return tuple({"name": one} if isinstance(one, str) else dict(one) for one in given)


def _chosen(names: Sequence[str] | None, how: How) -> list[str]:
    """The claims asked for, in their order; refuses what nobody could measure before anything is."""
    for one in how.mixers:
        mixers.options(one)
    for one in how.tasks:
        tasks.build(one)
    for name in names or ():
        claims.find(name)
    return [name for name in claims.names() if not names or name in names]


def _head(how: How) -> dict[str, Any]:
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(how),
        "hardware": machine.hardware(),
        "versions": machine.versions(),
        "threads": torch.get_num_threads(),
        "settings": settings_of(how),
        "stopped": False,
        "claims": [],
    }


def _write(results: dict[str, Any], folder: Folder, write_page: Callable[[dict[str, Any], Path], None]) -> None:
    results["claims"] = folder.all()
    write_text(folder.out / "lab.json", json.dumps(results, indent=1) + "\n")
    write_page(results, folder.out / "lab.html")


class _Clock:
    """Time left: what the claims to come say that they take, times how much longer than said those done took here."""

    def __init__(self, names: Sequence[str], quick: bool, watch: Watch) -> None:
        self.names, self.watch = list(names), watch
        self.stated = {name: seconds_of(name, quick) for name in self.names}
        self.done, self.taken, self.began = 0, 0.0, time.monotonic()

    def tell(self, what: str, share: float) -> None:
        before, now = (self.stated[name] for name in self.names[: self.done]), self.stated[self.names[self.done]]
        past, here = sum(before), time.monotonic() - self.began
        slower = self.taken / past if past else 1.0
        after = sum(self.stated[name] for name in self.names[self.done + 1 :])
        share = min(max(share, 0.0), 1.0)
        own = here * (1 - share) / share if share > 0.2 else max(slower * now - here, 0.0)
        whole = sum(self.stated.values())
        title = claims.find(self.names[self.done]).TITLE
        self.watch(Event(title, what, self.done + 1, len(self.names), (past + share * now) / whole,
                         own + slower * after, bound=not past))  # fmt: skip

    def took(self, name: str, seconds: float) -> None:
        self.done, self.taken, self.began = self.done + 1, self.taken + seconds, time.monotonic()
