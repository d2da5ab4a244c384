"""Federated data of other libraries' tables, datasets and files, against what was put in."""

import builtins
import json
import math
import pickle

import ml_dtypes
import numpy as np
import pytest

import fax
from fax.data import DataError, FederatedData

USERS = ["bob", "ada", "bob", "eve", "ada"]
X = np.arange(10, dtype=np.float32).reshape(5, 2)
Y = np.array([3, 1, 4, 1, 5], np.int32)


def assert_clients(data, dtypes=(np.float32, np.int32), users=USERS):
    """Each client has its own rows, in order, and nothing else."""
    assert isinstance(data, FederatedData)
    assert list(data.client_ids()) == sorted(set(users))
    assert len(data) == len(set(users))
    for user in data.client_ids():
        rows = [i for i, name in enumerate(users) if name == user]
        found = data.client(user)
        assert found.keys() == {"x", "y"}
        np.testing.assert_array_equal(found["x"], X[rows])
        np.testing.assert_array_equal(found["y"], Y[rows])
        assert (found["x"].dtype, found["y"].dtype) == dtypes
        assert data.num_examples(user) == len(rows)
    with pytest.raises(DataError, match=r"no client 'mallory'"):
        data.client("mallory")


def records():
    return ({"user": u, "x": x, "y": y} for u, x, y in zip(USERS, X, Y, strict=True))


class Dataset:
    """A map-style dataset of torch, as it is used."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        if not 0 <= i < len(self.items):
            raise RuntimeError("torch's datasets need not raise IndexError")
        return self.items[i]


class IterableDataset:
    """An iterable dataset of torch, which has an item getter that always raises."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)

    def __getitem__(self, i):
        raise NotImplementedError


def test_pandas():
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"user": USERS, "x": list(X), "y": Y, "note": "n"}, index=list("abcde"))
    assert_clients(fax.data.from_pandas(frame, "user", features=frame.columns[1:3]))
    assert fax.data.from_pandas(frame, "user").client("ada")["note"].tolist() == ["n", "n"]
    kept = fax.data.from_pandas(frame, "user", features=["user", "y"])
    assert kept.client("bob")["user"].tolist() == ["bob", "bob"]
    by_category = frame.astype({"user": "category", "y": "Int64"})
    found = fax.data.from_pandas(by_category, "user").client("ada")["y"]
    assert (found.tolist(), found.dtype) == ([1, 5], np.int64)
    assert fax.data.from_pandas(frame, "y").client_ids() == ("1", "3", "4", "5")


def test_polars():
    pl = pytest.importorskip("polars")
    frame = pl.DataFrame({"user": USERS, "x": list(X), "y": Y})
    assert_clients(fax.data.from_pandas(frame, "user"))
    arrays = frame.with_columns(pl.col("x").cast(pl.Array(pl.Float32, 2)))
    assert_clients(fax.data.from_pandas(arrays, "user"))
    for column in ("x", "y", "user"):
        missing = frame.with_columns(pl.when(pl.col("y") != 4).then(pl.col(column)).alias(column))
        with pytest.raises(DataError, match=f"'{column}' has 1 missing value, the first in row 2"):
            fax.data.from_pandas(missing, "user")
    ragged = frame.with_columns(pl.Series("x", [[1], [2], [1, 2], [3], [4]]))
    with pytest.raises(DataError, match=r"shape \(1,\) in row 0, but \(2,\) in row 2"):
        fax.data.from_pandas(ragged, "user")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.rename(columns={"user": "User"}), "no column 'user'. Did you mean 'User'"),
        (
            lambda f: f.assign(y=[1, None, 2, 3, 4]).astype({"y": "Int64"}),
            "'y' has 1 missing.*row 1",
        ),
        (lambda f: f.assign(user=["a", None, "b", "a", "a"]), "'user' has 1 missing.*row 1"),
        (lambda f: f.assign(user=[1.5, 2, 3, 4, 5]), "'user' has dtype float64"),
        (
            lambda f: f.assign(x=[[1], [2], [1, 2], [3], [4]]),
            r"shape \(1,\) in row 0, but \(2,\) in row 2",
        ),
        (lambda f: f.assign(x=["a", 1, "b", "c", "d"]), "'x' mixes int and str"),
        (lambda f: f[["user"]], "no column but 'user'"),
        (lambda f: f.set_axis(["user", "x", "x"], axis=1), "a name twice"),
        (lambda f: f.set_axis(["user", 0, 1], axis=1), "named 0, an int"),
        (lambda f: f.to_dict("list"), "frame is a dict.*read_csv.*from_records"),
    ],
)
def test_tables_that_cannot_be_used(change, message):
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"user": USERS, "x": list(X), "y": Y})
    with pytest.raises(DataError, match=f"from_pandas: .*{message}"):
        fax.data.from_pandas(change(frame), "user")


