"""Federated data from memory, files and views of them: what is right, and what is refused.

FedJAX's and TensorFlow Federated's files are built byte by byte from their published formats.
"""

import builtins
import contextlib
import errno
import hashlib
import lzma
import os
import pickle
import sqlite3
import threading
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import msgpack
import numpy as np
import pytest
from formats import fedjax_blob, fedjax_file, rows_of, tf_example, tff_file
from hypothesis import given, settings
from hypothesis import strategies as st

import fax
from fax.data import DataError, FederatedData, Files, InMemory, SQLite
from fax.data._check_examples import check_numeric

FEATURES = {"pixels": (np.float32, (2, 3)), "label": (np.int32, ()), "text": (bytes, ())}


def examples(seed, count, *, text=True):
    """A client's examples, of three kinds."""
    rng = np.random.default_rng(seed)
    made = {
        "pixels": rng.normal(size=(count, 2, 3)).astype(np.float32),
        "label": rng.integers(-(2**31), 2**31 - 1, count, dtype=np.int32),
    }
    if text:
        made["text"] = np.array([rng.bytes(7) + b"\0" * (i % 2) for i in range(count)], object)
    return made


CLIENTS = {"ada": examples(0, 3), "bob": examples(1, 1), "éva/../x": examples(2, 5)}
NUMERIC = {k: {n: x for n, x in v.items() if n != "text"} for k, v in CLIENTS.items()}


def assert_same(data, clients, ids=None):
    assert isinstance(data, FederatedData)
    assert list(data.client_ids()) == list(clients if ids is None else ids)
    assert len(data) == len(clients)
    for client_id, expected in clients.items():
        found = data.client(client_id)
        assert found.keys() == expected.keys()
        for name, x in expected.items():
            np.testing.assert_array_equal(found[name], x)
            assert found[name].dtype == x.dtype
            assert found[name].shape == x.shape
        assert data.num_examples(client_id) == len(next(iter(expected.values())))
    with pytest.raises(DataError, match=r"no client 'eve' in .*('ada'|eve.npz)"):
        data.client("eve")
    with pytest.raises(DataError, match="no client"):
        data.num_examples("eve")


# Sources


def test_in_memory():
    data = InMemory(CLIENTS)
    assert_same(data, CLIENTS)
    assert np.shares_memory(data.client("ada")["pixels"], CLIENTS["ada"]["pixels"])
    with pytest.raises(ValueError, match="read-only"):
        data.client("ada")["pixels"][0] = 0
    data.client("ada").clear()
    assert_same(pickle.loads(pickle.dumps(data)), CLIENTS)
    assert InMemory({7: {"x": [1]}, b"7": {"x": [2]}}).client(7)["x"] == 1
    big_endian = InMemory(
        {"a": {"x": np.arange(3, dtype=">i4")}, "b": {"x": np.arange(3, dtype="i4")}}
    )
    np.testing.assert_array_equal(big_endian.client("a")["x"], range(3))


def test_fedjax_files(tmp_path):
    data = SQLite(fedjax_file(tmp_path / "a b?.sqlite", CLIENTS))
    assert_same(data, CLIENTS)
    many = {f"{999 - i:04x}": {"x": np.arange(i + 1)} for i in range(300)}
    path = fedjax_file(tmp_path / "many.sqlite", many, count=lambda v: len(v["x"]))
    large = SQLite(path)
    assert large.client_ids() == tuple(many)  # in the order of rows
    assert [large.num_examples(i) for i in many] == list(range(1, 301))
    np.testing.assert_array_equal(large.client("03e7")["x"], [0])
    with pytest.raises(DataError, match="neither splits"):
        SQLite(path, split="train")


def test_fedjax_files_as_msgpack_itself_writes_them(tmp_path):
    def blob(features):
        def default(x):
            if x.dtype == object:
                return msgpack.ExtType(4, msgpack.packb((x.shape, list(x.flat)), use_bin_type=True))
            parts = (x.shape, x.dtype.name, x.tobytes("C"))
            return msgpack.ExtType(1, msgpack.packb(parts, use_bin_type=True))

        return zlib.compress(msgpack.packb(features, default=default, strict_types=True))

    wide = {"ada": {"label": np.zeros((3, 70_000), np.uint8), "f": np.ones((3, 20, 2), bool)}}
    assert_same(SQLite(fedjax_file(tmp_path / "wide.sqlite", wide, blob)), wide)
    assert_same(SQLite(fedjax_file(tmp_path / "a.sqlite", CLIENTS, blob)), CLIENTS)
    # and the other way round
    SQLite.write(tmp_path / "b.sqlite", InMemory(CLIENTS))
    with contextlib.closing(sqlite3.connect(tmp_path / "b.sqlite")) as connection:
        (raw,) = connection.execute("SELECT data FROM federated_data").fetchone()

    def hook(code, raw):
        shape, *dtype, content = msgpack.unpackb(raw, raw=True)
        if code == 4:
            return np.array(content, object).reshape(shape)
        return np.frombuffer(content, np.dtype(dtype[0].decode())).reshape(shape)

    found = msgpack.unpackb(zlib.decompress(raw), ext_hook=hook, raw=False)
    for name, x in CLIENTS["ada"].items():
        np.testing.assert_array_equal(found[name], x)


