"""The messages, blobs and arrays inside of files: damage is refused by name, whatever it is."""

import zlib

import numpy as np
import pytest
from formats import (
    fedjax_file,
    field,
    mp_bin,
    mp_ext,
    mp_list,
    mp_str,
    npy,
    npz,
    tf_example,
    tff_file,
    varint,
)

from fax.data import DataError, Files, InMemory, SQLite, _msgpack, _tfexample

MIB = 1 << 20
CLIENTS = {"ada": {"label": np.arange(3)}, "bob": {"label": np.arange(5)}}


def test_numbers_that_do_not_end():
    """A varint has 10 bytes at most."""

    def message(raw, packed):
        numbers = field(1, raw) if packed else varint(1 << 3) + raw
        return field(1, field(1, field(1, b"x") + field(2, field(3, numbers))))

    def read(raw, packed):
        return _tfexample.parse(message(raw, packed))["x"].array().tolist()

    for packed in (True, False):
        assert read(b"\xff" * 9 + b"\x01", packed) == [-1]
        assert read(b"\x80" * 9 + b"\x00", packed) == [0]
        for length in (11, 12, 13, 14, 30):
            with pytest.raises(ValueError, match="a number does not end"):
                read(b"\x80" * (length - 1) + b"\x01", packed)
            if packed:
                with pytest.raises(ValueError, match="a number does not end"):
                    read(b"\x05" + b"\x80" * (length - 1) + b"\x01\x07", packed)
    for raw in (b"\x80", b"\x01\xff"):
        with pytest.raises(ValueError, match="damaged"):
            read(raw, True)
    # and so has the tag of a field, or its length
    for more in (9, 12):
        for raw in (
            b"\x8a" + b"\x80" * more + b"\x00\x00",
            b"\x0a" + b"\x80" * (more + 1) + b"\x00",
        ):
            with pytest.raises(ValueError, match="a number does not end"):
                _tfexample.parse(raw)


def test_names_that_come_twice():
    array = mp_ext(1, mp_list([mp_list([b"\x01"]), mp_str("int8"), mp_bin(b"\x00")]))
    one, other = mp_str("x") + array, mp_str("y") + array
    assert list(_msgpack.unpack(b"\x82" + one + other, MIB)) == ["x", "y"]
    with pytest.raises(ValueError, match="the name b'x' is not a string, or occurs twice"):
        _msgpack.unpack(b"\x82" + one + one, MIB)
    entry = field(1, field(1, b"x") + field(2, field(3, field(1, b"\x05"))))
    assert list(_tfexample.parse(field(1, entry))) == ["x"]
    for twice in (field(1, entry + entry), field(1, entry) + field(1, entry)):
        with pytest.raises(ValueError, match="feature 'x' occurs twice"):
            _tfexample.parse(twice)