def test_records():
    assert_clients(fax.data.from_records(records(), "user"))
    text = fax.data.from_records([{"user": 1, "x": b"a"}, {"user": 0, "x": b"b\0"}], "user")
    assert text.client("0")["x"].tolist() == [b"b\0"]
    # NumPy makes floats of ints that int64 is too short for.
    long = [{"user": 2**63 + 1, "x": [2**64 - 1, 1]}, {"user": 5, "x": [2, 3]}]
    hashes = fax.data.from_records(long, "user")
    assert hashes.client_ids() == ("5", str(2**63 + 1))
    assert hashes.client(str(2**63 + 1))["x"].tolist() == [[2**64 - 1, 1]]
    assert hashes.client("5")["x"].dtype == np.uint64
    listed = fax.data.InMemory({"ada": {"x": [1, 2**63 + 1], "y": [0.5, 1e30]}})
    assert listed.client("ada")["x"].tolist() == [1, 2**63 + 1]
    for ints in ([np.uint64(2**60 + 1), 5], [np.uint64(2**60 + 1), -5]):
        assert fax.data.InMemory({"ada": {"x": ints}}).client("ada")["x"].tolist() == ints
    with pytest.raises(DataError, match="'x' mixes strings and int"):
        fax.data.InMemory({"ada": {"x": ["a", 1]}})
    with pytest.raises(DataError, match="'x' has dtype object"):
        fax.data.InMemory({"ada": {"x": [-1, 2**63]}})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "there are no records"),
        ({"user": 1, "x": 2}, "records is a dict"),
        ([{"user": 1, "x": 2}, {"user": 1}], "record 1 differs from the first.*x"),
        ([{"user": 1, "x": 2}, {"user": 1, "x": 2, "z": 1}], "record 1 differs.*z"),
        ([{"user": 1, "x": 2}, 5], "record 1 is an int"),
        ([{"user": 1, "x": None}], "'x' has 1 missing"),
        ([{"user": 1, "x": 2}, {"user": 1, "x": np.ma.masked}], "'x' has 1 missing.*in row 1"),
        ([{"user": [1], "x": 2}], r"'user' has shape \(1, 1\)"),
        ([{"user": "a", "x": "s"}, {"user": "a", "x": b"s"}], "'x' mixes bytes and str"),
    ],
)
def test_records_that_cannot_be_used(given, message):
    with pytest.raises(DataError, match=f"from_records: .*{message}"):
        fax.data.from_records(given, "user")


