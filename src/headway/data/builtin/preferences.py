"""What a function or class of Python's library does, in one sentence or in many: 600 pairs of real answers.

Both answers are from its docstring. The first line, one short sentence, is chosen; the paragraphs behind it, which go
on about details, are rejected. A model that prefers what is chosen keeps to the point.
"""

from collections.abc import Iterator

from headway.data.builtin.docstrings import modules
from headway.data.builtin.library import without_source

COLUMNS = {"prompt": "question", "chosen": "short", "rejected": "long"}
SHORT, LONG = (4, 20), (10, 24)  # words of an answer; a long one is cut at the most


def rows() -> Iterator[tuple[str, str, str]]:
    """Triples such as ("Question: What does textwrap.dedent do?\\nAnswer:", " Remove any ...", " This can be ...")."""
    import ast

    found = False
    for parts, tree in modules():
        module = ".".join(parts).removesuffix(".py").removesuffix(".__init__")
        if any(part.startswith("_") for part in module.split(".")):
            continue
        for node in getattr(tree, "body", ()):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            first, _, rest = (ast.get_docstring(node) or "").partition("\n\n")
            short, long = first.split(), rest.split()
            if SHORT[0] <= len(short) <= SHORT[1] and short[-1].endswith(".") and len(long) >= LONG[0]:
                found = True
                question = f"Question: What does Python's {module}.{node.name} do?\nAnswer:"
                yield question, f" {' '.join(short)}", f" {' '.join(long[: LONG[1]])}"
    if not found:
        raise without_source()