@pytest.mark.parametrize("packed", [True, False])
def test_tff_files(tmp_path, packed):
    other = {"ada": examples(9, 2), "zoe": examples(8, 4)}
    path = tff_file(
        tmp_path / "emnist.sqlite",
        {"train": CLIENTS, "test": other},
        lambda row: tf_example(row, packed),
    )
    train = SQLite(path, split="train", features=FEATURES)
    assert_same(train, CLIENTS, ids=sorted(CLIENTS))
    assert_same(SQLite(path, "test", FEATURES), other)
    labels = SQLite(path, "test", {"label": (np.int64, (1,))}).client("zoe")
    np.testing.assert_array_equal(labels["label"][:, 0], other["zoe"]["label"])
    assert_same(pickle.loads(pickle.dumps(train)), CLIENTS, ids=sorted(CLIENTS))


def test_tff_examples_byte_by_byte(tmp_path):
    """One message, as protocol buffers' own library serializes it."""
    message = b"\n\x11\n\x0f\n\x05label\x12\x06\x1a\x04\n\x02\xac\x02"
    one = {"pixels": np.zeros((1, 2, 3)), "label": np.zeros(1)}
    path = tff_file(tmp_path / "one.sqlite", {"train": {"ada": one}}, lambda row: message)
    with pytest.raises(DataError, match=r"has \{'label': \(np.int64, \(\)\)\}"):
        SQLite(path, split="train")
    assert SQLite(path, "train", {"label": (np.int32, ())}).client("ada")["label"] == 300
    assert SQLite(path, "train", {"label": (">i8", ())}).client("ada")["label"] == 300


def test_images_in_bytes_or_ints(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    as_bytes = {"pixels": np.array([[x.tobytes()] for x in image], object), "label": [1, 2]}
    as_ints = {"pixels": image, "label": [1, 2]}
    path = tff_file(tmp_path / "cifar.sqlite", {"train": {"b": as_bytes, "i": as_ints}})
    data = SQLite(path, "train", {"pixels": (np.uint8, (4, 4, 3))})
    for client_id in "bi":
        np.testing.assert_array_equal(data.client(client_id)["pixels"], image)
        assert data.client(client_id)["pixels"].dtype == np.uint8


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (None, "Pass features: the first example has .*'label': .np.int64"),
        ({}, "features is {}"),
        ({"label": np.int32}, r"features\['label'\] is"),
        ({"label": (np.int8, ())}, "feature 'label' has values from .* which int8 cannot hold"),
        ({"label": (np.uint32, ())}, "feature 'label' has values"),
        ({"label": (bool, ())}, "feature 'label' has values"),
        ({"label": (np.float32, ())}, "feature 'label', example 0 is int64, expected float32"),
        ({"label": (bytes, ())}, "expected byte strings"),
        ({"label": (np.int32, (2,))}, "example 0 has 1 values, expected 2"),
        ({"pixels": (np.float32, (3, 3))}, "has 6 values, expected 9"),
        ({"pixels": (np.int32, (2, 3))}, "float32, expected int32"),
        ({"text": (np.float32, ())}, "For byte strings pass the dtype bytes"),
        (
            {"score": (np.int32, ())},
            r"'score': example 0 does not have it, but \['label'",
        ),
    ],
)
def test_tff_features_that_do_not_fit(tmp_path, features, message):
    path = tff_file(tmp_path / "a.sqlite", {"train": CLIENTS})
    with pytest.raises(DataError, match=message):
        SQLite(path, "train", features).client("ada")


