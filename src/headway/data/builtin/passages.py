"""Which package of Python's standard library a docstring is from: 2 thousand real texts in 8 or 9 classes.

Packages of ten documented files or more, and of each file no more than PER_FILE docstrings. Texts of one file belong
to one part of the data, so that what is tested is the package and not the file.
"""

from collections.abc import Iterator

from headway.data.builtin.docstrings import documented, modules
from headway.data.builtin.library import without_source

COLUMNS = {"text": "text", "label": "package", "group": "file"}
FILES, TEXTS, PER_FILE = 10, 100, 15


def rows() -> Iterator[tuple[str, str, str]]:
    """Triples such as ("Schedule a coroutine.", "asyncio", "asyncio/tasks.py"), each text once, in order of files."""
    packages: dict[str, dict[str, list[str]]] = {}
    seen: set[str] = set()
    for parts, tree in modules():
        if len(parts) < 2:
            continue
        texts = list(dict.fromkeys(text for text, _ in documented(tree) if len(text.split()) > 4 and text not in seen))
        seen.update(texts)
        if texts:
            packages.setdefault(parts[0], {})["/".join(parts)] = texts
    large = {name: files for name, files in packages.items()
             if len(files) >= FILES and sum(map(len, files.values())) >= TEXTS}  # fmt: skip
    if not large:
        raise without_source()
    for name, files in large.items():
        for path, texts in files.items():
            yield from ((text, name, path) for text in texts[:PER_FILE])
