"""What Python's own standard library says of itself: 7 thousand docstrings, 1.5 MB of real prose, and what each is of.

A docstring is of a module, a class, a function or a method. Its text alone is given, without the name.
"""

from collections.abc import Iterator

from headway.data.builtin.library import stdlib, without_source

COLUMNS = {"text": "text", "label": "kind"}
OTHERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__"}


def rows() -> Iterator[tuple[str, str]]:
    """Pairs such as ("Return the absolute value of the argument.", "function"), each text once, in order of files."""
    seen: set[str] = set()
    for _, tree in modules():
        for text, kind in documented(tree):
            if len(text.split()) > 2 and text not in seen:
                seen.add(text)
                yield text, kind
    if not seen:
        raise without_source()


def modules() -> Iterator[tuple[tuple[str, ...], object]]:
    """Each file of the library, as the parts of its path below it, and its syntax tree; tests are left out."""
    import ast

    folder = stdlib()
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder).parts
        if OTHERS.intersection(parts):
            continue
        try:
            yield parts, ast.parse(file.read_text("utf-8"))
        except (SyntaxError, ValueError):  # the library has a few files that are wrong on purpose
            continue


def documented(tree: object) -> Iterator[tuple[str, str]]:
    """Each docstring of a module and what it is of."""
    import ast

    waiting: list[tuple[object, str]] = [(tree, "module")]
    while waiting:
        node, kind = waiting.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node):
                yield text, kind
            inside = "method" if isinstance(node, ast.ClassDef) else "function"
            waiting += [(part, "class" if isinstance(part, ast.ClassDef) else inside) for part in node.body]