@pytest.mark.parametrize("sharded", [True, False])
def test_files(tmp_path, sharded):
    if sharded:
        data = Files.write(tmp_path / "people", InMemory(NUMERIC))
        assert all(len(path.name) == 2 for path in (tmp_path / "people").iterdir())
    else:
        np.savez(tmp_path / "ada.npz", **NUMERIC["ada"])
        np.savez_compressed(tmp_path / "bob.npz", **NUMERIC["bob"])
        fortran = {k: np.asfortranarray(x) for k, x in NUMERIC["éva/../x"].items()}
        np.savez(tmp_path / "%C3%A9va%2F..%2Fx.npz", **fortran)
        data = Files(tmp_path)
    assert_same(data, NUMERIC)
    assert_same(pickle.loads(pickle.dumps(data)), NUMERIC)


def test_files_read_nothing_at_the_start(tmp_path, monkeypatch):
    Files.write(tmp_path / "people", InMemory(NUMERIC))
    listed, opened = [], []
    scandir, listdir = os.scandir, os.listdir
    monkeypatch.setattr(os, "scandir", lambda *a: (listed.append(a), scandir(*a))[1])
    monkeypatch.setattr(os, "listdir", lambda *a: (listed.append(a), listdir(*a))[1])
    data = Files(tmp_path / "people")
    monkeypatch.setattr(zipfile.ZipExtFile, "read", counting(opened, zipfile.ZipExtFile.read))
    assert data.num_examples("éva/../x") == 5
    assert sum(opened) < 200  # the header
    assert len(data.client("ada")["label"]) == 3
    assert not listed
    assert len(data) == 3
    assert listed


def counting(sizes, read):
    def counted(self, n=-1):
        got = read(self, n)
        sizes.append(len(got))
        return got

    return counted


def test_round_trips(tmp_path):
    first = SQLite.write(tmp_path / "a.sqlite", InMemory(CLIENTS))
    assert_same(first, CLIENTS)
    assert_same(SQLite.write(tmp_path / "b.sqlite", first), CLIENTS)
    numeric = fax.data.map(first, lambda _, x: {k: v for k, v in x.items() if k != "text"})
    files = Files.write(tmp_path / "files", numeric)
    assert_same(SQLite.write(tmp_path / "c.sqlite", files), NUMERIC)
    strange = {b"\xff\xfe": {"x": np.ones(2, bool)}, b"ok": {"x": np.zeros(1, bool)}}
    written = SQLite.write(tmp_path / "d.sqlite", InMemory(strange))
    (odd, _) = written.client_ids()
    assert odd.encode("utf-8", "surrogateescape") == b"\xff\xfe"
    assert Files.write(tmp_path / "odd", written).client(odd)["x"].all()
    assert Files(tmp_path / "odd").client_ids() == tuple(sorted(written.client_ids()))
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]


def test_threads_read_at_once(tmp_path):
    clients = {f"{i:03}": {"x": np.arange(i + 1)} for i in range(100)}
    sources = [
        SQLite.write(tmp_path / "a.sqlite", InMemory(clients)),
        Files.write(tmp_path / "files", InMemory(clients)),
    ]
    for source in sources:
        view = fax.data.map(fax.data.slice(source, 10), lambda _, x: {"y": 2 * x["x"]})
        barrier = threading.Barrier(8)

        def read(seed, view=view, barrier=barrier):
            barrier.wait()
            for i in np.random.default_rng(seed).permutation(np.arange(10, 100)):
                np.testing.assert_array_equal(view.client(f"{i:03}")["y"], 2 * np.arange(i + 1))
            return view.client_ids()

        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(read, range(8))) == {tuple(clients)[10:]}


