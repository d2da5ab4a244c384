"""Files that others change, lock or write at the same time, and what a checksum is worth then."""

import contextlib
import hashlib
import lzma
import os
import pickle
import shutil
import sqlite3
import threading

import numpy as np
import pytest
from formats import fedjax_file

from fax.data import DataError, Files, InMemory, SQLite, _decompress, _sqlite, _sqlite_connection

CLIENTS = {"ada": {"label": np.arange(3)}, "bob": {"label": np.arange(5)}}


def same(data, clients=CLIENTS):
    return list(data.client_ids()) == list(clients) and all(
        np.array_equal(data.client(i)[name], x) for i, v in clients.items() for name, x in v.items()
    )


def change(path, *statements):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


# What is verified


def compressed(tmp_path, clients=CLIENTS):
    plain = fedjax_file(tmp_path / "a.sqlite", clients)
    packed = tmp_path / "a.sqlite.xz"
    packed.write_bytes(lzma.compress(plain.read_bytes()))
    plain.unlink()
    return packed, plain, hashlib.sha256(packed.read_bytes()).hexdigest()


def test_a_checksum_holds_for_what_was_decompressed(tmp_path):
    packed, plain, checksum = compressed(tmp_path)
    data = SQLite(packed, sha256=checksum)
    assert same(data)
    assert same(SQLite(packed, sha256=checksum))  # and what is there already is as good
    good = plain.read_bytes()
    change(
        plain, "UPDATE federated_data SET client_id = 'eve' WHERE client_id = CAST('bob' AS BLOB)"
    )
    refused = r"a.sqlite is not what .*a.sqlite.xz decompresses to.* Remove it"
    with pytest.raises(DataError, match=refused):
        SQLite(packed, sha256=checksum)
    with pytest.raises(DataError, match=refused):  # it was opened before
        data.client("ada")
    for bad in (good + b"\0", good[:-1]):
        plain.write_bytes(bad)
        with pytest.raises(DataError, match=refused):
            SQLite(packed, sha256=checksum)
    plain.unlink()
    with pytest.raises(DataError, match=f"checksum {checksum}, expected 00"):
        SQLite(packed, sha256="00")
    assert not plain.exists()  # nothing is decompressed that was not verified
    assert same(SQLite(packed, sha256=checksum))
    assert same(data)


def test_a_checksum_is_compared_again_when_a_file_changes(tmp_path, monkeypatch):
    path = fedjax_file(tmp_path / "a.sqlite", CLIENTS)
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    data, compared = SQLite(path, sha256=checksum), []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *a: (compared.append(1), digest(*a))[1])
    assert same(data)
    assert not compared
    os.utime(path, (1, 1))
    assert same(data)
    assert len(compared) == 1
    there = tmp_path / "there"
    there.mkdir()
    arrived = pickle.loads(pickle.dumps(data))
    assert same(arrived)
    assert len(compared) == 2
    change(path, "UPDATE federated_data SET num_examples = 7")
    for source in (data, arrived):
        with pytest.raises(DataError, match=f"a.sqlite has the SHA-256 checksum .*{checksum}"):
            source.client("ada")


def test_a_checksum_does_not_hold_for_a_journal(tmp_path):
    path = fedjax_file(tmp_path / "a.sqlite", CLIENTS)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE federated_data SET num_examples = 7")
        connection.commit()
        assert path.with_name("a.sqlite-wal").stat().st_size > 0
        assert SQLite(path).num_examples("ada") == 7
        assert SQLite(path, sha256=checksum).num_examples("ada") == 3


# Two at once


def test_a_locked_file_is_not_called_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(_sqlite_connection, "_LOCK_SECONDS", 0.01)
    path = fedjax_file(tmp_path / "a.sqlite", CLIENTS)
    data = SQLite(path)
    data.client_ids()
    with contextlib.closing(sqlite3.connect(path)) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        for read in (lambda: SQLite(path), lambda: data.client("ada")):
            with pytest.raises(
                DataError, match=r"is locked by another process.*Wait until"
            ) as found:
                read()
            assert "damaged" not in str(found.value)
    assert same(data)


def test_what_an_interrupted_process_left(tmp_path):
    path, copy = fedjax_file(tmp_path / "a.sqlite", CLIENTS), tmp_path / "b.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as writer:
        writer.execute("PRAGMA cache_size = 1")
        rows = [(bytes([i]), bytes(3000), 1) for i in range(99)]
        writer.executemany("INSERT INTO federated_data VALUES (?, ?, ?)", rows)
        for suffix in ("", "-journal"):
            shutil.copy(f"{path}{suffix}", f"{copy}{suffix}")
    with pytest.raises(DataError, match=r"interrupted, and left a journal .*Open it once") as found:
        SQLite(copy)
    assert "damaged" not in str(found.value)
    change(copy, "SELECT * FROM federated_data")  # undoes what is half written
    assert same(SQLite(copy))


def test_a_file_that_is_gone(tmp_path):
    path = fedjax_file(tmp_path / "a.sqlite", CLIENTS)
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    plain, verified = (pickle.loads(pickle.dumps(SQLite(path, sha256=c))) for c in (None, checksum))
    path.unlink()
    with pytest.raises(DataError, match=r"cannot be opened. Check that it still exists"):
        plain.client("ada")
    with pytest.raises(DataError, match=r"cannot read the clients' ids: .*No such file"):
        verified.client("ada")


class Meanwhile:
    """Data that somebody else writes to the same path while they are read."""

    def __init__(self, data, write):
        self.data, self.write = data, write

    def __getattr__(self, name):
        return getattr(self.data, name)

    def __len__(self):
        return len(self.data)

    def client(self, client_id):
        if self.write:
            self.write, write = None, self.write
            write()
        return self.data.client(client_id)


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("source", [SQLite, Files])
def test_of_two_writers_the_first_wins(tmp_path, monkeypatch, source, links):
    if not links:  # as on disks that have none

        def link(*args, **kwargs):
            raise PermissionError("not on this disk")

        monkeypatch.setattr(os, "link", link)
    path, other = tmp_path / "people", {"eve": {"label": np.arange(9)}}
    slow = Meanwhile(InMemory(CLIENTS), lambda: source.write(path, InMemory(other)))
    with pytest.raises(DataError, match=r"exists already.*Another process or thread wrote it"):
        source.write(path, slow)
    assert same(source(path), other)
    assert list(tmp_path.iterdir()) == [path]


def test_two_that_decompress_one_file(tmp_path, monkeypatch):
    packed, plain, checksum = compressed(tmp_path)
    barrier, found = threading.Barrier(2), []

    class Slow(_decompress.LZMAReader):
        def __init__(self, *args):
            super().__init__(*args)
            with contextlib.suppress(threading.BrokenBarrierError):
                barrier.wait(60)
                barrier.abort()  # only the first two wait for each other

    monkeypatch.setattr(_sqlite, "LZMAReader", Slow)

    def read():
        found.append(same(SQLite(packed, sha256=checksum)))

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True, True]
    assert sorted(tmp_path.iterdir()) == [plain, packed]