def test_hugging_face(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    kinds = {
        "user": datasets.Value("string"),
        "x": datasets.List(datasets.Value("float32")),
        "y": datasets.Value("int32"),
    }
    features = datasets.Features(kinds)
    table = {"user": USERS, "x": X.tolist(), "y": Y.tolist()}
    dataset = datasets.Dataset.from_dict(table, features=features)
    assert_clients(fax.data.from_huggingface(dataset, "user"))
    stream = dataset.to_iterable_dataset()
    assert_clients(fax.data.from_huggingface(stream, "user"), (np.float64, np.int64))

    order = [4, 0, 2, 3, 1]  # a selection refers to rows of another table
    selected = dataset.select(order).select(range(4))
    found = fax.data.from_huggingface(selected, "user", features=["y"]).client("bob")
    assert {name: x.tolist() for name, x in found.items()} == {"y": [3, 4]}
    transformed = dataset.with_transform(lambda rows: {"z": [-y for y in rows["y"]]})
    assert fax.data.from_huggingface(transformed, "user").client("ada")["z"].tolist() == [-1, -5]

    image = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    others = datasets.Dataset.from_dict(
        {
            "user": USERS,
            "f": X[:, 0].astype(np.float64) / 3,
            "deep": [X[:4].tolist()] * 5,
            "image": [image] * 5,
            "bytes": [b"a", b"b\0", b"c", b"d", b""],
        },
        features=datasets.Features(
            {
                "user": datasets.Value("string"),
                "f": datasets.Value("float64"),
                "deep": datasets.Array2D((4, 2), "float64"),
                "image": datasets.Image(),
                "bytes": datasets.Value("binary"),
            }
        ),
    )
    found = fax.data.from_huggingface(others, "user").client("ada")
    np.testing.assert_array_equal(found["f"], X[[1, 4], 0].astype(np.float64) / 3)
    np.testing.assert_array_equal(found["deep"], np.stack([X[:4]] * 2))
    np.testing.assert_array_equal(found["image"], np.stack([image] * 2))
    assert (found["f"].dtype, found["image"].dtype) == (np.float64, np.uint8)
    assert found["bytes"].tolist() == [b"b\0", b""]

    with pytest.raises(
        DataError, match=r"splits train, test. Pass one of them, such as dataset\['train'\]\."
    ):
        fax.data.from_huggingface(datasets.DatasetDict(train=dataset, test=dataset), "user")
    ragged = fax.data.from_huggingface(
        datasets.Dataset.from_dict({"user": ["a", "a"], "x": [[1], [1, 2]]}), "user"
    )
    with pytest.raises(DataError, match=r"client 'a': .*\(1,\) in row 0, but \(2,\) in row 1.*pad"):
        ragged.client("a")
    for x, message in [
        ([1, None], "'x' has 1 missing value, the first in row 1"),
        ([[1], [None]], "'x' has missing values in its lists"),
    ]:
        missing = datasets.Dataset.from_dict({"user": ["a", "a"], "x": x})
        with pytest.raises(DataError, match=message):
            fax.data.from_huggingface(missing, "user").client("a")


def test_torch_and_grain():
    pairs = list(zip(X, Y, strict=True))
    assert_clients(fax.data.from_torch(Dataset(pairs), client=USERS))
    assert_clients(fax.data.from_torch(Dataset(pairs), client=np.array(USERS)))
    assert_clients(fax.data.from_torch(Dataset(list(records())), client="user"))
    assert_clients(fax.data.from_grain(list(records()), client="user"))
    assert_clients(fax.data.from_torch(IterableDataset(list(records())), client="user"))
    own = {u: [p for p, user in zip(pairs, USERS) if user == u] for u in sorted(set(USERS))}
    assert_clients(fax.data.from_torch({u: Dataset(items) for u, items in own.items()}))
    assert_clients(fax.data.from_torch({u: IterableDataset(items) for u, items in own.items()}))
    alone = fax.data.from_torch(Dataset(list(X)), client=USERS, features=["x"])
    np.testing.assert_array_equal(alone.client("eve")["x"], X[3:4])
    by_name = fax.data.from_torch(Dataset(pairs), client=USERS, features=iter("xy"))
    assert by_name.client("eve").keys() == {"x", "y"}
    copy = pickle.loads(pickle.dumps(fax.data.from_torch(Dataset(pairs), client=USERS)))
    assert_clients(copy)


def test_arrays_whose_memory_is_used_again(tmp_path):
    memory = np.zeros(2, np.float32)

    class Reused(Dataset):
        def __getitem__(self, i):
            memory[:], y = super().__getitem__(i)
            return {"user": USERS[i], "x": memory, "y": y}

    examples = Reused(list(zip(X, Y, strict=True)))
    assert_clients(fax.data.from_records(map(examples.__getitem__, range(5)), "user"))
    assert_clients(fax.data.from_torch(examples, client="user"))
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(["client_id,i", *(f"{u},{i}" for i, u in enumerate(USERS))]))

    def read(row):
        example = examples[int(row["i"])]
        return {"x": example["x"], "y": example["y"]}

    assert_clients(fax.data.from_fedscale(path, read))


