"""Files that are made to fill the memory or the disk, or never to end: they are refused."""

import contextlib
import lzma
import sqlite3
import struct
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from formats import fedjax_file, mp_ext, mp_list, mp_str, npy, npz, tff_file

from fax.data import DataError, Files, InMemory, SQLite, _decompress, _msgpack, _sqlite_connection

MIB = 1 << 20
CLIENTS = {"ada": {"label": np.arange(3)}, "bob": {"label": np.arange(5)}}
FEATURES = {"label": (np.int64, ())}


@contextlib.contextmanager
def memory(most):
    """Checks how much Python and NumPy allocate at most."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def same(data, clients=CLIENTS):
    return list(data.client_ids()) == list(clients) and all(
        np.array_equal(data.client(i)[name], x) for i, v in clients.items() for name, x in v.items()
    )


def change(path, *statements):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


# What grows


@pytest.mark.parametrize("suffix", ["lzma", "xz"])
def test_a_file_that_decompresses_to_too_much(tmp_path, suffix):
    form = lzma.FORMAT_ALONE if suffix == "lzma" else lzma.FORMAT_XZ
    content = fedjax_file(tmp_path / "a.sqlite", CLIENTS).read_bytes()
    (tmp_path / "a.sqlite").unlink()
    packed = tmp_path / f"a.sqlite.{suffix}"
    packed.write_bytes(lzma.compress(content + bytes(64 * MIB), form, preset=0))
    stored = packed.stat().st_size
    message = (
        rf"a.sqlite.{suffix}: {stored} compressed bytes become at least \d+. The limit is 2097152 "
        r"bytes \(max_bytes\). If you trust the data, pass a larger max_bytes"
    )
    with memory(8 * MIB), pytest.raises(DataError, match=message):
        SQLite(packed, max_bytes=2 * MIB)
    assert list(tmp_path.iterdir()) == [packed]
    # without max_bytes, 256 MiB or 100 times as much
    assert _decompress.size_limit(None, 1000) == 256 * MIB
    assert _decompress.size_limit(None, 10 * MIB) == 1000 * MIB
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_decompress, "_LEAST", MIB)
        with pytest.raises(DataError, match=r"bytes \(256 MiB, or 100 times as much"):
            SQLite(packed)
    packed.write_bytes(lzma.compress(content, form))
    assert same(SQLite(packed, max_bytes=len(content)))
    (tmp_path / "a.sqlite").unlink()
    with pytest.raises(DataError, match="become at least"):
        SQLite(packed, max_bytes=len(content) - 1)


def test_a_header_that_asks_for_all_memory(tmp_path):
    content = fedjax_file(tmp_path / "a.sqlite", CLIENTS).read_bytes()
    (tmp_path / "a.sqlite").unlink()
    packed = lzma.compress(content, lzma.FORMAT_ALONE)
    path = tmp_path / "a.sqlite.lzma"
    path.write_bytes(packed[:1] + b"\xff\xff\xff\xff" + packed[5:])  # a dictionary of 4 GiB
    with pytest.raises(
        DataError, match=r"cannot be decompressed: .* limit exceeded.*larger max_bytes"
    ):
        SQLite(path)
    assert list(tmp_path.iterdir()) == [path]


def test_streams_one_after_the_other(tmp_path):
    content = fedjax_file(tmp_path / "a.sqlite", CLIENTS).read_bytes()
    parts = [lzma.compress(content[:1000]), bytes(8), lzma.compress(content[1000:]), bytes(1 << 17)]
    path = tmp_path / "b.sqlite.xz"
    path.write_bytes(b"".join(parts))
    assert same(SQLite(path))
    path.write_bytes(b"".join([*parts, b"more"]))
    (tmp_path / "b.sqlite").unlink()
    with pytest.raises(DataError, match="cannot be decompressed"):
        SQLite(path)


def test_a_client_that_decompresses_to_too_much(tmp_path):
    bomb = zlib.compress(bytes(64 * MIB))
    path = fedjax_file(tmp_path / "a.sqlite", CLIENTS, lambda _: bomb)
    message = rf"client 'ada': {len(bomb)} compressed bytes become at least 1048577. The limit is"
    with memory(8 * MIB), pytest.raises(DataError, match=message):
        SQLite(path, max_bytes=MIB).client("ada")
    for extra, cut in ((b"more", None), (b"", -1)):
        blob = zlib.compress(b"\x80") + extra
        path = fedjax_file(tmp_path / f"{len(extra)}.sqlite", CLIENTS, lambda _, b=blob[:cut]: b)
        with pytest.raises(DataError, match="incomplete, or other data follow"):
            SQLite(path).client("ada")


def test_a_client_of_many_small_values(tmp_path):
    """As Python objects they take much more than in the file."""
    count = MIB // 64
    for more in (0, 1):
        texts = b"\xdd" + struct.pack(">I", count + more) + b"\xa0" * (count + more)
        shape = mp_list([b"\xce" + struct.pack(">I", count + more)])
        raw = mp_list([shape, texts])
        blob = zlib.compress(b"\x81" + mp_str("label") + mp_ext(4, raw))
        path = fedjax_file(
            tmp_path / f"{more}.sqlite", {"ada": None}, lambda _, b=blob: b, lambda _: count
        )
        if more:
            with pytest.raises(DataError, match=r"16385 values takes about 1048640 .* is 1048576"):
                SQLite(path, max_bytes=MIB).client("ada")
        else:
            assert len(SQLite(path, max_bytes=MIB).client("ada")["label"]) == count


@pytest.mark.parametrize("kind", ["VIRTUAL", "STORED"])
@pytest.mark.parametrize("column", ["data", "client_id"])
def test_columns_that_are_computed(tmp_path, kind, column):
    path = fedjax_file(tmp_path / "a.sqlite", CLIENTS)
    columns = {"client_id": "client_id BLOB", "data": "data BLOB"}
    columns[column] += f" GENERATED ALWAYS AS (zeroblob(700000)) {kind}"
    change(
        path,
        "DROP TABLE federated_data",
        f"CREATE TABLE federated_data ({', '.join(columns.values())}, num_examples INTEGER)",
    )
    with pytest.raises(DataError, match=f"federated_data.{column} is a generated column"):
        SQLite(path)


def test_tables_that_are_computed(tmp_path):
    path = fedjax_file(tmp_path / "a.sqlite", CLIENTS)
    change(
        path,
        "ALTER TABLE federated_data RENAME TO kept",
        "CREATE VIEW federated_data AS SELECT client_id, zeroblob(70) AS data FROM kept",
    )
    with pytest.raises(DataError, match=r"has the tables \['kept'\], expected federated_data"):
        SQLite(path)
    path = tff_file(tmp_path / "b.sqlite", {"train": CLIENTS})
    change(path, "ALTER TABLE client_metadata ADD COLUMN x AS (zeroblob(70))")
    with pytest.raises(DataError, match=r"client_metadata.x is a generated column"):
        SQLite(path, "train", FEATURES)


def test_no_value_is_longer_than_its_file(tmp_path):
    path = fedjax_file(tmp_path / "a.sqlite", CLIENTS)
    connection = _sqlite_connection.ReadOnlyConnection(path, alone=False)
    with memory(8 * MIB), pytest.raises(sqlite3.DataError, match="too big"):
        connection.execute("SELECT zeroblob(50000000)").fetchone()
    big = {"ada": {"label": np.random.default_rng(0).integers(0, 2**62, 3 * MIB // 8)}}
    assert same(SQLite.write(tmp_path / "big.sqlite", InMemory(big)), big)
    opened = SQLite(path)
    with contextlib.closing(sqlite3.connect(path)) as writer:  # in a journal of its own
        writer.execute("PRAGMA journal_mode = WAL")
        writer.execute("DELETE FROM federated_data")
        row = (b"ada", zlib.compress(_msgpack.pack(big["ada"])), len(big["ada"]["label"]))
        writer.execute("INSERT INTO federated_data VALUES (?, ?, ?)", row)
        writer.commit()
        assert same(SQLite(path), big)
        assert same(opened, big)  # although the file was small then


def cyclic(path, table, depth):
    """Makes pages of a table into a tree that comes to the same rows again and again."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        (root,) = connection.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = ?", [table]
        ).fetchone()
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[16:18], "big")

    def page(number):
        return slice((number - 1) * size, number * size)

    leaves = [
        int.from_bytes(content[page(root)][at : at + 4], "big")
        for at in struct.unpack(">20H", content[page(root)][12:52])
    ]
    chain = [root, *leaves[:depth]]
    for number, child in zip(chain, leaves[: depth + 1]):
        cells, at = 60, size - 60 * 5
        header = struct.pack(">BHHHBI", 5, 0, cells, at, 0, child)
        pointers = struct.pack(f">{cells}H", *range(at, size, 5))
        body = b"".join(struct.pack(">IB", child, i) for i in range(cells))
        content[page(number)] = (header + pointers).ljust(at, b"\0") + body
    path.write_bytes(content)


