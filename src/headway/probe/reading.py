"""Reading: texts, ids, pictures and tensors as one call of a model, with a label for every token of every side.

A side is what tokens stand in a row: "source" (what a model reads), "target" (what an encoder-decoder writes), or the
name of a tower. A picture's patches are called r0c0, r0c1, ..., row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from headway.attend import FULL
from headway.loaded import Inputs, Loaded
from headway.mask import Mask
from headway.models import decoder, dual, encoder, seq2seq, vision
from headway.positions import positions_of
from headway.probe.answer import answer_of
from headway.probe.stacks import bare
from headway.text import BOS, EOS, Tokenizer

Labels = dict[str, list[list[str]]]  # by side, row by row


@dataclass(frozen=True)
class Reading:
    """A call that can be made again and again: `run()` gives what the model's `forward` gives (two towers: the scores).

    ids, valid: by side, where it has them. written: what each token of "target" was followed by. separators: ids that
    end or part texts.
    """

    net: nn.Module
    run: Callable[[], Any]
    labels: Labels
    ids: dict[str, Tensor] = field(default_factory=dict)
    valid: dict[str, Tensor | None] = field(default_factory=dict)
    written: list[str] | None = None
    separators: tuple[int, ...] = ()


def read(
    model: Loaded | nn.Module, inputs: Any, second: Any, image: Any, valid: Tensor | None, mask: Mask | None
) -> Reading:
    """What to look at, or a ValueError that says what this model takes instead."""
    net = model.net if isinstance(model, Loaded) else model
    loaded = model if isinstance(model, Loaded) else None
    body = bare(net)
    found = _read(net, body, loaded, inputs, second, image, valid, mask)
    return found if loaded is None else replace(found, separators=_separators(loaded))


def _separators(loaded: Loaded) -> tuple[int, ...]:
    source = loaded.source
    marks = (EOS,) if isinstance(source, Tokenizer) else (getattr(source, "sep", None), getattr(source, "eos", None))
    return tuple({i for i in marks if i is not None})


def _read(
    net: nn.Module,
    body: Any,
    loaded: Loaded | None,
    inputs: Any,
    second: Any,
    image: Any,
    valid: Tensor | None,
    mask: Mask | None,
) -> Reading:
    if not isinstance(body, dual.Model) and image is not None:
        what = "it reads pictures alone: give the picture first" if isinstance(body, vision.Model) else "it reads none"
        raise ValueError(f"look: image= is what a model of two towers sees beside a text, and {what}")
    if isinstance(body, vision.Model):
        _only(second=second, valid=valid, mask=mask, what="reads pictures")
        return _picture(net, body, _pixels(loaded, inputs, body))
    if isinstance(body, dual.Model):
        _only(second=second, mask=mask, what="has two towers")
        return _towers(net, body, loaded, inputs, image, valid)
    if isinstance(body, seq2seq.Model):
        if mask is not None:
            raise ValueError("look: mask= is for encoders and decoders, and this model is both: leave it out")
        return _pair(net, loaded, inputs, second, valid)
    if isinstance(body, encoder.Model | decoder.Model):
        return _text(net, body, loaded, inputs, second, valid, mask)
    _only(second=second, what="is no model of texts or pictures")
    return _tensors(net, inputs, valid, mask)


def _only(*, what: str, **given: Any) -> None:
    if alien := [name for name, value in given.items() if value is not None]:
        raise ValueError(f"look: {alien[0]}= is not for this model, which {what}: leave it out")


# --- one stack of tokens ---


def _text(
    net: nn.Module, body: Any, loaded: Loaded | None, inputs: Any, second: Any, valid: Tensor | None, mask: Mask | None
) -> Reading:
    if second is not None and not (isinstance(body, encoder.Model) and isinstance(second, str)):
        kind = "an encoder reads a pair of texts" if isinstance(body, encoder.Model) else "a decoder reads one text"
        raise ValueError(f"look: {kind}, and a second {type(second).__name__} is neither: leave it out")
    given = _given(loaded, inputs, second, valid, whole=isinstance(body, encoder.Model))
    more = {} if given.types is None else {"types": given.types}
    if mask is None and loaded is not None and (task := _task(loaded)):
        mask = loaded.global_tokens(task, given)
    run = partial(net, given.ids, given.valid, mask=mask, **more)
    labels = {"source": _labels(loaded.source if loaded else None, given.ids)}
    return Reading(net, run, labels, {"source": given.ids}, {"source": given.valid})


def _task(loaded: Loaded) -> str | None:
    """What makes tokens global: the task of the only head, or writing."""
    tasks = [task for task in loaded.facts.globals if task == "generate" or task in loaded.spec.get("heads", {})]
    return tasks[0] if len(tasks) == 1 else None


def _given(loaded: Loaded | None, inputs: Any, second: str | None, valid: Tensor | None, whole: bool = True) -> Inputs:
    """Ids with their padding. `whole`: the end of a text that the tokenizer marks is read, too."""
    if isinstance(inputs, Inputs | Tensor) and second is not None:
        raise ValueError("look: a second text is for a first text, and this is ids: give both as one row of ids")
    if valid is not None and not isinstance(inputs, Tensor):
        raise ValueError("look: valid= is for ids; texts, and Inputs, tell their own padding: leave it out")
    if isinstance(inputs, Inputs):
        return inputs
    if isinstance(inputs, Tensor):
        if inputs.ndim != 2 or inputs.is_floating_point():
            raise ValueError(f"look: ids are an integer tensor (rows, tokens), not {inputs.dtype} {list(inputs.shape)}")
        if inputs.shape[1] == 0:
            raise ValueError("look: no tokens: give at least one")
        return Inputs(inputs, valid, None) if loaded is None else loaded._given(inputs, valid)
    if loaded is None:
        raise ValueError("look: a bare module reads tensors: give ids, or a model that headway.load gave for texts")
    texts = [
        _checked(text) for text in ([inputs] if isinstance(inputs, str) or not isinstance(inputs, Sequence) else inputs)
    ]
    pairs = None if second is None else [_checked(second)]
    if pairs is not None and len(texts) > 1:
        raise ValueError(f"look: a second text is for one first text, not for {len(texts)}")
    if isinstance(loaded.source, Tokenizer):
        if pairs is not None:
            raise ValueError("look: this tokenizer knows no pairs of texts: leave the second out")
        return loaded.batch([loaded.encode(text) for text in texts])
    given = loaded.inputs(texts, pairs)
    if whole or len(texts) > 1 or given.ids.shape[1] < 2 or int(given.ids[0, -1]) not in loaded.facts.eos:
        return given
    return Inputs(given.ids[:, :-1], None, given.types)  # a text that goes on is not at its end


def _checked(text: Any) -> str:
    if not isinstance(text, str):
        raise ValueError(f"look: this model reads texts, and this is a {type(text).__name__}: give a str, or ids")
    if not text.strip():
        raise ValueError("look: the text is empty: give at least one word")
    return text


def _labels(tokenizer: Any, ids: Tensor) -> list[list[str]]:
    """A label for each id; numbers where nobody knows what they stand for."""
    rows = ids.tolist()
    if tokenizer is None:
        return [[str(i) for i in row] for row in rows]
    if isinstance(tokenizer, Tokenizer):
        return [tokenizer.tokens(row) for row in rows]
    return [tokenizer.labels(row) for row in rows]


# --- encoder-decoders ---


def _pair(net: nn.Module, loaded: Loaded | None, inputs: Any, second: Any, valid: Tensor | None) -> Reading:
    if loaded is not None and isinstance(inputs, str) and isinstance(loaded.source, Tokenizer) and valid is None:
        source = Inputs(torch.tensor([[*loaded.encode(_checked(inputs)), EOS]], device=loaded.device), None, None)
    else:
        source = _given(loaded, inputs, None, valid)
    written = None
    if isinstance(second, Tensor):
        target = second
    elif loaded is None:
        raise ValueError("look: an encoder-decoder also reads what it has written: give the ids of that as second")
    else:
        read_ids, written_ids = _written(loaded, inputs, source, second)
        target = torch.tensor([read_ids], device=source.ids.device)
        written = _labels(loaded.target, torch.tensor([written_ids]))[0]
    labels = {
        "source": _labels(loaded.source if loaded else None, source.ids),
        "target": _labels(loaded.target if loaded else None, target),
    }
    run = partial(net, source.ids, target, source.valid)
    if loaded is not None and (task := _task(loaded)):
        wide = loaded.global_tokens(task, source)
        run = partial(_decoded, net, source, target, wide)
    return Reading(
        net, run, labels, {"source": source.ids, "target": target}, {"source": source.valid, "target": None}, written
    )


def _decoded(net: Any, source: Inputs, target: Tensor, mask: Mask | None) -> Tensor:
    """The logits, where some tokens of the source are global."""
    return net.decode(target, net.encode(source.ids, source.valid, mask))


def _written(loaded: Loaded, inputs: Any, source: Inputs, second: str | None) -> tuple[list[int], list[int]]:
    """What the decoder reads, and what it writes behind each of those tokens; its own answer without a second text."""
    if not isinstance(inputs, str):
        raise ValueError("look: one text for an encoder-decoder to answer, or ids with the ids of the target as second")
    target = loaded.target
    if second is None:
        answer = answer_of(loaded, source)
    elif isinstance(target, Tokenizer):
        answer = target.encode(_checked(second))
    else:
        answer = [i for i in loaded.tokenizer.encode(_checked(second)).ids if i not in loaded.facts.eos]
    if isinstance(target, Tokenizer):
        return [BOS, *answer], [*answer, EOS]
    start, forced = loaded.facts.start, loaded.facts.forced_bos
    if start is None:
        raise ValueError("look: this encoder-decoder does not say what its answers begin with: set facts.start")
    if second is not None and forced is not None and answer[:1] != [forced]:
        answer = [forced, *answer]
    end = list(loaded.facts.eos[:1])
    return [start, *answer][: len(answer) + len(end)], [*answer, *end]


# --- pictures ---


def _pixels(loaded: Loaded | None, picture: Any, body: Any) -> Tensor:
    """Pixels as the checkpoint wants them, of a tensor of them or of one picture."""
    like = next(body.parameters())
    if isinstance(picture, Tensor) and picture.ndim == 4 and picture.is_floating_point():
        return picture.to(like.device)
    if loaded is None or loaded.image is None:
        what = "a bare module" if loaded is None else "this model, which came without a preprocessor_config.json,"
        raise ValueError(f"look: {what} reads pixels, (rows, channels, height, width): headway.image makes them")
    from headway.image import pixels

    if not isinstance(picture, Sequence) or isinstance(picture, str | bytes | PathLike):
        picture = [picture]
    return pixels(picture, loaded.image).to(like.device, like.dtype)


def _patches(body: Any, pixels: Tensor) -> list[list[str]]:
    """Labels of a picture's tokens, the same for every row."""
    patches = body.patches
    rows, columns = patches._grid_of(pixels)
    extra = patches.prefix_count - len(patches.tokens)
    names = [f"[{name}]" for name in patches.tokens] + [f"[register {i}]" for i in range(extra)]
    labels = names + [f"r{row}c{column}" for row in range(rows) for column in range(columns)]
    return [labels] * len(pixels)