def test_a_dataset_of_torch_is_read_lazily():
    seen = []

    class Noted(Dataset):
        def __getitem__(self, i):
            seen.append(i)
            return super().__getitem__(i)

    data = fax.data.from_torch(Noted(list(zip(X, Y, strict=True))), client=USERS)
    assert (seen, data.num_examples("ada")) == ([], 2)
    data.client("ada")
    assert seen == [1, 4]


class Loader:
    dataset = batch_sampler = ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Loader(), "user"), "is a DataLoader. Pass its dataset"),
        (([(1, 2)],), "Pass client="),
        (([(1, 2)], ["a", "b"]), r"client has the shape \(2,\), expected \(1,\)"),
        (([(1, 2)], "user"), "item 0 has no such field: it is a tuple"),
        (({"a": [(1, 2)]}, "user"), "the mapping already says whose"),
        ((5, "user"), "dataset is 5, expected a dataset"),
        (({"a": 5},), "client 'a' is 5, expected"),
        (([(1, 2)], [0.5]), "dtype float64, expected ids"),
        (([(1, 2), (3, 4)], [1, "1"]), "'client' mixes int and str. Convert it to one type"),
        (([(1, 2), (3, 4)], [[1], [2]]), r"'client' has the shape \(2, 1\), expected one id"),
        (([], []), "there are no examples"),
        (([(1, 2)], np.ma.array([7], mask=[1])), "'client' has 1 missing value, .* in row 0"),
    ],
)
def test_datasets_that_cannot_be_used(arguments, message):
    with pytest.raises(DataError, match=f"from_torch: .*{message}"):
        fax.data.from_torch(*arguments)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([(1, 2, 3)], "an item has 3 elements, but features names 2, x, y"),
        ([{"x": 1}, {"y": 1}], r"item 1 has \['y'\], but the first has \['x'\]"),
        ([([1, 2], 1), ([1], 1)], r"shape \(2,\) in row 0, but \(1,\) in row 1"),
        ([(np.ma.array([1, 2], mask=[0, 1]), 1)], "'x' has 1 missing value, the first in row 0"),
    ],
)
def test_items_that_cannot_be_used(items, message):
    data = fax.data.from_torch({"a": items})
    with pytest.raises(DataError, match=f"client 'a': .*{message}"):
        data.client("a")


def leaf_file(path, names, /, **changes):
    """A file of LEAF's with awkward text, as its scripts write it."""
    texts = ['say "hi" {[', 'back\\slash \\" ]}', "ünï\u2028"]
    content = {
        "users": names,
        "num_samples": [2] * len(names),
        "user_data": {
            user: {"x": [f"{texts[i % 3]} {user}", "users"], "y": [[i, i + 1], [0, 0]]}
            for i, user in enumerate(names)
        },
        "hierarchies": [{"user_data": {"mallory": []}}],
    }
    path.write_text(
        json.dumps(content | changes, ensure_ascii=len(names) % 2 == 0, indent=len(names))
    )
    return content["user_data"]


def test_leaf(tmp_path):
    expected = leaf_file(tmp_path / "a.json", ["b", 'q"uote\\', "user_data"])
    expected |= leaf_file(tmp_path / "b.json", ["ü", "a"])
    (tmp_path / "notes.txt").write_text("none of LEAF's")
    data = fax.data.from_leaf(tmp_path)
    assert isinstance(data, FederatedData)
    assert list(data.client_ids()) == list(expected)
    data = pickle.loads(pickle.dumps(data))
    for user, examples in expected.items():
        assert data.num_examples(user) == 2
        assert {name: x.tolist() for name, x in data.client(user).items()} == examples
    lengths = fax.data.from_leaf(tmp_path / "b.json", convert=lambda e: {"x": [*map(len, e["x"])]})
    assert lengths.client("a")["x"].tolist() == [len(text) for text in expected["a"]["x"]]
    with pytest.raises(DataError, match=r"no client 'z'"):
        data.client("z")


