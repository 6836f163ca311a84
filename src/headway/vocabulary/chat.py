"""Chat templates: a checkpoint's own Jinja program that writes a conversation as one prompt.

It is a stranger's program. It runs in Jinja's immutable sandbox, and that in a process of its own with a limit of
time and memory, because no sandbox in the same process can stop a loop of loops or "a" * 10**10.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

SECONDS, BYTES, LETTERS = 1.0, 2**30, 2**22  # of processor time, of memory, of a prompt's characters
PATIENCE = 30.0  # seconds by the clock, for a machine that is busy with other things
MAX_TEMPLATE = 2**20


def render(template: str, messages: Sequence[Any], values: Mapping[str, str], add_generation_prompt: bool) -> str:
    """The prompt, as transformers' `apply_chat_template` writes it; what fails is a ValueError of one line."""
    if isinstance(messages, str) or not all(isinstance(m, Mapping) and "role" in m for m in messages):
        raise ValueError('chat takes a list of messages: [{"role": "user", "content": "hi"}]')
    if len(template) > MAX_TEMPLATE:
        raise ValueError(f"chat template: {len(template)} characters, more than any template ({MAX_TEMPLATE})")
    names = {"messages": list(messages), "add_generation_prompt": add_generation_prompt, "tools": None,
             "documents": None, **values}  # fmt: skip
    try:
        job = json.dumps({"template": template, "names": names})
    except (TypeError, ValueError):
        raise ValueError("chat: messages hold more than text, numbers, lists and objects") from None
    return _ask(job)


def _ask(job: str) -> str:
    try:  # -P: the folder of this file is not a place to import from
        done = subprocess.run(
            [sys.executable, "-P", __file__], input=job.encode(), capture_output=True, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"chat template: not done after {PATIENCE:.0f} seconds; it may never be") from None
    if done.returncode < 0:  # a signal: the limits send one
        raise ValueError(
            f"chat template: took more than {SECONDS:.0f} s of processor time or {BYTES >> 20} MiB; it may never end"
        )
    if done.returncode:
        raise ValueError(
            f"chat template: {(done.stderr.decode(errors='replace').split(chr(10))[-2:] or [''])[0][:300]}"
        )
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise ValueError(f"chat template: {answer['error']}")
    return answer["text"]


def _limit() -> None:
    """From here on this process ends by itself when it takes too much; a system without such limits has PATIENCE."""
    try:
        import resource
        import signal

        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    except (ImportError, ValueError, OSError):
        pass


def _run(job: dict[str, Any]) -> dict[str, str]:
    """In the other process: the answer as {"text": ...} or {"error": ...}."""
    try:
        from jinja2 import TemplateError
    except ImportError:
        return {"error": "needs Jinja: pip install jinja2"}
    environment = _environment()
    _limit()
    found, size = [], 0
    try:
        for part in environment.from_string(job["template"]).generate(job["names"]):
            found.append(part)
            size += len(part)
            if size > LETTERS:
                return {"error": f"it writes more than {LETTERS} characters"}
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        return {"error": " ".join(str(error).split())[:300] or type(error).__name__}
    except RecursionError:
        return {"error": "it calls itself without end"}
    except MemoryError:
        return {"error": f"it takes more than {BYTES >> 20} MiB"}
    return {"text": "".join(found)}


def _environment() -> Any:
    """Jinja as transformers sets it up: block lines leave no trace, JSON is plain, `generation` is no tag."""
    import datetime

    from jinja2 import TemplateError, ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
               sort_keys: bool = False) -> str:  # fmt: skip
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


if __name__ == "__main__":
    json.dump(_run(json.load(sys.stdin)), sys.stdout)
