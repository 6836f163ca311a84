"""Handwritten digits as scikit-learn brings them: 1,797 pictures of 8 x 8 (UCI, Alpaydin and Kaynak 1998).

Ink is dark here, as on paper, where the set has it bright.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

COLUMNS = {"image": "image", "label": "digit"}


def rows() -> Iterator[tuple[Any, str]]:
    """A picture, `UInt8[8 8]`, and its digit, "0" to "9"."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise ValueError("the digits come with scikit-learn: pip install scikit-learn") from None
    found = load_digits()
    for picture, digit in zip(found.images, found.target, strict=True):
        yield np.rint(255 - picture * (255 / 16)).astype(np.uint8), str(digit)
