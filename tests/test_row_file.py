"""Rows of clients when disks are full, processes are killed, and calls are interrupted."""

import concurrent.futures
import errno
import resource
import sqlite3
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import ENV
from test_client_store import N, cohort_of, counting, opened

from fax.aggregators import PerClient
from fax.algorithms import Algorithm, ClientStore
from fax.algorithms._row_file import RowFile, create

FULL = (
    ("PRAGMA main.max_page_count = 1", "PRAGMA main.max_page_count = 1000000"),
    ("PRAGMA newest.max_page_count = 1", "PRAGMA newest.max_page_count = 1000000"),
)


def seen(store, ids=range(N)):
    return np.asarray(store.models({"clients": PerClient(None)}, list(ids)))[:, 0].tolist()


def claimed(path, size):
    """The rounds and rows in a file, as another process sees them."""
    with ClientStore(counting(size=size), path, resume=True) as store:
        store.init(None)
        return store.rounds, seen(store)


# A full disk


@pytest.fixture
def limited():
    """Lets no file of this process grow over a number of bytes, until it is called again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size=soft: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("how", ["pages", "bytes"])
def test_a_full_disk_at_a_flush_loses_nothing(tmp_path, limited, how):
    path, size = tmp_path / "clients.db", 5000
    store = ClientStore(counting(size=size), path)
    state = store.init(None)
    state, _ = store.round(state, cohort_of([0, 1]))
    store.flush()
    state, _ = store.round(state, cohort_of([1, 2]))
    execute = store._rows._file.execute
    if how == "pages":
        execute(FULL[0][0])
    else:
        limited(path.stat().st_size + 20_000)
    for rounds in (2, 3):
        with pytest.raises(OSError, match=f"rows of {rounds} rounds could not .* flush again") as e:
            store.flush()
        assert e.value.errno == (errno.ENOSPC if how == "pages" else errno.EIO)
        assert store.rounds == rounds
        file_has = "SELECT value FROM main.facts WHERE name = 'rounds'"
        assert execute(file_has).fetchone() == ("1",)
        if rounds == 2:  # training goes on
            state, _ = store.round(state, cohort_of([5, 1]))
    assert seen(store) == [1, 3, 1, 0, 0, 1]
    with pytest.raises(OSError, match="flush again"):
        store.close()
    execute(FULL[0][1])
    limited()
    store.close()
    assert claimed(path, size) == (3, [1, 3, 1, 0, 0, 1])


def test_a_full_disk_in_a_round_leaves_the_rows_of_the_round_before(tmp_path):
    path, size = tmp_path / "clients.db", 5000
    store = ClientStore(counting(size=size), path)
    state = store.init(None)
    state, _ = store.round(state, cohort_of([0, 1]))
    execute = store._rows._file.execute
    execute(FULL[1][0])
    for _ in range(2):
        with pytest.raises(OSError, match=r"All rows are as before that round.*SQLITE_TMPDIR"):
            store.round(state, cohort_of([1, 2, 3, 4, 5]))
        assert (store.rounds, seen(store)) == (1, [1, 1, 0, 0, 0, 0])
    own, cohort = store.gather(state, cohort_of([3, 4]))
    own, _ = jax.jit(store.algorithm.round)(own, cohort)
    with pytest.raises(OSError, match="All rows are as before"):
        store.scatter(own, cohort_of([3, 4]))
    store.flush()  # makes room
    execute(FULL[1][1])
    state = store.scatter(own, cohort_of([3, 4]))  # what did not go may be tried again
    assert (store.rounds, seen(store)) == (2, [1, 1, 0, 1, 1, 0])
    store.close()
    assert claimed(path, size) == (2, [1, 1, 0, 1, 1, 0])


def test_a_full_disk_at_the_start_leaves_no_file(tmp_path, limited):
    store = ClientStore(counting(size=50_000), tmp_path / "clients.db")
    limited(100_000)
    with pytest.raises(OSError, match="could not be written"):
        store.init(None)
    limited()
    assert list(tmp_path.iterdir()) == []
    store.init(None)  # nothing has happened
    store.close()
    assert list(tmp_path.iterdir()) == [tmp_path / "clients.db"]


@pytest.mark.parametrize("in_file", [True, False])
def test_an_interrupted_write_leaves_the_rows_of_the_round_before(tmp_path, in_file):
    path = str(tmp_path / "rows.db") if in_file else None
    if path is not None:
        create(path, {}, b"start")
    rows = RowFile(path, {}, b"start")

    def interrupted():
        yield 0, b"new"
        yield 1, b"new"
        raise KeyboardInterrupt

    rows.write([(0, b"old")])
    with pytest.raises(KeyboardInterrupt):
        rows.write(interrupted())
    assert [rows.read(i) for i in (0, 1)] == [b"old", b"start"]
    assert rows.rounds == 1
    rows.write([(1, b"new")])
    rows.flush()
    assert [rows.read(i) for i in (0, 1)] == [b"old", b"new"]
    rows.close()


def test_a_call_from_another_thread_says_so_and_changes_nothing():
    rows = RowFile(None, {}, b"start")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        for call in (lambda: rows.read(0), lambda: rows.write([(0, b"new")])):
            with pytest.raises(sqlite3.ProgrammingError, match="thread"):
                pool.submit(call).result()
    assert (rows.read(0), rows.rounds) == (b"start", 0)
    rows.close()


def test_the_file_changes_at_a_flush_only(tmp_path):
    path = tmp_path / "clients.db"
    with opened(path) as store:
        state, before = {"rounds": jnp.zeros(()), "clients": PerClient(None)}, path.read_bytes()
        for _ in range(3):
            store.round(state, cohort_of(range(N)))
        assert path.read_bytes() == before
        store.flush()
        assert path.read_bytes() != before
    assert list(tmp_path.iterdir()) == [path]


def test_a_damaged_file_is_noticed(tmp_path):
    path = tmp_path / "clients.db"
    with opened(path) as store:
        store.round({"rounds": jnp.zeros(()), "clients": PerClient(None)}, cohort_of(range(N)))
    content = bytearray(path.read_bytes())
    with sqlite3.connect(path) as file:
        root = "SELECT rootpage FROM sqlite_master WHERE name = 'clients'"
        (page,) = file.execute(root).fetchone()
        (size,) = file.execute("PRAGMA page_size").fetchone()
    file.close()
    content[(page - 1) * size :][:8] = content[(page - 1) * size : (page - 1) * size + 8] = (
        b"\xff" * 8
    )
    path.write_bytes(content)
    store = opened(path, resume=True)
    with pytest.raises(ValueError, match=r"row of client 2 in .* cannot be read .*malformed"):
        store.models(None, [2])


# Killed

KILLED = """
    import os, random, signal, sys, time
    from fax.algorithms._row_file import RowFile, create

    SIZE, CLIENTS = 20_000, 12
    path, kills = sys.argv[1], int(sys.argv[2])
    rng = random.Random(0)

    def members(round):
        return [(round * 5 + i * i) % CLIENTS for i in range(4)]

    def row(round):
        return round.to_bytes(4, "big") * (SIZE // 4)

    def train(told):
        "Rounds without end; says which have been flushed."
        if not os.path.exists(path):
            create(path, {}, row(0))
        rows = RowFile(path, {}, b"")
        while True:
            number = rows.rounds + 1
            rows.write([(client, row(number)) for client in set(members(number))])
            if number % 3 == 0:
                rows.flush()
                os.write(told, number.to_bytes(4, "big"))

    def check(flushed):
        if not os.path.exists(path):
            assert flushed == 0
            return 0
        rows = RowFile(path, {}, b"")
        assert rows.rounds >= flushed and rows.rounds % 3 == 0, (rows.rounds, flushed)
        for client in range(CLIENTS):
            last = [r for r in range(rows.rounds + 1) if r == 0 or client in members(r)][-1]
            assert rows.read(client) == row(last), (client, rows.rounds)
        rows.close()
        return rows.rounds

    flushed, moved = 0, 0
    for _ in range(kills):
        listen, told = os.pipe()
        child = os.fork()
        if not child:
            try:
                train(told)
            finally:
                os._exit(9)
        os.close(told)
        said, since = b"", time.monotonic()
        for _ in range(rng.randrange(4)):
            since = time.monotonic()
            said += os.read(listen, 4)
        # Anywhere in the rounds and the flush that follow, which take as long as the last ones.
        time.sleep(rng.uniform(0, 1.2) * (time.monotonic() - since))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        said += b"".join(iter(lambda: os.read(listen, 1 << 16), b""))
        os.close(listen)
        flushed = max(flushed, int.from_bytes(said[-4:], "big"))
        before, flushed = flushed, check(flushed)
        moved += bool(said)
    print(kills, moved, flushed)
"""


def killed(path, kills):
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(path), str(kills)]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]


def test_a_file_holds_the_rounds_that_it_claims_whenever_its_process_is_killed(tmp_path):
    kills, moved, rounds = killed(tmp_path / "rows.db", 25)
    assert kills == 25
    assert moved > 10  # kills came after flushes, not only before the first
    assert rounds > 60


# Cohorts and algorithms that do not fit


def test_another_cohort_than_was_gathered_is_refused():
    store = ClientStore(counting())
    state = store.init(None)
    with pytest.raises(ValueError, match=r"has clients \[0, 1\], but nothing was gathered last"):
        store.scatter(state, cohort_of([0, 1]))
    own, cohort = store.gather(state, cohort_of([0, 1]))
    own, _ = jax.jit(store.algorithm.round)(own, cohort)
    for other in ([2, 3], [1, 0], [0], [0, 1, 2]):
        with pytest.raises(ValueError, match=r"but clients \[0, 1\] was gathered last. Gather"):
            store.scatter(own, cohort_of(other))
    with pytest.raises(ValueError, match=r"has 0 arrays of rows, expected 2\. Pass the state"):
        store.scatter(state, cohort_of([0, 1]))
    assert (store.rounds, seen(store)) == (0, [0] * N)
    state = store.scatter(own, cohort_of([0, 1]))
    with pytest.raises(ValueError, match="but nothing was gathered last"):
        store.scatter(own, cohort_of([0, 1]))
    assert (store.rounds, seen(store)) == (1, [1, 1, 0, 0, 0, 0])


def test_an_algorithm_of_ones_own_has_an_init_of_one_argument():
    def init(params):
        return {"params": params, "own": PerClient(jnp.zeros((3, 2)) + params)}

    store = ClientStore(Algorithm(init, lambda s, c: (s, {}), *[lambda s: s["own"].rows] * 2))
    state = store.init(jnp.float32(4))
    state, _ = store.round(state, cohort_of([0, 2]))
    np.testing.assert_array_equal(store.models(state, [1]), [[4, 4]])


def test_a_store_whose_init_failed_can_be_tried_again(tmp_path):
    path = tmp_path / "clients.db"
    with opened(path):
        store = ClientStore(counting(), path, resume=True)
        with pytest.raises(ValueError, match="is open in another store"):
            store.init(None)
    store.init(None)
    assert store.rounds == 0
    path_of_another = tmp_path / "other.db"
    store = ClientStore(counting(), path_of_another)
    path_of_another.touch()  # by another process, since the store was made
    with pytest.raises(FileExistsError, match="Pass resume=True to continue with it, or remove it"):
        store.init(None)
    assert path_of_another.stat().st_size == 0
    store = ClientStore(counting(), path_of_another, resume=True)
    with pytest.raises(ValueError, match="is not a store's file"):
        store.init(None)