def test_a_table_that_never_ends(tmp_path):
    path, clients = tmp_path / "a.sqlite", {f"{i:03}": {"label": [i]} for i in range(400)}
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA page_size = 512")
        connection.execute("VACUUM")
    tff_file(path, {"train": clients | {"ada": {"label": [1, 2]}}})
    change(path, "DROP INDEX idx_examples_client_id", "DROP INDEX idx_examples_client_id_split")
    change(path, "UPDATE client_metadata SET num_examples = 1 << 40 WHERE client_id = '000'")
    cyclic(path, "examples", 8)
    data = SQLite(path, "train", FEATURES)
    assert len(data) == 401
    # Rows of others go by for ever.
    with pytest.raises(DataError, match="'ada': it takes too many steps for the size of"):
        data.client("ada")


def test_rows_that_never_end(tmp_path, monkeypatch):
    """Those that come do not have more bytes than the file."""
    path = tff_file(tmp_path / "a.sqlite", {"train": {"ada": {"label": np.arange(500)}}})
    change(path, "UPDATE client_metadata SET num_examples = 1 << 40")
    read = []

    class Endless(sqlite3.Cursor):
        def __next__(self):
            read.append(1)
            return (bytes(1000),)

    data = SQLite(path, "train", FEATURES)
    data.client_ids()
    execute = _sqlite_connection.ReadOnlyConnection.execute

    def endless(self, query, *args):
        rows = execute(self, query, *args)
        return Endless(self) if "serialized" in query else rows

    monkeypatch.setattr(_sqlite_connection.ReadOnlyConnection, "execute", endless)
    with pytest.raises(DataError, match="it should have 1099511627776 examples, but has"):
        data.client("ada")
    assert len(read) * 1000 < path.stat().st_size + 2000


