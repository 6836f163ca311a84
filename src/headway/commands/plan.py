"""headway plan: whether a recipe fits on given GPUs and how long it takes there, without any."""

from __future__ import annotations

from typing import Annotated

import typer


def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a built-in one.")],
    gpus: Annotated[int, typer.Option(min=1, help="How many.")] = 1,
    gpu: Annotated[str, typer.Option(help="a100, h100, h200, l4 or rtx4090.")] = "h100",
    share: Annotated[float, typer.Option(help="Of the peak that is reached while computing.")] = 0.4,
    set: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set any key of it.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
) -> None:
    """Tell on paper whether a recipe fits on given GPUs, and how long it takes there."""
    import msgspec

    from headway import recipe as recipes
    from headway.display import plan_table
    from headway.train.data import prepare
    from headway.train.plan import plan as planned

    read = recipes.read(recipe, set or [])
    found = planned(read, prepare(read), gpus=gpus, gpu=gpu, share=share)
    if json:
        typer.echo(msgspec.json.format(msgspec.json.encode(found.record()), indent=1))
    else:
        plan_table(found.record())


COMMANDS = [plan]
