"""The Python documentation, as every Python brings it (`pydoc_data.topics`): 465 kB of real prose in 79 topics."""

from collections.abc import Iterator

COLUMNS = {"text": "text"}


def rows() -> Iterator[tuple[str]]:
    """One topic after the other, in alphabetical order."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield (topics[name],)