def test_leaf_reads_only_what_is_asked_for(tmp_path, monkeypatch):
    expected = leaf_file(tmp_path / "a.json", ["a", "b"])
    data = fax.data.from_leaf(tmp_path)
    parsed = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(text) or loads(text))
    data.client("b")
    assert [loads(text) for text in parsed] == [expected["b"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"users": ["a"]}, "has 1 users, 2 num_samples and 2 clients.*differ in 'b'"),
        ({"users": ["a", 1]}, "users has 1, expected strings"),
        ({"users": None}, "has no list users"),
        ({"num_samples": [2, -1]}, "num_samples of client 'b' is -1"),
        ({"num_samples": [2, "2"]}, "num_samples of client 'b' is '2'"),
        ({"user_data": {"a": {}, "b": {}, "c": {}}}, "3 clients in user_data.*'c'"),
    ],
)
def test_leaf_files_that_cannot_be_used(tmp_path, change, message):
    leaf_file(tmp_path / "a.json", ["a", "b"], **change)
    with pytest.raises(DataError, match=message):
        fax.data.from_leaf(tmp_path)


def test_damaged_leaf_files(tmp_path):
    path = tmp_path / "a.json"
    expected = leaf_file(path, ["a", "b"])
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 7):  # no file that ends early is taken for a whole one
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cannot be read"):
            fax.data.from_leaf(path)
    path.write_bytes(whole)
    data = fax.data.from_leaf(path)
    path.write_bytes(whole.replace(b'"y"', b"'y'"))
    with pytest.raises(DataError, match=r"client 'a': .*cannot be read.*damaged, or has changed"):
        data.client("a")
    path.write_text(
        json.dumps({"users": ["a"], "num_samples": [3], "user_data": {"a": expected["a"]}})
    )
    with pytest.raises(DataError, match=r"client 'a': .*'x' has 2 rows, num_samples says 3"):
        fax.data.from_leaf(path).client("a")
    leaf_file(tmp_path / "b.json", ["a"])
    with pytest.raises(DataError, match=r"b.json has 1 clients that .*a.json has as well, 'a'"):
        fax.data.from_leaf(tmp_path)


