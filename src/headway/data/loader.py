"""Batches by number, made ahead of time by worker processes where there are any; the order is the same without them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler

from headway.data.batches import Order


class _Numbered(Dataset[Any]):
    def __init__(self, order: Order) -> None:
        self._order = order

    def __getitem__(self, step: int) -> Any:
        return self._order.batch(step)


class _From(Sampler[int]):
    """first, first + stride, ... without an end."""

    def __init__(self, first: int, stride: int) -> None:
        self._first, self._stride = first, stride

    def __iter__(self) -> Iterator[int]:
        step = self._first
        while True:
            yield step
            step += self._stride


class Stream:
    """An endless iterator over the batches numbered `first`, `first + stride`, ...; leaving it ends the workers."""

    def __init__(self, order: Order, first: int, workers: int = 0, stride: int = 1) -> None:
        self._order, self._next, self._stride, self._workers = order, first, stride, workers
        self._ahead: Iterator[Any] | None = None

    def __enter__(self) -> "Stream":
        if self._workers:
            self._ahead = iter(
                DataLoader(
                    _Numbered(self._order),
                    batch_size=None,
                    sampler=_From(self._next, self._stride),
                    num_workers=self._workers,
                )
            )
        return self

    def __exit__(self, *fault: object) -> None:
        ending = getattr(self._ahead, "_shutdown_workers", None)  # what leaving the iterator to the collector would do
        if ending is not None:
            ending()
        self._ahead = None

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Any:
        if self._ahead is not None:
            try:
                return next(self._ahead)
            except ValueError as error:  # as the worker's traceback, whose last line says it
                raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from None
        found = self._order.batch(self._next)
        self._next += self._stride
        return found