def test_compressed_files(tmp_path):
    plain = fedjax_file(tmp_path / "a.sqlite", CLIENTS)
    content = plain.read_bytes()
    plain.unlink()
    for suffix, form in ((".lzma", lzma.FORMAT_ALONE), (".xz", lzma.FORMAT_XZ)):
        packed = tmp_path / f"a.sqlite{suffix}"
        packed.write_bytes(lzma.compress(content, form))
        for _ in range(2):
            assert_same(SQLite(packed), CLIENTS)
        assert plain.read_bytes() == content
        plain.unlink()
        for keep in (10, len(packed.read_bytes()) // 2, len(packed.read_bytes()) - 1):
            packed.write_bytes(lzma.compress(content, form)[:keep])
            with pytest.raises(DataError, match=r"be decompressed|not an SQLite file|bytes of"):
                SQLite(packed)
            plain.unlink(missing_ok=True)
        packed.unlink()
    assert not list(tmp_path.iterdir())

    plain.write_bytes(content)
    packed.write_bytes(lzma.compress(content))
    os.utime(plain, (1, 1))
    with pytest.raises(DataError, match="is older than"):
        SQLite(packed)


def test_checksums(tmp_path):
    path = fedjax_file(tmp_path / "a.sqlite", CLIENTS)
    good = hashlib.sha256(path.read_bytes()).hexdigest()
    assert_same(SQLite(path, sha256=good.upper()), CLIENTS)
    with pytest.raises(DataError, match=f"checksum {good}, expected 00"):
        SQLite(path, sha256="00")
    with pytest.raises(FileNotFoundError, match="no file"):
        SQLite(tmp_path / "none.sqlite")
    with pytest.raises(FileNotFoundError, match="no folder"):
        Files(tmp_path / "none")


# Damage


def everything(data):
    return {i: (data.num_examples(i), dict(data.client(i))) for i in data.client_ids()}


def same(found, expected):
    return found.keys() == expected.keys() and all(
        np.array_equal(found[name], x) for name, x in expected.items()
    )


def damaged(content, rng, number):
    """Copies in which bytes are changed, or the rest is missing, or zeros."""
    for _ in range(number):
        at, copy = int(rng.integers(len(content))), bytearray(content)
        kind = rng.integers(4)
        if kind == 0:
            copy[at] ^= int(rng.integers(1, 256))
        elif kind == 1:
            copy[at : at + 16] = rng.bytes(len(copy[at : at + 16]))
        elif kind == 2:
            copy[at:] = b"\0" * (len(copy) - at)
        yield bytes(copy[:at] if kind == 3 else copy), kind == 3


@pytest.mark.always("fedjax")
@pytest.mark.parametrize("form", ["fedjax", "tff"])
def test_damaged_sqlite_files(tmp_path, form):
    """Errors are clear, nothing hangs, and what has a checksum is right or refused."""
    path = tmp_path / "a.sqlite"
    clients = {f"client{i}": examples(i, 1 + i % 4) for i in range(40)}
    if form == "fedjax":
        fedjax_file(path, clients)
    else:
        tff_file(path, {"train": clients, "test": CLIENTS})
    content, rng = path.read_bytes(), np.random.default_rng(0)
    checksum, refused = hashlib.sha256(content).hexdigest(), 0
    arguments = () if form == "fedjax" else ("train", FEATURES)
    for changed, truncated in damaged(content, rng, 400):
        path.write_bytes(changed)
        if changed != content:
            with pytest.raises(DataError, match="checksum"):
                SQLite(path, *arguments, sha256=checksum)
        try:
            data = SQLite(path, *arguments)
            ids = data.client_ids()
        except DataError:
            refused += 1
            continue
        assert not truncated or changed == content
        for client_id in ids:
            try:
                found = data.client(client_id)
            except DataError as error:
                assert repr(client_id) in str(error)  # noqa: PT017
                refused += 1
            else:
                assert {len(x) for x in found.values()} == {data.num_examples(client_id)}
                if form == "fedjax" and client_id in clients:
                    assert same(found, clients[client_id])
    assert refused > 200


def test_damaged_files(tmp_path):
    """A client is read as it was, or refused by name."""
    np.savez(tmp_path / "ada.npz", **NUMERIC["ada"])
    np.savez_compressed(tmp_path / "bob.npz", **NUMERIC["bob"])
    rng, refused = np.random.default_rng(0), 0
    for client_id in ("ada", "bob"):
        path = tmp_path / f"{client_id}.npz"
        content = path.read_bytes()
        for changed, truncated in damaged(content, rng, 500):
            path.write_bytes(changed)
            data = Files(tmp_path)
            try:
                found = data.client(client_id)
            except DataError as error:
                assert f"client '{client_id}'" in str(error)  # noqa: PT017
                refused += 1
            else:
                assert same(found, NUMERIC[client_id])
                assert not truncated or changed == content
            try:
                assert data.num_examples(client_id) >= 0
            except DataError:
                refused += 1
        path.write_bytes(content)
    assert refused > 800


def test_damaged_messages_and_blobs():
    from fax.data import _msgpack, _tfexample

    rng = np.random.default_rng(0)
    (row, *_) = rows_of(CLIENTS["ada"])
    for content, parse in [
        (zlib.decompress(fedjax_blob(CLIENTS["ada"])), lambda raw: _msgpack.unpack(raw, 1 << 20)),
        (tf_example(row), _tfexample.parse),
    ]:
        parse(content)
        for changed, truncated in damaged(content, rng, 1000):
            try:
                parse(changed)
            except ValueError:
                continue
            assert not truncated or changed in (content, b"")
        for size in range(1, 60):
            for _ in range(20):
                with contextlib.suppress(ValueError):
                    parse(rng.bytes(size))


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        (
            "UPDATE federated_data SET num_examples = 9 WHERE rowid = 1",
            "'ada' has 3 .* should have 9",
        ),
        ("UPDATE federated_data SET num_examples = -1", "'ada' has -1 examples"),
        ("UPDATE federated_data SET num_examples = 'x'", "'ada' has 'x' examples"),
        ("UPDATE federated_data SET data = 5 WHERE rowid = 1", "client 'ada' cannot be read"),
        ("UPDATE federated_data SET data = x'00' WHERE rowid = 1", "client 'ada' cannot be read"),
        ("UPDATE federated_data SET client_id = 5 WHERE rowid = 1", "neither bytes nor text"),
        ("DELETE FROM federated_data", "has no clients"),
        (
            "ALTER TABLE federated_data RENAME TO data",
            r"tables \['data'\], expected federated_data .* pandas.read_sql",
        ),
        ("ALTER TABLE federated_data RENAME COLUMN client_id TO c", "no such column"),
    ],
)
def test_strange_fedjax_tables(tmp_path, statement, message):
    path = fedjax_file(tmp_path / "a.sqlite", CLIENTS)
    with sqlite3.connect(path) as connection:
        connection.execute(statement)
    connection.close()
    with pytest.raises(DataError, match=message):
        SQLite(path).client("ada")