def test_hdf5(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "people.h5"
    with h5py.File(path, "w") as file:
        for user in sorted(set(USERS)):
            rows = [i for i, name in enumerate(USERS) if name == user]
            file[f"examples/{user}/x"], file[f"examples/{user}/y"] = X[rows], Y[rows]
    assert_clients(fax.data.from_hdf5(path))
    assert_clients(pickle.loads(pickle.dumps(fax.data.from_hdf5(path))))
    assert fax.data.from_hdf5(path, features=iter("y")).client("eve").keys() == {"y"}
    with pytest.raises(DataError, match=r"no feature 'label'. Choose from x, y"):
        fax.data.from_hdf5(path, features=["label"]).client("eve")
    (tmp_path / "half.h5").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"half.h5 cannot be opened"):
        fax.data.from_hdf5(tmp_path / "half.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["weights"] = X
    with pytest.raises(DataError, match=r"has no group examples, but weights"):
        fax.data.from_hdf5(tmp_path / "other.h5")
    with h5py.File(tmp_path / "empty.h5", "w") as file:
        file.create_group("examples/ada")
        file["examples/bob/y"] = 5
        file["examples/eve"] = [1, 2]
    with pytest.raises(DataError, match=r"client 'eve': .*empty.h5 cannot be read"):
        fax.data.from_hdf5(tmp_path / "empty.h5").client("eve")
    for client in ("ada", "bob"):
        with pytest.raises(DataError, match=f"client '{client}' of .*empty.h5 has no data set"):
            fax.data.from_hdf5(tmp_path / "empty.h5").num_examples(client)


def test_fedscale(tmp_path):
    lines = [f"{u},img {i}.npy,{y},{y}" for i, (u, y) in enumerate(zip(USERS, Y))]
    path = tmp_path / "train.csv"
    path.write_text("\n".join(["client_id,sample_path,label_name,label_id", *lines, ""]))
    for i, x in enumerate(X):
        np.save(tmp_path / f"img {i}.npy", x)

    def read(row):
        return {"x": np.load(tmp_path / row["sample_path"]), "y": np.int32(row["label_id"])}

    data = fax.data.from_fedscale(path, read)
    assert_clients(data)
    (tmp_path / "img 3.npy").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        data.client("eve")
    assert "the examples of client 'eve'" in caught.value.__notes__[0]
    assert data.client("ada")["y"].tolist() == [1, 5]
    with pytest.raises(DataError, match=r"no column 'user'. Choose from client_id"):
        fax.data.from_fedscale(path, read, client="user")
    with pytest.raises(
        DataError,
        match=r"client 'ada': .*read returned int for \['ada', .*expected a mapping",
    ):
        fax.data.from_fedscale(path, lambda row: 5).client("ada")
    path.write_text("client_id,y\nada,5\n", encoding="utf-8-sig")  # as Excel writes it
    assert fax.data.from_fedscale(path, lambda row: {"y": int(row["y"])}).client_ids() == ("ada",)
    path.write_text("client_id,sample_path\na,b\nc\n")
    with pytest.raises(DataError, match=r"row 1 of .* has 1 values for 2 columns"):
        fax.data.from_fedscale(path, read)


def test_padding_and_cropping():
    rows = [np.arange(3, dtype=np.int16), np.array([7], np.int16), []]
    padded = fax.data.pad(rows, 4, value=-1)
    assert padded.tolist() == [[0, 1, 2, -1], [7, -1, -1, -1], [-1, -1, -1, -1]]
    assert padded.dtype == np.int16
    assert fax.data.pad(rows, 2, truncate=True).tolist() == [[0, 1], [7, 0], [0, 0]]
    images = [np.random.default_rng(i).normal(size=(5 + i, 7 - i, 3)) for i in builtins.range(3)]
    padded = fax.data.pad(images, (8, 7))
    for image, found in zip(images, padded, strict=True):
        np.testing.assert_array_equal(found[: image.shape[0], : image.shape[1]], image)
        assert np.abs(found).sum() == pytest.approx(np.abs(image).sum())
    cropped = fax.data.crop(images, (4, 5))
    np.testing.assert_array_equal(cropped[0], images[0][0:4, 1:6])
    np.testing.assert_array_equal(cropped[2], images[2][1:5, 0:5])
    hashes = [[2**63 + 1], np.array([1])]  # NumPy would make floats of both
    for found in (fax.data.pad(hashes, 1), fax.data.crop(hashes, 1)):
        assert found.tolist() == [[2**63 + 1], [1]]
    assert fax.data.pad([np.uint64([7]), [-(2**62) - 1]], 1).tolist() == [[7], [-(2**62) - 1]]
    words = fax.data.pad([np.array([b"a\0"], object), [b"b", b"c"]], 2, value=b"")
    assert words.tolist() == [[b"a\0", b""], [b"b", b"c"]]
    for value in (0.1, math.nan, math.inf):
        halves = fax.data.pad([np.ones(1, ml_dtypes.bfloat16)], 2, value=value)
        assert halves.dtype == ml_dtypes.bfloat16
        np.testing.assert_allclose(np.float64(halves[0]), [1, value], rtol=4e-3)
    days = fax.data.pad([np.array(["2020-01-01"], "M8[D]")], 2, value=np.datetime64("NaT", "D"))
    assert np.isnat(days).tolist() == [[False, True]]
    for call, message in [
        (lambda: fax.data.pad([np.float16([1])], 2, value=1e6), "value is 1000000.0, which the"),
        (lambda: fax.data.pad([[1.0]], 2, value=1j), "value is 1j, which the rows' dtype float64"),
        (lambda: fax.data.pad([[1]], 2, value=None), "value is None, which the rows' dtype int64"),
        (lambda: fax.data.pad([[1]], 2, value=[1, 2]), r"value is \[1, 2\], which the rows'"),
        (lambda: fax.data.pad([["a\0"], ["b"]], 1, value=""), "row 0 has a string that ends with"),
        (lambda: fax.data.pad([["a", 1]], 2, value=""), "row 0 mixes strings and int"),
        (lambda: fax.data.crop([["a"], [1]], 1), "rows have dtype <U1 and int64. Convert them"),
        (lambda: fax.data.pad([[2**63], [-1]], 1), "rows have dtype uint64 and int64. Convert"),
        (lambda: fax.data.pad([np.ma.array([1], mask=[True])], 1), "row 0 is a masked array"),
        (lambda: fax.data.pad(["ab"], 2), r"row 0 has the shape \(\), expected at least 1 axis"),
        (lambda: fax.data.crop(5, 2), "rows is 5, expected a list of arrays"),
        (lambda: fax.data.pad(rows, 2), "row 0 has the length 3 in axis 0, more than 2"),
        (lambda: fax.data.pad([], 2), "there are no rows"),
        (lambda: fax.data.pad([[1]], 0), "shape is 0"),
        (lambda: fax.data.pad([[1]], 2, value=0.5), "value is 0.5, which the rows' dtype"),
        (lambda: fax.data.pad([np.int8([1])], 2, value=300), "value is 300, which the rows' dtype"),
        (lambda: fax.data.pad([[[1, 2]], [[1]]], 2), r"row 1 has the shape \(1, 1\), but row 0"),
        (lambda: fax.data.crop(images, (6, 5)), r"row 0 has the shape \(5, 7, 3\), smaller"),
    ]:
        with pytest.raises(DataError, match=message):
            call()


def test_describe(tmp_path):
    rng = np.random.default_rng(0)
    clients = {
        f"c{i}": {"x": rng.normal(size=(n, 2)), "y": rng.integers(i + 1, size=n)}
        for i, n in enumerate([3, 50, 7])
    }
    found = fax.data.describe(fax.data.InMemory(clients))
    assert found.clients == ("c0", "c1", "c2")
    assert found.num_examples.tolist() == [3, 50, 7]
    assert found.bytes == sum(x.nbytes for own in clients.values() for x in own.values())
    expected = [np.bincount(own["y"], minlength=3).tolist() for own in clients.values()]
    assert (found.labels.tolist(), found.label_counts.tolist()) == ([0, 1, 2], expected)
    assert found.features == {"x": (np.dtype(float), (2,)), "y": (np.dtype(int), ())}
    pytest.importorskip("matplotlib")
    panels = found.figure(tmp_path / "who.png").axes
    assert (tmp_path / "who.png").stat().st_size > 5000
    shares = np.array(expected) / np.sum(expected, 1, keepdims=True)
    # Clients are in the order of their most frequent label, and the purest of these is first.
    order = sorted(range(3), key=lambda i: (np.argmax(shares[i]), -max(shares[i])))
    np.testing.assert_array_equal(panels[1].images[0].get_array(), shares[order])
    in_bytes = fax.data.describe(fax.data.InMemory({"a": {"y": np.array([b"u", b"u\0"], object)}}))
    assert in_bytes.label_counts.tolist() == [[1, 1]]
    text = fax.data.describe(fax.data.InMemory({"a": {"y": ["u", "v"]}, "b": {"y": ["w"]}}))
    assert (text.labels.tolist(), text.bytes) == (["u", "v", "w"], 3 * 4)
    many = fax.data.describe(fax.data.InMemory({"a": {"y": np.arange(101)}}))
    assert many.labels is None
    assert len(many.figure().axes) == 1
    assert fax.data.describe(fax.data.InMemory(clients), label="z").labels is None
    with pytest.raises(ValueError, match="figure: path is 3, expected a path"):
        many.figure(3)
    both = {name: {"y": np.array([value], object)} for name, value in (("a", "u"), ("b", b"u"))}
    with pytest.raises(DataError, match="feature 'y' has bytes at some clients and strings or"):
        fax.data.describe(fax.data.InMemory(both))
