"""Python's own standard library, as every Python brings it: its modules as text, 4.5 MB of real code in 170 files."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

COLUMNS = {"text": "source"}


def rows() -> Iterator[tuple[str]]:
    """One module after the other, in alphabetical order; packages, tests and what is generated are left out."""
    files = [file for file in sorted(stdlib().glob("*.py")) if not file.name.startswith("_sysconfigdata")]
    if not files:
        raise without_source()
    for file in files:
        text = file.read_text("utf-8", errors="replace")
        if text.strip():
            yield (text,)


def stdlib() -> Path:
    """The folder of this Python's library."""
    return Path(sysconfig.get_paths()["stdlib"])


def without_source() -> ValueError:
    """Of a Python that has its library compiled alone."""
    return ValueError(f"{stdlib()}: this Python came without the source of its library; use another source")