@pytest.mark.parametrize("extra", [1, -1])
def test_tff_rows_are_counted(tmp_path, extra):
    path = tff_file(tmp_path / "a.sqlite", {"train": CLIENTS}, extra=extra)
    with pytest.raises(DataError, match=f"client 'ada': it should have {3 + extra} examples"):
        SQLite(path, "train", FEATURES).client("ada")
    with pytest.raises(DataError, match=r"splits \['train'\], but split is None"):
        SQLite(path)


def test_strange_files(tmp_path):
    (tmp_path / "a.sqlite").write_bytes(b"not SQLite" * 20)
    with pytest.raises(DataError, match="not an SQLite file"):
        SQLite(tmp_path / "a.sqlite")
    with pytest.raises(DataError, match=r"neither .npz files"):
        Files(tmp_path).client_ids()
    np.savez(tmp_path / "a:b.npz", x=np.ones(2))
    with pytest.raises(DataError, match=r"not the name of a client's file.*a%3Ab.npz"):
        Files(tmp_path).client_ids()
    (tmp_path / "a:b.npz").unlink()
    np.savez(tmp_path / "objects.npz", x=np.array([b"a"], object))
    with pytest.raises(DataError, match="client 'objects' cannot be read: feature 'x'"):
        Files(tmp_path).client("objects")
    np.savez(tmp_path / "lengths.npz", x=np.ones(2), y=np.ones(3))
    with pytest.raises(DataError, match="'lengths' has 2 examples by feature 'x', but 3 by 'y'"):
        Files(tmp_path).client("lengths")
    np.savez(tmp_path / "a.npz", x=np.ones(2))
    np.savez(tmp_path / "b.npz", x=np.ones(2, np.float32))
    data = Files(tmp_path)
    data.client("a")
    with pytest.raises(
        DataError, match=r"'b', feature 'x' is float32\[\] .* float64\[\] at client 'a'"
    ):
        data.client("b")
    (tmp_path / "ca").mkdir()
    np.savez(tmp_path / "ca" / "a.npz", x=np.ones(2))
    with pytest.raises(DataError, match="two files of client 'a'"):
        data.client_ids()


# Writing


@pytest.mark.parametrize("write", [SQLite.write, Files.write])
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, write):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"no space is left on the disk\. Nothing was written"):
            write(tmp_path / "people", InMemory(NUMERIC))
    assert not list(tmp_path.iterdir())
    assert_same(write(tmp_path / "people", InMemory(NUMERIC)), NUMERIC)
    with pytest.raises(DataError, match="exists already"):
        write(tmp_path / "people", InMemory(NUMERIC))


