"""generate: a model goes on from a prompt, or answers it."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from headway.hub import Loaded

TOGETHER = 32  # prompts answered before anything is printed: what is printed is not lost when a later one fails


def generate(
    model: Annotated[str, typer.Argument(help="A model's folder, a weights or GGUF file, or a hub id (owner/name).")],
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; else --file or standard input.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="A text file, one prompt a line.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put each prompt into the checkpoint's chat template.")] = False,
    task: Annotated[str | None, typer.Option(help="Put the checkpoint's prefix for a task before each prompt.")] = None,
    max_tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="Tokens that are written at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy; 1 draws as the model says.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from the likeliest K tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the fewest tokens that hold this probability.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Draw from tokens at least this share as likely as the first.")
    ] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1, what stands there comes less.")] = None,
    beams: Annotated[int, typer.Option(min=1, help="Beginnings that beam search keeps.")] = 1,
    stop: Annotated[
        list[str] | None, typer.Option(help="A string that ends the text; may be given more than once.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn.")] = 0,
    quantize: Annotated[str | None, typer.Option(help="int8: faster and smaller, nearly as good.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, with log-probabilities.")] = False,
) -> None:
    """Go on from a prompt, or answer it. One prompt is shown as it is written; of many, each is a line once its group
    is done, with the prompt before a tab and \\n for a newline."""
    given: dict[str, Any] = {
        "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "stop": tuple(stop or ()) or None, "seed": seed,
    }  # fmt: skip
    asked = _prompts(prompts, file)
    from headway.generate.texts import generate as write
    from headway.generate.texts import options
    from headway.hub import load
    from headway.text import Tokenizer

    how = options({**given, "beams": beams})  # a mistake costs no loading
    loaded = load(model, dtype=dtype, quantize=quantize)
    if isinstance(loaded.source, Tokenizer):
        raise ValueError(f"{model}: trained by Headway; `headway run {shlex.quote(model)}` answers with it")
    if len(asked) == 1 and not as_json and beams == 1:
        _as_it_comes(loaded, asked[0], given, chat, task)
        return
    loaded.pack()
    for at in range(0, len(asked), TOGETHER):
        part = asked[at : at + TOGETHER]
        for prompt, found in zip(part, write(loaded, part, how, chat=chat, task=task, first=at), strict=True):
            if as_json:
                typer.echo(json.dumps({"prompt": prompt, **found._asdict()}, ensure_ascii=False))
            else:
                typer.echo(found.text if len(asked) == 1 else f"{prompt}\t{found.text}".replace("\n", "\\n"))
        sys.stdout.flush()


def _prompts(prompts: list[str] | None, file: Path | None) -> list[str]:
    if prompts and file:
        raise ValueError("generate: give prompts or --file FILE, not both")
    if prompts:
        return prompts
    if file is None and sys.stdin.isatty():
        raise ValueError("generate: nothing to go on from: give a prompt, --file FILE, or pipe lines in")
    try:
        text = (sys.stdin.buffer.read() if file is None else file.read_bytes()).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file or 'standard input'}: not UTF-8 at byte {error.start}; convert it with iconv"
        ) from None
    lines = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"{file or 'standard input'}: holds no prompt")
    return lines


def _as_it_comes(loaded: Loaded, prompt: str, given: dict[str, Any], chat: bool, task: str | None) -> None:
    for piece in loaded.stream(prompt, chat=chat, task=task, **given):
        typer.echo(piece, nl=False)
        sys.stdout.flush()
    typer.echo()


COMMANDS = [generate]
