"""ListOps and Pathfinder at their published size (Long Range Arena, 2011.04006), for those with a GPU and hours:

    python -m headway.compare.published listops attention --device cuda
    python -m headway.compare.published pathfinder linformer --steps 20000

Sizes, rows, steps and batches follow the released code; the optimizer is Headway's, and positions are rotary. `--lr`
and `--steps` are the two that one may want to change. It prints the trial and its outcome as one line of JSON.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import typer

from headway import machine
from headway.compare import contest, tasks, trial
from headway.compare.trial import Trial
from headway.recipe import OptimizerSpec
from headway.spec import nearest

RATES = OptimizerSpec(lr=1e-3, matrix_lr=0.01, warmup=1000, weight_decay=0.01, schedule="cosine")
HEADS = {"listops": 8, "pathfinder": 4}
SIZES: dict[str, dict[str, Any]] = {
    "listops": {"length": 2000, "width": 512, "depth": 6, "hidden": 2048, "rows": 32, "steps": 5000,
                "examples": 96_000, "test_rows": 2000},
    "pathfinder": {"length": 1024, "width": 128, "depth": 1, "hidden": 128, "rows": 512, "steps": 62_400,
                   "examples": 160_000, "test_rows": 20_000},
}  # fmt: skip


def trial_of(task: str, mixer: str, steps: int | None = None, lr: float | None = None, seed: int = 0) -> Trial:
    """The published setting of a task for a contestant's title, or the first that begins so."""
    if task not in SIZES:
        raise ValueError(f"{task}: no published size here{nearest(task, SIZES)}")
    size = SIZES[task]
    known = contest.contestants(size["length"], HEADS[task])
    title = next((title for title in known if title == mixer or title.split(",")[0].split(" ")[0] == mixer), None)
    if title is None:
        raise ValueError(f"{mixer}: no such contestant{nearest(mixer, known)}")
    rates = msgspec.structs.replace(RATES, lr=lr or RATES.lr)
    size = {**size, "steps": steps or size["steps"]}
    return Trial(task={"name": task}, mixers=known[title], optimizer=rates, every=500, enough=None, seed=seed, **size)


def main(
    task: Annotated[str, typer.Argument(help="listops or pathfinder")],
    mixer: Annotated[str, typer.Argument(help="attention, linformer, performer, GRU, ...")] = "attention",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cuda",
    steps: Annotated[int | None, typer.Option(help="fewer or more than published")] = None,
    lr: Annotated[float | None, typer.Option(help="of AdamW, at its peak")] = None,
    seed: int = 0,
) -> None:
    """Trains one mixer on a task at its published size."""
    one = trial_of(task, mixer, steps, lr, seed)
    tell = lambda done, of: typer.echo(f"\r{done:,} of {of:,} steps", nl=False, err=True) if done % 50 == 0 else None
    outcome = trial.run(one, device, tell)
    published = tasks.find(task).PUBLISHED
    record = {"trial": one, "outcome": outcome, "published": published, "hardware": machine.hardware()}
    typer.echo(msgspec.json.encode(record).decode())


if __name__ == "__main__":
    try:
        typer.run(main)
    except ValueError as error:
        raise SystemExit(str(error)) from None