def test_lists_within_lists():
    deepest = mp_list([])
    for _ in range(4):
        deepest = mp_list([deepest])
    for raw in (deepest, b"\x81" + mp_str("x") + mp_list([mp_list([mp_list([])])])):
        with pytest.raises(ValueError, match=r"expected a map|feature 'x' is not an array"):
            _msgpack.unpack(raw, MIB)
    for raw in (mp_list([deepest]), b"\x91" * 300 + b"\x90", b"\x91" * 100_000 + b"\x90"):
        with pytest.raises(ValueError, match="nested too deeply"):
            _msgpack.unpack(raw, MIB)
    with pytest.raises(ValueError, match="nested too deeply"):
        _msgpack.unpack(b"\x81" + mp_str("x") + mp_list([mp_list([mp_list([deepest])])]), MIB)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([mp_list([b"\x02"]), mp_str("bool"), mp_bin(b"\x00\x02")], "bools with the byte 2"),
        ([mp_list([b"\x02"]), mp_str("i4,("), mp_bin(b"\x00\x02")], r"has dtype b'i4,\('"),
        ([mp_list([b"\x02"]), mp_str("("), mp_bin(b"\x00\x02")], r"has dtype b'\('"),
        ([mp_list([b"\x02"]), mp_str("S1"), mp_bin(b"\x00\x02")], "has dtype b'S1'"),
        ([mp_list([b"\x02"]), mp_str("void"), mp_bin(b"\x00\x02")], "has dtype b'void'"),
        ([mp_list([b"\x02"]), mp_str("f4,f4"), mp_bin(bytes(16))], "has dtype b'f4,f4'"),
        ([mp_list([b"\x01"] * 65), mp_str("int8"), mp_bin(b"\x00")], "has 1 values for the shape"),
        ([mp_list([b"\xcf" + b"\xff" * 8, b"\0"]), mp_str("int8"), mp_bin(b"")], "has the shape"),
        ([mp_list([b"\xff"]), mp_str("int8"), mp_bin(b"\x00")], r"has the shape \[-1\]"),
        (
            [b"\xdd\xff\xff\xff\xff", mp_str("int8"), mp_bin(b"\x00")],
            "4294967295 values are announced",
        ),
        (
            [mp_list([b"\x01"]), mp_str("int8"), b"\x95\x00"],
            "only 1 bytes are left",
        ),
        ([mp_list([b"\x01"]), mp_str("int8"), b"\xc6\xff\xff\xff\xff"], "bytes are missing"),
        (
            [b"\xdf\xff\xff\xff\xff", mp_str("int8"), mp_bin(b"\x00")],
            "8589934590 values are",
        ),
    ],
)
def test_arrays_that_are_none(tmp_path, parts, message):
    blob = zlib.compress(b"\x81" + mp_str("label") + mp_ext(1, mp_list(parts)))
    path = fedjax_file(tmp_path / "a.sqlite", {"ada": None}, lambda _: blob, lambda _: 2)
    with pytest.raises(DataError, match=f"client 'ada'.*{message}"):
        SQLite(path).client("ada")


def test_bools_that_are_neither(tmp_path):
    raw = npy(np.array([True, False]))
    npz(tmp_path / "ada.npz", label=raw[:-1] + b"\x02")
    example = {"label": np.array([b"\x01\x02"], object)}
    path = tff_file(tmp_path / "a.sqlite", {"train": {"ada": {"label": example["label"][None]}}})
    sources = [
        (Files(tmp_path), "client"),
        (SQLite(path, "train", {"label": (bool, (2,))}), "client"),
    ]
    for source, _ in sources:
        with pytest.raises(DataError, match="'ada', feature 'label' has bools with the byte 2"):
            source.client("ada")
    with pytest.raises(DataError, match="'bob', feature 'x' has bools with the byte 255"):
        InMemory({"bob": {"x": np.array([0, 255], np.uint8).view(bool)}})


def test_examples_of_different_kinds_are_cast_alike(tmp_path):
    """One example has its image as bytes, the next as ints."""
    images = [np.array([7, 200], np.uint8), np.array([300, 1])]

    def stored(second, dtype):
        rows = iter([np.array([images[0].tobytes()], object), second])
        path = tmp_path / f"{second[0]}-{np.dtype(dtype)}.sqlite"
        one = {"label": [0, 0]}
        tff_file(path, {"train": {"ada": one}}, lambda _: tf_example({"label": next(rows)}))
        return SQLite(path, "train", {"label": (dtype, (2,))}).client("ada")["label"]

    np.testing.assert_array_equal(stored(np.array([30, 1]), np.uint8), [[7, 200], [30, 1]])
    with pytest.raises(DataError, match="'label' has values from 1 to 300, which uint8 cannot"):
        stored(images[1], np.uint8)


def test_floats_that_do_not_fit(tmp_path):
    path = tff_file(tmp_path / "a.sqlite", {"train": {"ada": {"x": np.float32([1, 1e30, np.inf])}}})
    with pytest.raises(DataError, match=r"'ada', feature 'x' has the value 1.*e.30, which float16"):
        SQLite(path, "train", {"x": (np.float16, ())}).client("ada")
    path = tff_file(tmp_path / "b.sqlite", {"train": {"ada": {"x": np.float32([1, np.inf])}}})
    found = SQLite(path, "train", {"x": (np.float16, ())}).client("ada")["x"]
    np.testing.assert_array_equal(found, np.array([1, np.inf], np.float16))