# Arrays in zip archives


def test_arrays_that_decompress_to_too_much(tmp_path):
    stored = (
        npz(tmp_path / "ada.npz", x=npy(np.zeros(2 * MIB)), y=npy(np.zeros(2 * MIB, "i1")))
        .stat()
        .st_size
    )
    message = rf"client 'ada': {stored} compressed bytes become 1887\d+. The limit is 1048576"
    for most in (MIB, 17 * MIB):  # it is their sum that counts
        with memory(2 * MIB), pytest.raises(DataError, match=message.replace("1048576", str(most))):
            Files(tmp_path, max_bytes=most).client("ada")
    assert len(Files(tmp_path, max_bytes=19 * MIB).client("ada")["x"]) == 2 * MIB
    with memory(2 * MIB):
        assert Files(tmp_path, max_bytes=MIB).num_examples("ada") == 2 * MIB
    # An archive that does not say the truth
    content = (tmp_path / "ada.npz").read_bytes()
    said = struct.pack("<I", len(npy(np.zeros(2 * MIB))))
    assert content.count(said) == 2
    (tmp_path / "ada.npz").write_bytes(content.replace(said, struct.pack("<I", 1000)))
    with memory(4 * MIB), pytest.raises(DataError, match="client 'ada' cannot be read"):
        Files(tmp_path).client("ada")


def test_headers_of_arrays_that_ask_for_all_memory(tmp_path):
    start = b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 30)
    npz(tmp_path / "ada.npz", x=start + bytes(16 * MIB))
    for read in (Files(tmp_path).num_examples, Files(tmp_path).client):
        with memory(2 * MIB), pytest.raises(DataError, match=r"'ada' .* header of an array is too"):
            read("ada")
    for shape, message in (("(-3,)", "has the shape"), ("()", "scalar"), ("(1 << 40,)", "cannot")):
        header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
        raw = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(8)
        npz(tmp_path / "ada.npz", x=raw)
        for read in (Files(tmp_path).num_examples, Files(tmp_path).client):
            with pytest.raises(DataError, match=rf"client 'ada'.*{message}"):
                read("ada")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_without_a_limit(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "ada.npz", "w", method) as archive:
        archive.writestr("x.npy", npy(np.zeros(3)))
    for read in (Files(tmp_path).num_examples, Files(tmp_path).client):
        with pytest.raises(DataError, match=rf"'x.npy' is compressed by method {method}"):
            read("ada")


@pytest.mark.parametrize("max_bytes", [0, -1, 2.5, True, "1"])
def test_limits_that_are_none(tmp_path, max_bytes):
    for source in (SQLite, Files):
        where = (
            f"fax.data.{source.__name__}: max_bytes is {max_bytes!r}, expected an int of at least"
        )
        with pytest.raises(DataError, match=where):
            source(tmp_path, max_bytes=max_bytes)
