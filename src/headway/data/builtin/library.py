"""Python's own standard library, as every Python brings it: its modules as text, 4.5 MB of real code in 170 files."""

from collections.abc import Iterator

COLUMNS = {"text": "source"}


def rows() -> Iterator[tuple[str]]:
    """One module after the other, in alphabetical order; packages, tests and what is generated are left out."""
    import sysconfig
    from pathlib import Path

    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in sorted(folder.glob("*.py")) if not file.name.startswith("_sysconfigdata")]
    if not files:
        raise ValueError(f"{folder}: this Python came without the source of its library; use another source")
    for file in files:
        text = file.read_text("utf-8", errors="replace")
        if text.strip():
            yield (text,)