def test_a_full_disk_while_sqlite_writes(tmp_path, monkeypatch):
    connect = sqlite3.connect

    def small(*args, **kwargs):
        connection = connect(*args, **kwargs)
        connection.execute("PRAGMA max_page_count = 8")  # SQLite then says that the disk is full
        return connection

    monkeypatch.setattr(sqlite3, "connect", small)
    clients = {"a": {"x": np.random.default_rng(0).normal(size=20_000)}}
    with pytest.raises(OSError, match="no space is left on the disk") as caught:
        SQLite.write(tmp_path / "a.sqlite", InMemory(clients))
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_a_full_disk_while_decompressing(tmp_path, monkeypatch):
    packed = tmp_path / "a.sqlite.xz"
    packed.write_bytes(lzma.compress(fedjax_file(tmp_path / "a.sqlite", CLIENTS).read_bytes()))
    (tmp_path / "a.sqlite").unlink()

    def full(source, target, *_):
        target.write(source.read(1000))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfileobj", full)
        with pytest.raises(OSError, match="no space is left"):
            SQLite(packed)
    assert list(tmp_path.iterdir()) == [packed]
    assert_same(SQLite(packed), CLIENTS)


@pytest.mark.parametrize("write", [SQLite.write, Files.write])
def test_an_interruption_leaves_nothing_that_looks_whole(tmp_path, monkeypatch, write):
    def interrupted(*_):
        raise KeyboardInterrupt

    for name in ("rename", "fsync"):
        with monkeypatch.context() as patch:
            for same in ("rename", "link") if name == "rename" else (name,):
                patch.setattr(os, same, interrupted)
            with pytest.raises(KeyboardInterrupt):
                write(tmp_path / "people", InMemory(NUMERIC))
        assert not list(tmp_path.iterdir())

    # A process that is killed before the renaming cannot tidy up.
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", interrupted)
        patch.setattr(os, "link", interrupted)
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "people", InMemory(NUMERIC))
    (rest,) = tmp_path.iterdir()
    assert rest.name.startswith(".people.")
    assert rest.name.endswith(".partial")
    assert_same(write(tmp_path / "people", InMemory(NUMERIC)), NUMERIC)


@pytest.mark.parametrize(
    ("write", "clients", "message"),
    [
        (SQLite.write, {1: {"x": [1]}}, "client 1 has an id of type int"),
        (Files.write, {b"1": {"x": [1]}}, "client b'1' has an id of type bytes"),
        (SQLite.write, {"a": {"x": ["text"]}}, "client 'a' cannot be written: feature 'x' .*<U4"),
        (Files.write, {"a": {"x": np.array([b"a"], object)}}, "feature 'x' has dtype object"),
        (Files.write, {"a": {"x": ["text"]}}, "feature 'x' has dtype <U4"),
    ],
)
def test_what_cannot_be_written(tmp_path, write, clients, message):
    with pytest.raises(DataError, match=message):
        write(tmp_path / "people", InMemory(clients))
    assert not list(tmp_path.iterdir())


# Checks


GOOD = {"x": np.ones(2), "y": np.ones((2, 3))}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([1, 2], "client 'b' is a list, expected a mapping"),
        ({}, "client 'b' has no features"),
        ({"x": np.ones(0), "y": np.ones((0, 3))}, "client 'b' has no examples"),
        (
            {"x": np.ones(2), "y": np.ones((3, 3))},
            "'b' has 2 examples by feature 'x', but 3 by 'y'",
        ),
        ({"x": np.ones(2), "y": 1.0}, "'b', feature 'y' is a scalar"),
        ({"x": np.ones(2)}, r"'b' has the features \['x'\], but client 'a' has \['x', 'y'\]"),
        (
            {**GOOD, "x": np.ones(2, int)},
            r"'b', feature 'x' is int64\[\] .* float64\[\] at client 'a'",
        ),
        ({**GOOD, "y": np.ones((2, 4))}, r"'b', feature 'y' is float64\[4\] .* float64\[3\]"),
        ({**GOOD, "x": [[1], [1, 2]]}, "'b', feature 'x' cannot be made an array"),
        ({**GOOD, "x": np.array([[1], None], object)}, "'b', feature 'x' has dtype object"),
        ({**GOOD, "x": np.zeros(2, "i4,f4")}, "'b', feature 'x' has dtype .*f0"),
        ({**GOOD, "x": np.ma.masked_array([1.0, 2.0])}, "feature 'x' is a masked array"),
        ({**GOOD, "x": [b"a\0", b"b"]}, "feature 'x' has a string that ends with a zero, which"),
        ({**GOOD, 3: np.ones(2)}, "client 'b' has a feature named 3"),
    ],
)
def test_bad_clients(bad, message):
    clients = {"a": GOOD, "b": bad, "c": GOOD}
    with pytest.raises(DataError, match=message):
        InMemory(clients)
    with pytest.warns(UserWarning, match=f"skips 1 of 3 clients: .*{message}"):
        data = InMemory(clients, on_bad="skip")
    assert data.client_ids() == ("a", "c")

    lazy = fax.data.map(
        InMemory(dict.fromkeys(clients, GOOD)), lambda i, _: clients[i], keeps_length=False
    )
    with pytest.raises(DataError, match=message):
        fax.data.validate(lazy)
    with pytest.warns(UserWarning, match="skips 1 of 3"):
        good = fax.data.validate(lazy, on_bad="skip")
    assert good.client_ids() == ("a", "c")
    with pytest.raises(DataError, match="none of 1 clients"):
        InMemory({"b": []}, on_bad="skip")


