"""What is kept for its owners to come back to: so many things, so many bytes, the oldest of those that have ended
go."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from weft.gateway.http.errors import HttpError
from weft.gateway.http.keys import Caller


class Kept(Protocol):
    """owner: the key that made it. size: bytes, about; may grow. under_way: it may not go yet."""

    owner: str
    size: int

    @property
    def under_way(self) -> bool: ...


T = TypeVar("T", bound=Kept)


class Shelf(Generic[T]):
    """Used from one event loop. name: what a thing is called in errors."""

    def __init__(self, name: str, most: int, size: int) -> None:
        self._name, self._most, self._size = name, most, size
        self._kept: OrderedDict[str, T] = OrderedDict()

    def __iter__(self) -> Iterator[T]:
        """The latest first."""
        return reversed(self._kept.values())

    def put(self, id: str, item: T) -> None:
        self._kept[id] = item
        size = sum(kept.size for kept in self._kept.values())
        for other, kept in list(self._kept.items()):
            if len(self._kept) <= self._most and size <= self._size:
                return
            if not kept.under_way:
                size -= kept.size
                del self._kept[other]

    def find(self, caller: Caller, id: str) -> T:
        """The caller's own; others' are not there, as far as it is told."""
        kept = self._kept.get(id)
        if kept is None or kept.owner != caller.key:
            raise HttpError(404, f"there is no {self._name} {id[:80]!r}", code=f"{self._name}_not_found")
        return kept

    def forget(self, id: str) -> None:
        self._kept.pop(id, None)
