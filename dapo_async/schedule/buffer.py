"""A bounded buffer of complete items in priority order. It knows a key, a version and a size, and nothing of RL.

Not thread-safe.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """One complete item."""

    key: int  # lease number: older leases have smaller ones
    version: int  # oldest version in the item
    size: int  # tokens
    signal: float  # distance of the success rate from one half; smaller teaches more
    value: Any


ORDERS: dict[str, Callable[[Entry], tuple[float, int]]] = {
    "oldest": lambda entry: (entry.key, entry.key),
    "freshest": lambda entry: (-entry.version, entry.key),
    "signal": lambda entry: (entry.signal, entry.key),
}


class Census(Counter[int]):
    """How many there are of each version; one of which there are none is not in it."""

    def add(self, version: int) -> None:
        """One more."""
        self[version] += 1

    def remove(self, version: int) -> None:
        """One less."""
        self[version] -= 1
        if not self[version]:
            del self[version]


class PriorityBuffer:
    """At most ``capacity`` entries with distinct keys, iterated in the order named ``order`` (a key of ``ORDERS``)."""

    def __init__(self, capacity: int, order: str) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self.capacity = capacity
        self._rank = ORDERS[order]
        self._entries: dict[int, Entry] = {}
        self.versions = Census()  # of the entries

    def put(self, entry: Entry) -> None:
        """Add an entry. Raises ``ValueError`` when full or when its key is already there: the caller lost count."""
        if entry.key in self._entries:
            raise ValueError(f"key {entry.key} is already buffered")
        if len(self._entries) >= self.capacity:
            raise ValueError(f"buffer is full ({self.capacity} entries)")
        self._entries[entry.key] = entry
        self.versions.add(entry.version)

    def remove(self, keys: Collection[int]) -> list[Entry]:
        """Take these keys out and return their entries. Raises ``KeyError`` for an unknown one."""
        taken = []
        for key in keys:
            taken.append(self._entries.pop(key))
            self.versions.remove(taken[-1].version)
        return taken

    def __iter__(self) -> Iterator[Entry]:
        """Entries, first to be trained first; ties by key."""
        return iter(sorted(self._entries.values(), key=self._rank))

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: int) -> bool:
        return key in self._entries

    @property
    def size(self) -> int:
        """Sum of the entries' sizes."""
        return sum(entry.size for entry in list(self._entries.values()))  # a copy: another thread may read this