@pytest.mark.parametrize("clients", [{}, None, [GOOD]])
def test_no_clients(clients):
    with pytest.raises(DataError, match="expected a mapping from client ids"):
        InMemory(clients)
    with pytest.raises(DataError, match="on_bad is 'ignore'"):
        InMemory({"a": GOOD}, on_bad="ignore")
    with pytest.raises(DataError, match="has an id of type tuple"):
        InMemory({("a",): GOOD})


@pytest.mark.parametrize("dtype", ["float32", "float16", "complex64", "bfloat16"])
def test_values_that_are_not_finite(dtype):
    import ml_dtypes  # noqa: F401 - names bfloat16

    bad = np.ones((3, 2)).astype(dtype)
    bad[1, 0], bad[2, 1] = np.inf, np.nan
    data = InMemory({"a": {"x": np.ones((1, 2)).astype(dtype)}, "b": {"x": bad}})
    with pytest.raises(DataError, match=r"'b', feature 'x' has 2 values .* in example 1\. Fill"):
        fax.data.validate(data)
    with pytest.warns(UserWarning, match="skips 1 of 2"):
        assert fax.data.validate(data, "skip").client_ids() == ("a",)
    good = InMemory({"a": {"x": [1]}})
    assert fax.data.validate(good) is good


def test_only_numbers_can_be_batched():
    check_numeric("a", {"x": np.ones(2, bool), "y": np.ones(2, np.int8)})
    for strings in (["a"], [b"a"], np.array(["a"], object), np.array(["2020-01-01"], "M8[D]")):
        data = InMemory({"a": {"text": strings}})
        with pytest.raises(DataError, match=r"'a', feature 'text' has dtype .* with fax.data.map"):
            check_numeric("a", data.client("a"))
    InMemory({"a": {"text": ["a"]}, "b": {"text": ["longer"]}})


# Views

PLAIN = {f"c{i}": {"x": np.arange(i + 1), "y": np.ones((i + 1, 2)) * i} for i in range(8)}


def scaled(by):
    return lambda _, e: {**e, "y": by * e["y"]}


def odd_rows(client_id, e):
    return {name: x[len(client_id) % 2 :: 2] if len(x) > 1 else x for name, x in e.items()}


def bigger(_, e):
    return {name: np.concatenate([x, x]) for name, x in e.items()}


def kept(fn):
    return fn not in (odd_rows, bigger)


VIEWS = st.lists(
    st.one_of(
        st.tuples(st.just("slice"), st.integers(-9, 9), st.integers(-9, 9) | st.none()),
        st.tuples(st.just("subset"), st.randoms(use_true_random=False)),
        st.tuples(st.just("map"), st.sampled_from([scaled(2), scaled(-0.5), odd_rows, bigger])),
        st.tuples(st.just("concatenate"), st.integers(0, 7)),
        st.tuples(st.just("split"), st.integers(0, 99)),
    ),
    max_size=6,
)


