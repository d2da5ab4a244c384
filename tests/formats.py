"""Files of FedJAX's, TensorFlow Federated's and NumPy's formats, as these are published."""

import io
import sqlite3
import struct
import zipfile
import zlib

import numpy as np

# FedJAX's format: zlib-compressed msgpack, https://github.com/msgpack/msgpack/blob/master/spec.md


def mp_str(text):
    raw = text.encode()
    return (bytes([0xA0 | len(raw)]) if len(raw) < 32 else b"\xd9" + bytes([len(raw)])) + raw


def mp_bin(raw):
    return (
        b"\xc4" + bytes([len(raw)]) if len(raw) < 256 else b"\xc5" + struct.pack(">H", len(raw))
    ) + raw


def mp_int(n):
    return bytes([n]) if n < 128 else b"\xcd" + struct.pack(">H", n)


def mp_list(parts):
    return (
        bytes([0x90 | len(parts)]) if len(parts) < 16 else b"\xdc" + struct.pack(">H", len(parts))
    ) + b"".join(parts)


def mp_ext(kind, raw):
    if len(raw) in (1, 2, 4, 8, 16):
        return bytes([0xD4 + len(raw).bit_length() - 1, kind]) + raw
    if len(raw) < 256:
        return b"\xc7" + bytes([len(raw), kind]) + raw
    return b"\xc8" + struct.pack(">HB", len(raw), kind) + raw


def fedjax_blob(features):
    parts = [bytes([0x80 | len(features)])]
    for name, x in features.items():
        shape = mp_list([mp_int(n) for n in x.shape])
        if x.dtype == object:
            ext = mp_ext(4, mp_list([shape, mp_list([mp_bin(v) for v in x.flat])]))
        else:
            ext = mp_ext(1, mp_list([shape, mp_str(x.dtype.name), mp_bin(x.tobytes())]))
        parts += [mp_str(name), ext]
    return zlib.compress(b"".join(parts))


def fedjax_file(path, clients, blob=fedjax_blob, count=lambda v: len(v["label"])):
    connection = sqlite3.connect(path)
    connection.execute(
        "CREATE TABLE federated_data ( client_id BLOB NOT NULL PRIMARY KEY, data BLOB NOT NULL, "
        "num_examples INTEGER NOT NULL );"
    )
    for client_id, features in clients.items():
        row = [client_id.encode(), blob(features), count(features)]
        connection.execute("INSERT INTO federated_data VALUES (?, ?, ?);", row)
    connection.commit()
    connection.close()
    return path


# TensorFlow Federated's format: one tf.train.Example for each row


def varint(n):
    n &= (1 << 64) - 1
    out = b""
    while n >= 128:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def field(number, raw):
    return varint(number << 3 | 2) + varint(len(raw)) + raw


def tf_feature(x, packed=True):
    if x.dtype == object:
        return field(1, b"".join(field(1, v) for v in np.atleast_1d(x)))
    if x.dtype.kind == "f":
        parts, number, wire = [struct.pack("<f", v) for v in x.flat], 2, 5
    else:
        parts, number, wire = [varint(int(v)) for v in x.flat], 3, 0
    if packed:
        return field(number, field(1, b"".join(parts)))
    return field(number, b"".join(varint(1 << 3 | wire) + part for part in parts))


def tf_example(features, packed=True):
    entries = (
        field(1, field(1, name.encode()) + field(2, tf_feature(np.asarray(x), packed)))
        for name, x in features.items()
    )
    return field(1, b"".join(entries))


def rows_of(features):
    columns = {name: np.asarray(x) for name, x in features.items()}
    for i in range(len(next(iter(columns.values())))):
        yield {
            name: np.array([x[i]], object).ravel() if x.dtype == object else x[i]
            for name, x in columns.items()
        }


def tff_file(path, splits, message=tf_example, extra=0):
    connection = sqlite3.connect(path)
    connection.executescript(
        """
        CREATE TABLE examples (
            split_name TEXT NOT NULL, client_id TEXT NOT NULL,
            serialized_example_proto BLOB NOT NULL);
        CREATE INDEX idx_examples_client_id ON examples (client_id);
        CREATE INDEX idx_examples_client_id_split ON examples (split_name, client_id);
        CREATE TABLE client_metadata (
            client_id TEXT NOT NULL, split_name TEXT NOT NULL, num_examples INTEGER NOT NULL);
        CREATE INDEX idx_metadata_client_id ON client_metadata (client_id);
        """
    )
    for split, clients in splits.items():
        for client_id, features in clients.items():
            for row in rows_of(features):
                connection.execute(
                    "INSERT INTO examples VALUES (?, ?, ?)", [split, client_id, message(row)]
                )
            row = [client_id, split, len(next(iter(features.values()))) + extra]
            connection.execute("INSERT INTO client_metadata VALUES (?, ?, ?)", row)
    connection.commit()
    connection.close()
    return path


# NumPy's format, in zip archives


def npz(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in members.items():
            archive.writestr(f"{name}.npy", raw)
    return path


def npy(array):
    file = io.BytesIO()
    np.lib.format.write_array(file, array)
    return file.getvalue()