def test_floats_that_are_cut():
    def message(*parts):
        floats = b"".join(field(1, part) for part in parts)
        return field(1, field(1, field(1, b"x") + field(2, field(2, floats))))

    raw = np.float32([1, 2]).tobytes()
    assert _tfexample.parse(message(raw[:4], raw[4:]))["x"].array().tolist() == [1, 2]
    with pytest.raises(ValueError, match="feature 'x' is damaged"):
        _tfexample.parse(message(raw[:3], raw[3:]))


@pytest.mark.parametrize(
    ("values", "dtype", "fits"),
    [
        ([0, 255], np.uint8, True),
        ([0, 256], np.uint8, False),
        ([-1, 255], np.uint8, False),
        ([-128, 127], np.int8, True),
        ([-129, 127], np.int8, False),
        ([0, 1], bool, True),
        ([0, 2], bool, False),
        ([-1, 1], bool, False),
    ],
)
def test_ints_that_do_not_fit(values, dtype, fits):
    messages = [tf_example({"x": np.array(value)}) for value in values]
    types = _tfexample.feature_types({"x": (dtype, ())})
    if fits:
        assert _tfexample.stack("ada", messages, types)["x"].tolist() == values
    else:
        with pytest.raises(DataError, match=f"'ada', feature 'x' has values from {values[0]} to"):
            _tfexample.stack("ada", messages, types)


@pytest.mark.parametrize(
    "value",
    [("i4,(", ()), ("(", ()), (np.int32, ("3",)), (np.int32, "33"), (np.int32, (2.5,)), 3, None],
)
def test_features_that_are_none(tmp_path, value):
    path = tff_file(tmp_path / "a.sqlite", {"train": CLIENTS})
    with pytest.raises(DataError, match=r"features\['label'\] is .*, expected a pair of a dtype"):
        SQLite(path, "train", {"label": value})


def test_features_that_are_too_large(tmp_path):
    path = tff_file(tmp_path / "a.sqlite", {"train": CLIENTS})
    for shape in ((0, 1 << 70), (1 << 29,), (1,) * 33):
        with pytest.raises(DataError, match=r"features\['label'\] is .*, more than 2 GiB"):
            SQLite(path, "train", {"label": (np.int32, shape)})
    data = SQLite(path, "train", {"label": (np.int64, (1,) * 32)})
    assert data.client("ada")["label"].shape == (3, *(1,) * 32)


def test_damage_that_checksums_do_not_see(tmp_path):
    """What is inside of intact containers is read or refused by name, and nothing else happens."""
    rng = np.random.default_rng(0)
    client = {"label": np.arange(4), "b": np.ones((4, 3), bool), "f": np.ones((4, 2), np.float32)}
    packed, refused = _msgpack.pack(client), 0
    rows = [{name: x[i] for name, x in client.items()} for i in range(4)]
    features = {"label": (np.int64, ()), "b": (bool, (3,)), "f": (np.float32, (2,))}

    def changed(raw):
        copy = bytearray(raw)
        for at in rng.integers(len(raw), size=rng.integers(1, 4)):
            copy[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, copy[at] ^ 1, rng.integers(256)])
        return bytes(copy)

    ids = [f"c{i}" for i in range(60)]
    blobs = iter([zlib.compress(raw) for raw in [packed, *(changed(packed) for _ in ids)]])
    messages = [tf_example(row) for row in rows] + [
        changed(tf_example(row)) for _ in ids for row in rows
    ]
    clients, left = dict.fromkeys(["good", *ids], client), iter(messages)
    fedjax = fedjax_file(tmp_path / "a.sqlite", clients, lambda _: next(blobs))
    tff = tff_file(tmp_path / "b.sqlite", {"train": clients}, lambda _: next(left))
    for client_id in clients:
        alter = (lambda raw: raw) if client_id == "good" else changed
        npz(tmp_path / f"{client_id}.npz", **{name: alter(npy(x)) for name, x in client.items()})
    for source in (SQLite(fedjax), SQLite(tff, "train", features), Files(tmp_path)):
        source.client("good")
        for client_id in ids:
            try:
                found = source.client(client_id)
            except DataError as error:
                assert f"client '{client_id}'" in str(error)  # noqa: PT017
                refused += 1
            else:
                assert {len(x) for x in found.values()} == {4}
    assert 60 < refused < 180
