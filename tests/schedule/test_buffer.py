"""The buffer against a list that is sorted anew each time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapo_async.schedule.buffer import ORDERS, Entry, PriorityBuffer


def entry(key: int, version: int = 0, signal: float = 0.0) -> Entry:
    return Entry(key, version, 10, signal, f"value {key}")


def test_orders_by_hand() -> None:
    entries = [entry(3, version=7, signal=0.1), entry(1, version=5, signal=0.3), entry(2, version=7, signal=0.1)]
    expected = {"oldest": [1, 2, 3], "freshest": [2, 3, 1], "signal": [2, 3, 1]}
    for order, keys in expected.items():
        buffer = PriorityBuffer(3, order)
        for one in entries:
            buffer.put(one)
        assert [one.key for one in buffer] == keys, order


@given(
    order=st.sampled_from(sorted(ORDERS)),
    capacity=st.integers(1, 5),
    keys=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3), st.floats(0, 0.5)), max_size=30),
)
def test_against_a_sorted_list(order: str, capacity: int, keys: list[tuple[int, int, float]]) -> None:
    """Random puts and removals: same order, same size, never above capacity, refusals where they belong."""
    buffer, model = PriorityBuffer(capacity, order), []
    for key, version, signal in keys:
        new = entry(key, version, signal)
        if any(one.key == key for one in model):
            with pytest.raises(ValueError, match="already"):
                buffer.put(new)
            assert buffer.remove([key]) == [one for one in model if one.key == key]
            model = [one for one in model if one.key != key]
        elif len(model) == capacity:
            with pytest.raises(ValueError, match="full"):
                buffer.put(new)
        else:
            buffer.put(new)
            model.append(new)
        rank = {"oldest": lambda e: (e.key,), "freshest": lambda e: (-e.version, e.key)}
        model.sort(key=rank.get(order, lambda e: (e.signal, e.key)))
        assert list(buffer) == model
        assert len(buffer) == len(model) <= capacity
        assert buffer.size == 10 * len(model)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="capacity must be at least 1"):
        PriorityBuffer(0, "oldest")
    with pytest.raises(KeyError):
        PriorityBuffer(1, "oldest").remove([4])
