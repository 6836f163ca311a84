"""What `headway cost` measures: every mixer and kernel that is found by file name, or what the user names."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from headway import kernels, machine, mixers
from headway.compare.cost_worker import AT_LENGTH, Job, kernel_mask
from headway.positions import Positions
from headway.spec import named, nearest

LONGEST = 2**24
FULL = {False: {"name": "attention"}, True: {"name": "sdpa"}}  # what mixers and kernels are held against
EXACT, APPROXIMATE, RECURRENT = "Exact attention", "Approximations of attention", "Recurrences"
CONVOLUTION, CONTROL = "Convolutions", "Controls that hardly mix"
OTHER, KERNELS = "Other mixers", "Kernels of exact attention, without projections"
GROUPS = (EXACT, APPROXIMATE, RECURRENT, CONVOLUTION, CONTROL, OTHER, KERNELS)

# What is measured unasked: the group of each mixer, and its settings by title. One that is not here has its defaults.
SETTINGS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "attention": (EXACT, {"attention": {}, "attention window 512": {"window": [512, 0]}}),
    "streaming": (EXACT, {"streaming window 512": {"window": 512}}),
    "longformer": (EXACT, {"longformer ±256": {"window": 256, "causal": False}}),
    "linformer": (APPROXIMATE, {"linformer rank 256": {"rank": 256}}),
    "performer": (APPROXIMATE, {"performer": {}}),
    "linear": (RECURRENT, {f"linear {kind}": {"kind": kind} for kind in ("plain", "retention", "gated", "delta")}),
    "ssm": (RECURRENT, {"ssm": {}}),
    "rnn": (RECURRENT, {"rnn lstm": {}, "rnn gru": {"cell": "gru"}}),
    "conv": (CONVOLUTION, {"conv 3 tokens": {}, "conv full length": {"kernel": AT_LENGTH, "depthwise": True}}),
    "identity": (CONTROL, {"identity": {}}),
    "average": (CONTROL, {"average": {}}),
    "fourier": (CONTROL, {"fourier": {}}),
}
WINDOWED = {"blocked": 512, "flex": 512}  # kernels whose worth a window shows


@dataclass
class Subject:
    """One mixer or kernel and, in time, its points."""

    title: str
    group: str
    job: Job
    points: list[dict[str, Any]] = field(default_factory=list)

    @property
    def full(self) -> bool:
        return self.job.named == FULL[self.job.kernel]

    def record(self) -> dict[str, Any]:
        title = self.title if self.job.causal else f"{self.title} (bidirectional)"
        return {**asdict(self), "title": title, "full": self.full}


def subjects_of(chosen: Sequence[str], like: Job, length: int) -> list[Subject]:
    """What is `chosen`, or everything, with full attention in front of each kind and direction that is there.

    `like` holds the settings that all share; options are checked on a mixer for `length` tokens.
    """
    asked = [named_subject(text, like, length) for text in chosen] or everything(like, length)
    found: list[Subject] = []
    for one in asked:
        job = replace(one.job, named=FULL[one.job.kernel])
        if job not in [other.job for other in found]:
            found.append(Subject("sdpa" if job.kernel else "attention", KERNELS if job.kernel else EXACT, job))
    for one in asked:
        if one.job not in [other.job for other in found]:
            found.append(one)
    return found


def named_subject(text: str, like: Job, length: int) -> Subject:
    """What an entry such as `longformer:window=256` or `kernel:blocked:window=512:causal=false` asks for.

    Where a mixer's window is (left, right), one number is that many tokens to the left.
    """
    form = "NAME:OPTION=VALUE, as in longformer:window=256"
    chosen = named(text.removeprefix("kernel:"), f"--mixers {text}", form)
    name, wish = chosen["name"], chosen.pop("causal", None)
    if not isinstance(wish, bool | None):
        raise ValueError(f"--mixers {text}: causal is true or false, not {wish}")
    job = replace(like, named=chosen, kernel=text.startswith("kernel:"))
    if not job.kernel and type(window := chosen.get("window")) is int and _window_is_a_pair(name):
        chosen["window"] = [window, 0]
    can = _kernel_is_causal(job) if job.kernel else _mixer_is_causal(job, length)
    group = KERNELS if job.kernel else SETTINGS.get(name, (OTHER,))[0]
    title = re.sub(r":causal=\w*", "", text)
    return Subject(title, group, replace(job, causal=can if wish is None else wish))


def everything(like: Job, length: int) -> list[Subject]:
    """Every mixer that can look at its own tokens, in its settings, and every kernel."""
    found = []
    for name in mixers.names():
        if not mixers.find(name).CAN & {"causal", "bidirectional"}:
            continue  # `summary` reads a context and nothing else
        group, settings = SETTINGS.get(name, (OTHER, {name: {}}))
        for title, given in settings.items():
            job = replace(like, named={"name": name, **{k: v for k, v in given.items() if k != "causal"}})
            try:
                causal = given["causal"] if "causal" in given else _mixer_is_causal(job, length)
            except ValueError:  # its own process will say why
                causal = True
            found.append(Subject(title, group, replace(job, causal=causal)))
    for name in kernels.names():
        window = {"window": WINDOWED[name]} if name in WINDOWED else {}
        title = f"{name} window {window['window']}" if window else name
        found.append(Subject(title, KERNELS, replace(like, named={"name": name, **window}, kernel=True)))
    return sorted(found, key=lambda one: GROUPS.index(one.group))


def _window_is_a_pair(name: str) -> bool:
    option = inspect.signature(mixers.find(name).__init__).parameters.get("window")
    return option is not None and "tuple" in str(option.annotation)


def _mixer_is_causal(job: Job, length: int) -> bool:
    """Whether it can be causal. A wrong name or option is an error here, before anything is measured."""
    return "causal" in mixers.build(job.options(length), job.width, Positions()).can


def _kernel_is_causal(job: Job) -> bool:
    name, known = job.named["name"], (*kernels.names(), "reference")
    if name not in known:
        raise ValueError(f"no kernel '{name}'{nearest(name, known)}")
    if strange := job.named.keys() - {"name", "window"}:
        raise ValueError(f"kernel:{name}: unknown option '{min(strange)}'{nearest(min(strange), ('window', 'causal'))}")
    return kernel_mask(job.named, causal=True).causal


# --- The command line's words


def lengths_of(text: str) -> list[int]:
    """ "512..4096" doubles from the first to at most the last; "512,1000" lists."""
    first, dots, last = text.partition("..")
    parts = [first, last] if dots else text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"--lengths {text}: write FIRST..LAST, doubling as in 512..65536, or a list as in 512,1024")
    numbers = [int(part) for part in parts]
    if not 1 <= min(numbers) <= max(numbers) <= LONGEST:
        raise ValueError(f"--lengths {text}: a length is a number of tokens from 1 to {LONGEST}")
    if not dots:
        return sorted(set(numbers))
    if numbers[0] > numbers[1]:
        raise ValueError(f"--lengths {text}: the first, {numbers[0]}, is above the last, {numbers[1]}; swap them")
    return [numbers[0] << i for i in range(LONGEST.bit_length()) if numbers[0] << i <= numbers[1]]


def entries_of(text: str) -> list[str]:
    """The entries of a list whose options may hold lists: "attention:window=[512,0],rnn"."""
    return [part.strip() for part in re.split(r",(?![^\[]*\])", text) if part.strip()]


def device_of(text: str | None) -> torch.device:
    """A GPU where there is one and nothing else is said."""
    if text is None:
        return machine.device()
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise ValueError(f"--device {text}: there is cpu, and cuda or cuda:N for a GPU")
    if text != "cpu" and int(text.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {text}: PyTorch finds {torch.cuda.device_count()} GPUs here; choose cpu")
    return torch.device(text)