@settings(max_examples=150)
@given(VIEWS)
def test_views_of_views(steps):
    data, plain = InMemory(PLAIN), dict(PLAIN)
    for kind, *args in steps:
        if kind == "slice":
            ids = list(plain)[builtins.slice(*args)]
            if not ids:
                with pytest.raises(DataError, match="no client is left"):
                    fax.data.slice(data, *args)
                continue
            data, plain = fax.data.slice(data, *args), {i: plain[i] for i in ids}
        elif kind == "subset":
            ids = args[0].sample(list(plain), args[0].randint(1, len(plain)))
            data, plain = fax.data.subset(data, ids), {i: plain[i] for i in ids}
        elif kind == "map":
            data = fax.data.map(data, *args, keeps_length=kept(*args))
            plain = {i: args[0](i, e) for i, e in plain.items()}
        elif kind == "concatenate":
            more = {f"{len(plain)}-{i}": e for i, e in list(PLAIN.items())[args[0] :]}
            if plain.keys() & more.keys():
                continue
            data, plain = fax.data.concatenate(data, InMemory(more)), plain | more
        elif len(plain) > 1:
            train, out = fax.data.split(data, 0.4, seed=args[0])
            sides = set(train.client_ids()), set(out.client_ids())
            assert sides[0] | sides[1] == set(plain)
            assert not sides[0] & sides[1]
            assert len(out) == max(1, round(0.4 * len(plain)))
            data, plain = train, {i: e for i, e in plain.items() if i in sides[0]}
    assert data.client_ids() == tuple(plain)
    assert len(data) == len(plain)
    for client_id, expected in plain.items():
        assert data.num_examples(client_id) == len(expected["x"])
        assert same(data.client(client_id), expected)
    for absent in PLAIN.keys() - plain.keys():
        with pytest.raises(DataError, match="no client"):
            data.client(absent)


def negated(client_id, examples):
    return {"x": -examples["x"]}


def test_views_are_lazy_and_picklable():
    seen = []

    def fn(client_id, e):
        seen.append(client_id)
        return {"x": e["x"][:2]} if client_id != "c0" else e

    data = fax.data.map(InMemory(PLAIN), fn)
    view = fax.data.slice(data, 0, 3)
    assert view.num_examples("c1") == 2
    assert not seen
    assert len(view.client("c1")["x"]) == 2
    assert seen == ["c1"]
    with pytest.raises(
        DataError, match=r"'c2' has 3 examples before .* 2 after it. Pass keeps_length"
    ):
        view.client("c2")
    with pytest.raises(DataError, match=r"'c0' has the features \['x', 'y'\]"):
        view.client("c0")
    del seen[:]
    counted = fax.data.map(InMemory(PLAIN), fn, keeps_length=False)
    assert [counted.num_examples("c2") for _ in range(3)] == [2, 2, 2]
    assert seen == ["c2"]

    train, _ = fax.data.split(fax.data.map(InMemory(PLAIN), negated), 2)
    again = pickle.loads(pickle.dumps(train))
    assert again.client_ids() == train.client_ids()
    assert same(again.client(again.client_ids()[0]), train.client(train.client_ids()[0]))


def test_split_is_seeded():
    data = InMemory(PLAIN)
    first, again, other = (fax.data.split(data, 3, seed=s)[1].client_ids() for s in (0, 0, 1))
    assert first == again != other
    assert [i for i in data.client_ids() if i in first] == list(first)


def broken(client_id, examples):
    raise KeyError("pixels")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda d: fax.data.subset(d, ["c1", "zoe"]),
            "ids has 'zoe', but data has no such clients",
        ),
        (lambda d: fax.data.subset(d, ["c1", "c2", "c1"]), "ids has 'c1' more than once"),
        (lambda d: fax.data.subset(d, []), "no client is left of 8"),
        (lambda d: fax.data.slice(d, 5, 2), r"slice\(5, 2\): no client is left"),
        (lambda d: fax.data.split(d, 0.0), "held_out is 0.0, expected a number above 0"),
        (lambda d: fax.data.split(d, 8), "held_out is 8, expected an int from 1 to 7"),
        (lambda d: fax.data.split(d, 1.0), "held_out is 1.0"),
        (lambda d: fax.data.split(d, float("nan")), "held_out is nan"),
        (lambda d: fax.data.map(d, 3), "fn is 3"),
        (lambda d: fax.data.concatenate(), "nothing to concatenate"),
        (lambda d: fax.data.concatenate([d]), "argument 0 is a list"),
        (
            lambda d: fax.data.concatenate(d, d),
            "argument 1 has 8 clients of earlier arguments, 'c0', 'c1', 'c2', ...",
        ),
    ],
)
def test_bad_views(make, message):
    with pytest.raises(DataError, match=message):
        make(InMemory(PLAIN))


def test_errors_of_a_mapped_function_name_the_client():
    with pytest.raises(KeyError) as caught:
        fax.data.map(InMemory(PLAIN), broken).client("c3")
    assert "client 'c3'" in caught.value.__notes__[0]
    parts = InMemory({"a": {"x": [1]}}), InMemory({"b": {"x": [1.0]}})
    both = fax.data.concatenate(*parts)
    both.client("a")
    with pytest.raises(DataError, match="'b', feature 'x' is float64"):
        both.client("b")
