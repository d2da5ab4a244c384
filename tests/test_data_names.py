"""Ids, names and functions that no file, loop or array can have: errors name them."""

import hashlib
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fax
from fax.data import DataError, Files, InMemory, SQLite, _sqlite_tables

CLIENTS = {"ada": {"y": np.arange(3)}, "bob": {"y": np.arange(5)}}


def same(data, clients=CLIENTS):
    return list(data.client_ids()) == list(clients) and all(
        np.array_equal(data.client(i)[name], x) for i, v in clients.items() for name, x in v.items()
    )


class Meanwhile:
    """Data whose first client a function spoils."""

    def __init__(self, data, spoil):
        self.data, self.spoil = data, spoil

    def __getattr__(self, name):
        return getattr(self.data, name)

    def __len__(self):
        return len(self.data)

    def client(self, client_id):
        if self.spoil:
            self.spoil, spoil = None, self.spoil
            spoil()
        return self.data.client(client_id)


# Names


@settings(max_examples=25)
@given(
    st.text(st.characters(codec=None), min_size=0, max_size=12)
    | st.builds(lambda text, n: text * n, st.text(min_size=1, max_size=3), st.integers(50, 400)),
    st.text(st.characters(codec=None), min_size=0, max_size=6),
)
def test_names_come_back_or_are_refused(tmp_path_factory, client_id, feature):
    folder = tmp_path_factory.mktemp("names")
    data = {client_id: {feature: np.arange(3)}}
    for source in (SQLite, Files):
        path = folder / source.__name__
        try:
            written = source.write(path, InMemory(data))
        except DataError as error:
            named = f"client {client_id!r:.80}" in str(error)
            assert named and len(str(error)) < 1000  # noqa: PT017, PT018
        else:
            assert same(written, data)
            assert list(written.client(client_id)) == [feature]
            assert written.client_ids() == (client_id,)
    assert not [path for path in folder.iterdir() if "partial" in path.name]
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("source", "client_id", "feature", "message"),
    [
        (
            Files,
            "a" * 252,
            "x",
            r"client 'a+ has an id of 252 characters, .* 256 bytes, .* 255",
        ),
        (
            Files,
            "\u00e9" * 50,
            "x",
            "an id of 50 .* name would have 304 bytes, .*SQLite.write",
        ),
        (Files, "\ud800", "x", r"client '\\ud800' has no file name: its id has '\\ud800' at pos"),
        (SQLite, "a\udfff", "x", r"client 'a\\udfff' cannot be written: .* at position 1, a lone"),
        (Files, "a", "\ud800", "client 'a' has a feature whose name is not text"),
        (SQLite, "a", "\ud800", "client 'a' cannot be written"),
        (Files, "a", "x\0y", r"feature 'x\\x00y'.*no null character"),
        (Files, "a", "x" * 10_001, "feature 'x.*10000 characters"),
    ],
)
def test_names_that_no_file_can_have(tmp_path, source, client_id, feature, message):
    with pytest.raises(DataError, match=message):
        source.write(tmp_path / "people", InMemory({client_id: {feature: np.arange(3)}}))
    assert not list(tmp_path.iterdir())


def test_the_longest_names(tmp_path):
    data = {"a" * 251: {"x" * 10_000: np.arange(3)}}
    files = Files.write(tmp_path / "files", InMemory(data))
    assert same(files, data)
    with pytest.raises(DataError, match="has an id of 300 characters"):
        files.client("a" * 300)
    (tmp_path / "files" / hashlib.sha256(b"eve").hexdigest()[:2]).touch()
    with pytest.raises(DataError, match="no client 'eve'"):
        files.client("eve")
    assert same(Files(tmp_path / "files"), data)
    (tmp_path / "files" / "bob.npz").mkdir()
    with pytest.raises(DataError, match=r"client 'bob' cannot be read: .*directory"):
        files.client("bob")


def test_ids_of_the_same_bytes(tmp_path):
    data = InMemory({"a": {"x": [1]}, b"a": {"x": [2]}})
    with pytest.raises(DataError, match=r"client b'a' cannot be written: .* of another client"):
        SQLite.write(tmp_path / "a.sqlite", data)
    assert not list(tmp_path.iterdir())


def test_a_client_that_sqlite_cannot_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(_sqlite_tables, "_LONGEST", 100)
    data = InMemory({"ada": {"x": np.random.default_rng(0).normal(size=20)}})
    with pytest.raises(
        DataError, match=r"client 'ada' cannot be written: .* SQLite holds at most 100"
    ):
        SQLite.write(tmp_path / "a.sqlite", data)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("strange", [[1], {}, ([1],), None, 1.5, "\ud800"])
def test_ids_that_no_client_has(tmp_path, strange):
    plain = InMemory(CLIENTS)
    for data in (
        plain,
        fax.data.slice(plain, 0, 1),
        fax.data.concatenate(plain),
        fax.data.map(plain, lambda i, x: x),
        fax.data.map(plain, lambda i, x: x, keeps_length=False),
        SQLite.write(tmp_path / "a.sqlite", plain),
        Files.write(tmp_path / "files", plain),
    ):
        for read in (data.client, data.num_examples):
            with pytest.raises(DataError, match="client"):
                read(strange)


# Functions of users


def stop(*_):
    return next(iter(()))


def test_functions_that_raise_stop_iteration(tmp_path):
    """It would end the loop that called them, without a word."""
    view = fax.data.map(InMemory(CLIENTS), stop)
    own = Meanwhile(InMemory(CLIENTS), stop)
    with pytest.raises(DataError, match=r"client 'ada': fn of fax.data.map raised StopIteration"):
        list(map(view.client, view.client_ids()))
    for use in (
        lambda data: fax.data.map(data, lambda i, x: x).client("ada"),
        lambda data: SQLite.write(tmp_path / "a.sqlite", data),
        lambda data: Files.write(tmp_path / "a", data),
        fax.data.validate,
        lambda data: next(fax.data.cohorts(data, 1, 1)),
    ):
        with pytest.raises(DataError, match=r"client 'ada': fn of fax.data.map raised StopIter"):
            use(view)
        own.spoil = stop
        with pytest.raises(DataError, match=r"client 'ada': Meanwhile.client raised StopIteration"):
            use(own)
    own.spoil = stop
    with pytest.warns(UserWarning, match="skips 1 of 2 clients"):
        good = fax.data.validate(own, "skip")
    assert good.client_ids() == ("bob",)


class Broken:
    def __array__(self, *args, **kwargs):
        raise RuntimeError("the array has been deleted")


def test_values_that_are_no_arrays():
    for value, message in [
        (Broken(), "cannot be made an array: the array has been deleted"),
        (["a", b"b"], "mixes str and bytes"),
        (np.array(["a", b"b"], object), "mixes str and bytes"),
        ([["a"], [b"b"]], "mixes str and bytes"),
        ([np.ma.array([1, 2], mask=[0, 1]), [3, 4]], "has masked values"),
    ]:
        with pytest.raises(DataError, match=f"client 'ada', feature 'x' {message}"):
            InMemory({"ada": {"x": value}})
    InMemory({"ada": {"x": ["a", np.str_("b")]}})
    InMemory({"ada": {"x": np.array(["c", np.str_("d")], object)}})