def _picture(net: nn.Module, body: Any, pixels: Tensor) -> Reading:
    return Reading(net, partial(net, pixels), {"source": _patches(body, pixels)})


def _towers(net: Any, body: Any, loaded: Loaded | None, text: Any, image: Any, valid: Tensor | None) -> Reading:
    if text is None or image is None:
        raise ValueError("look: a model of two towers compares: give a text and image=, a picture")
    given: dict[str, tuple[Any, ...]] = {}
    labels: Labels = {}
    ids: dict[str, Tensor] = {}
    for name, tower in body.towers.items():
        if dual.reads_ids(tower):
            found = _given(loaded, text, None, valid)
            given[name] = (found.ids, found.valid)
            labels[name] = _labels(loaded.source if loaded else None, found.ids)
            ids[name] = found.ids
        else:
            pixels = _pixels(loaded, image, tower)
            given[name], labels[name] = (pixels,), _patches(tower, pixels)
    run = lambda: net.scores(*(net.project(name, *each) for name, each in given.items()))
    return Reading(net, run, labels, ids, {name: each[1] for name, each in given.items() if len(each) > 1})


# --- parts of models, and what users build of them ---


def _tensors(net: nn.Module, inputs: Any, valid: Tensor | None, mask: Mask | None) -> Reading:
    """A stack, block or mixer by itself reads vectors; any other module reads what it is given."""
    from headway.block import Block, Stack
    from headway.mixers import Mixer

    body = bare(net)
    if not isinstance(body, Stack | Block | Mixer):
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        if valid is not None or mask is not None:
            raise ValueError(
                "look: valid= and mask= are for Headway's own models: give this one all it needs as inputs"
            )
        rows = next((t for t in given if isinstance(t, Tensor) and t.ndim > 1), None)
        return Reading(net, partial(net, *given), {} if rows is None else {"source": _numbers(rows)})
    if not isinstance(inputs, Tensor) or inputs.ndim != 3:
        raise ValueError("look: a stack, block or mixer reads vectors, a tensor (rows, tokens, width)")
    own = FULL if valid is None else Mask(valid=valid)
    own = own if mask is None else own & mask
    pos = positions_of(own.valid, inputs.shape[0], inputs.shape[1], inputs.device)
    return Reading(
        net, partial(net, inputs, mask=own, pos=pos), {"source": _numbers(inputs)}, valid={"source": own.valid}
    )


def _numbers(t: Tensor) -> list[list[str]]:
    return [[str(i) for i in range(t.shape[1])]] * len(t)
