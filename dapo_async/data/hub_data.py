"""Data sets that the ``datasets`` library opens, by folder or hub id, as batches of Arrow columns.

Not owned: the check of the rows (``readers``). JSONL and Parquet files never come here, so that they need no
``datasets``. A source is ``PLACE``, ``PLACE:SPLIT`` or ``PLACE:SUBSET:SPLIT``.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow

from dapo_async.data.hub_access import ask_hub
from dapo_async.errors import ConfigError

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
FILE_ENDINGS = (".jsonl", ".json", ".parquet")


class Opened(NamedTuple):
    """One split of a data set."""

    name: str  # "owner/name:train"
    schema: pyarrow.Schema
    data: Any  # datasets.Dataset

    def batches(self, columns: list[str], num_rows: int) -> Iterator[pyarrow.RecordBatch]:
        """The rows in order, these columns only, up to ``num_rows`` at a time."""
        for table in self.data.select_columns(columns).with_format("arrow").iter(batch_size=num_rows):
            yield from table.combine_chunks().to_batches()


def is_data_set(source: str) -> bool:
    """Whether ``source`` has the form of a folder that exists or of a hub id, with or without a split."""
    place = source if Path(source).exists() else source.partition(":")[0]
    return Path(place).is_dir() or (bool(HUB_ID.fullmatch(place)) and not place.endswith(FILE_ENDINGS))


def open_data_set(source: str) -> Opened:
    """The split that ``source`` names, or its only one; a hub id is downloaded into the library's cache.

    Raises ``ConfigError`` if ``datasets`` is not installed, the place cannot be reached or read, or the split is not
    named though there are several.
    """
    place, *words = [source] if Path(source).exists() else source.split(":")
    if len(words) > 2 or not all(words):
        raise ConfigError(f"{source}: must look like PLACE, PLACE:SPLIT or PLACE:SUBSET:SPLIT")
    loaded = _load(source, place, words[0] if len(words) == 2 else None)
    if not isinstance(loaded, dict):  # a single split, saved by save_to_disk
        if words:
            raise ConfigError(f"{source}: {place} holds one split without a name; leave out :{words[-1]}")
        return Opened(source, loaded.features.arrow_schema, loaded)
    names = ", ".join(loaded)
    if not words and len(loaded) > 1:
        raise ConfigError(f"{source}: has the splits {names}; name one, as in {place}:{next(iter(loaded))}")
    split = words[-1] if words else next(iter(loaded))
    if split not in loaded:
        raise ConfigError(f"{source}: there is no split {split}; there is {names}")
    return Opened(f"{place}:{split}", loaded[split].features.arrow_schema, loaded[split])


def _load(source: str, place: str, subset: str | None) -> Any:
    """A ``Dataset``, or a dictionary of them by split."""
    folder = Path(place)
    if not folder.is_dir():
        ask_hub()  # before ``datasets`` reads whether it is offline
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            f"{source}: a folder or hub id of prompts needs the datasets package: install it, for example with "
            'pip install "dapo-async[data]", or name a JSONL or Parquet file'
        ) from None
    datasets.disable_progress_bars()
    saved = folder.is_dir() and any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    try:
        return datasets.load_from_disk(place) if saved else datasets.load_dataset(place, subset)
    except Exception as error:
        # Of many kinds: no network, no such id, no files in the folder, columns that differ between files, ...
        kind = "holds no data set" if folder.is_dir() else "is no file or folder here, and no data set of a hub"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{source}: {kind} that can be loaded from here: {reason[:300]}") from error
