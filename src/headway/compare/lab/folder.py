"""Folder: what is known so far, in files that are written whole or not at all, so that any end loses little.

`claims/NAME.json` is a measured claim with what it was measured with (`of`); `trials.json` holds trainings by their
settings, which the claim that asked for them, or another one, need not repeat.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from headway import machine
from headway.compare import claims
from headway.compare.claims import How
from headway.store import write_text


def settings_of(how: How) -> dict[str, Any]:
    """What a run is repeated with."""
    return {
        "quick": how.quick,
        "device": how.device,
        "seed": how.seed,
        "mixers": list(how.mixers),
        "tasks": list(how.tasks),
    }


class Folder:
    """Measured claims of one setting; opening one that holds others is an error."""

    def __init__(self, out: Path, how: How, resume: bool) -> None:
        self.out = out
        self.records: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, dict[str, Any]] = {}
        self.of = {**settings_of(how), "threads": torch.get_num_threads(), **machine.versions(), **machine.hardware()}
        files = sorted((out / "claims").glob("*.json"))
        if not resume and (files or (out / "trials.json").exists()):
            raise ValueError(f"{out}: holds an earlier run ({len(files)} claims): add --resume, or name another --out")
        for file in files:
            self.records[file.stem] = self._read(file)
        (out / "claims").mkdir(parents=True, exist_ok=True)
        kept = self._read(out / "trials.json") if (out / "trials.json").exists() else {}
        self.memory = Memory(out / "trials.json", self.of, kept.get("trials", {}))

    def _read(self, file: Path) -> dict[str, Any]:
        try:
            record = json.loads(file.read_text("utf-8"))
            of = dict(record["of"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file}: is no measurement: remove it, and it is made again") from None
        for key, now in self.of.items():
            if of.get(key) != now:
                raise ValueError(
                    f"{file}: was measured with {key} {of.get(key)}, and this is {now}: name another --out"
                )
        return record

    def keep(self, record: dict[str, Any]) -> None:
        """A claim that failed is shown, and measured again next time."""
        if record["failed"]:
            self.failed[record["name"]] = record
            return
        self.records[record["name"]] = record
        _write(self.out / "claims" / f"{record['name']}.json", {**record, "of": self.of})

    def all(self) -> list[dict[str, Any]]:
        """Every claim known, in their order."""
        known = {**self.failed, **self.records}
        return [{k: v for k, v in known[name].items() if k != "of"} for name in claims.names() if name in known]


class Memory(dict[str, Any]):
    """A mapping that is on the disk whenever something was added."""

    def __init__(self, file: Path, of: dict[str, Any], known: dict[str, Any]) -> None:
        super().__init__(known)
        self.file, self.of = file, of

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        _write(self.file, {"of": self.of, "trials": dict(self)})


def _write(file: Path, data: dict[str, Any]) -> None:
    write_text(file, json.dumps(data, indent=1) + "\n")
