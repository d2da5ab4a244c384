"""State of clients: rows of a cohort on every mesh, and rows kept on the host or in a file."""

import os
import pickle
import sqlite3
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import problems
import pytest
from jax.sharding import PartitionSpec as P
from problems import SIZES, Quadratic, assert_trees_close
from subsets import alike

import fax
from fax.aggregators import Aggregator, PerClient
from fax.algorithms import Algorithm, ClientStore, apfl, fedavg, gather_rows, scatter_rows

N = len(SIZES)


@pytest.fixture(scope="module")
def data():
    return problems.data()


def cohorts(data, clients=4):
    return fax.data.cohorts(data, clients, 4)


def remembering():
    """The mean of updates, to which each client adds half of its last one."""

    def init(params):
        return PerClient(jax.tree.map(lambda x: jnp.zeros((N, *x.shape), x.dtype), params))

    def aggregate(updates, weights, state, key):
        updates = jax.tree.map(lambda u, before: u + before / 2, updates, state.rows)
        return fax.mean(updates, weights=weights), PerClient(updates), {}

    return Aggregator(init, aggregate)


def personal(**kwargs):
    return apfl(Quadratic.loss, optax.sgd(0.1), num_clients=N, **kwargs)


def stateful(**kwargs):
    """Rows in the algorithm's own state and in its aggregator's."""
    return personal(aggregator=remembering(), **kwargs)


def counting(num_clients=N, size=2, start=0.0):
    """Adds one to the rows of those who take part."""

    def init(params, model_state=None):
        rows = {"seen": jnp.full((num_clients, size), start), "id": jnp.zeros(num_clients, int)}
        return {"rounds": jnp.zeros(()), "clients": PerClient(rows)}

    def round(state, cohort):
        own = gather_rows(state, cohort)["clients"].rows
        new = {"seen": own["seen"] + 1, "id": own["id"] * 10 + 7}
        after = {"rounds": state["rounds"] + 1, "clients": PerClient(new)}
        return scatter_rows(state, after, cohort), {}

    def models(state):
        return state["clients"].rows["seen"]

    return Algorithm(init, round, lambda state: models(state)[0], models)


def cohort_of(ids, sharding=None):
    n = len(ids)
    arrays = {"x": np.zeros((n, 1, 1))}, np.ones((n, 1), bool), np.ones(n, np.int32)
    keys = jax.random.split(jax.random.key(0), n)
    ids = np.array(ids, np.int32)
    return fax.data.Cohort(*jax.device_put((*arrays, ids, keys), sharding))


# Rows on meshes

MESHES = [
    ("auto", {"clients": 1}),
    ("auto", {"clients": 2}),
    ("explicit", {"clients": 2}),
    ("auto", {"clients": 4, "model": 2}),
    ("explicit", {"clients": 4, "model": 2}),
    ("first-auto", {"clients": 4, "model": 2}),
    ("first-explicit", {"clients": 4, "model": 2}),
]
SPECS = [P(), P("clients"), P(None, None, "model"), P("clients", None, "model")]


@pytest.mark.always("auto-axes1-ids1", "first-auto-axes5-ids1", "explicit-axes2-ids0")
@pytest.mark.kinds(kind=alike, axes=alike, ids=alike)
@pytest.mark.parametrize("ids", [[5, 2, 11, 0], [1, 7, 3]])
@pytest.mark.parametrize(("kind", "axes"), MESHES)
def test_rows_wherever_they_are(kind, axes, ids):
    def double(state, cohort):
        rows = gather_rows(state, cohort)
        return rows, scatter_rows(state, jax.tree.map(lambda x: 2 * x, rows), cohort)

    step = jax.jit(double, donate_argnums=0)
    with jax.set_mesh(meshes.mesh(kind, **axes)):
        even = len(ids) % axes["clients"] == 0
        cohort = cohort_of(ids, meshes.put(np.zeros(8), "clients" if even else None).sharding)
        for spec in SPECS:
            for num_clients in (16, 13):
                flat = [x for x in spec if x is not None]
                if set(flat) - set(axes) or ("clients" in flat and num_clients % axes["clients"]):
                    continue
                expected = np.arange(num_clients * 6.0).reshape(num_clients, 3, 2)
                state = {"own": PerClient(meshes.put(expected, *spec)), "other": jnp.ones(3)}
                where = state["own"].rows.sharding
                rows, after = step(state, cohort)
                np.testing.assert_array_equal(rows["own"].rows, expected[ids])
                expected[ids] *= 2
                np.testing.assert_array_equal(after["own"].rows, expected)
                assert after["own"].rows.sharding.is_equivalent_to(where, 3)


def test_a_round_does_not_copy_the_population(data):
    def loss(params, batch, key):
        return jnp.sum(jnp.tanh(batch["x"] @ params) ** 2, 1)

    algorithm = apfl(loss, optax.sgd(0.1), num_clients=500)
    state, cohort = algorithm.init(np.ones((4, 100))), next(cohorts(data))
    compiled = jax.jit(algorithm.round, donate_argnums=0).lower(state, cohort).compile()
    memory = compiled.memory_analysis()
    population = 500 * 400 * 8
    assert memory.alias_size_in_bytes >= population
    assert memory.temp_size_in_bytes < population / 4


def test_clients_without_a_row():
    algorithm = counting(num_clients=3)
    state, cohort = algorithm.init(None), cohort_of([0, 3])
    with pytest.raises(
        ValueError, match="num_clients=3, but the cohort has a client at position 3"
    ):
        algorithm.round(state, cohort)
    with pytest.raises(ValueError, match=r"num_clients=3, but the cohort has .* position 3"):
        jax.jit(algorithm.round)(state, cohort_of([0, 1, 2, 1]))
    # Positions are unknown to the compiler, but what they lead to is not kept quiet.
    rows = jax.jit(gather_rows)(state, cohort)["clients"].rows
    np.testing.assert_array_equal(rows["seen"], [[0, 0], [np.nan, np.nan]])


# The store


@pytest.mark.always("a mesh of 4 x 2-True")
@pytest.mark.parametrize(
    ("setting", "in_file"), [("jitted", True), ("a mesh of 2", False), ("a mesh of 4 x 2", True)]
)
def test_rounds_are_those_of_the_algorithm(data, tmp_path, setting, in_file):
    where, at_once = problems.setting(setting)
    algorithm = stateful(vectorize=at_once)
    with where, ClientStore(algorithm, tmp_path / "clients.db" if in_file else None) as store:
        expected, state = algorithm.init(Quadratic.start()), store.init(Quadratic.start())
        assert jax.tree.leaves(state.clients) == []
        for _, cohort in zip(range(3), cohorts(data)):
            expected, expected_metrics = jax.jit(algorithm.round)(expected, cohort)
            state, metrics = store.round(state, cohort)
            assert_trees_close(metrics, expected_metrics)
        assert_trees_close(jax.device_get(state.params), expected.params)
        assert_trees_close(store.models(state, range(N)), algorithm.models(expected))
        every, _ = store.gather(state, cohort_of(range(N)))
        assert_trees_close(jax.device_get(every), jax.device_get(expected))


def test_a_million_clients_need_memory_for_those_who_take_part():
    algorithm = counting(num_clients=1_000_000, size=5000)  # 37 GiB of rows
    store = ClientStore(algorithm)
    state = store.init(None)
    for ids in ([3, 999_999], [999_999, 0]):
        state, _ = store.round(state, cohort_of(ids))
    seen = store.models(state, [3, 999_999, 0, 17])
    np.testing.assert_array_equal(seen[:, -1], [1, 2, 1, 0])
    assert store.rounds == state["rounds"] == 2


def test_a_run_goes_on_where_it_stopped(data, tmp_path):
    path, algorithm = tmp_path / "clients.db", stateful()
    every = [cohort for _, cohort in zip(range(4), cohorts(data))]
    with ClientStore(algorithm) as store:
        expected = store.init(Quadratic.start())
        for cohort in every:
            expected, _ = store.round(expected, cohort)
        rows = store.models(expected, range(N))
    with ClientStore(algorithm, path) as store:
        state = store.init(Quadratic.start())
        for cohort in every[:2]:
            state, _ = store.round(state, cohort)
    with ClientStore(algorithm, path, resume=True) as store:
        store.init(Quadratic.start())
        assert store.rounds == 2
        for cohort in every[2:]:
            state, _ = store.round(state, cohort)
        assert_trees_close(store.models(state, range(N)), rows)
    assert_trees_close(state.params, expected.params)


def test_rows_of_those_who_come_later_are_those_of_the_first_start(tmp_path):
    with ClientStore(counting(start=5.0), tmp_path / "clients.db") as store:
        store.init(None)
    with ClientStore(counting(start=9.0), tmp_path / "clients.db", resume=True) as store:
        state = store.init(None)
        np.testing.assert_array_equal(store.models(state, [1]), [[5, 5]])


def test_only_one_process_uses_a_store(tmp_path, monkeypatch):
    """Not those that are forked from it, which have the file without its lock."""
    path = tmp_path / "clients.db"
    with ClientStore(counting(), path) as store:
        state = store.init(None)
        state, _ = store.round(state, cohort_of([0, 1]))
        with pytest.raises(TypeError, match=r"a store cannot be pickled.*with save\(\)"):
            pickle.dumps(store)
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 1)
            for use in (store.flush, lambda: store.models(state, [0])):
                with pytest.raises(ValueError, match=r"opened by another process.*was forked"):
                    use()
            store.close()  # flushes nothing
    with ClientStore(counting(), path, resume=True) as store:
        store.init(None)
        assert store.rounds == 0


def test_what_was_not_flushed_is_undone(tmp_path):
    path = tmp_path / "clients.db"

    def interrupted():
        with ClientStore(counting(), path) as store:
            state = store.init(None)
            state, _ = store.round(state, cohort_of([0, 1]))
            store.flush()
            state, _ = store.round(state, cohort_of([1, 2]))
            np.testing.assert_array_equal(store.models(state, [0, 1, 2])[:, 0], [1, 2, 1])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with ClientStore(counting(), path, resume=True) as store:
        state = store.init(None)
        assert store.rounds == 1
        np.testing.assert_array_equal(store.models(state, [0, 1, 2])[:, 0], [1, 1, 0])


def test_a_process_that_dies_leaves_no_half_of_a_round(tmp_path):
    """More rows than SQLite keeps in memory, so that the file itself has changed."""
    program = """
        import os, sys
        import numpy as np
        import test_client_store as t
        store = t.ClientStore(t.counting(size=100_000), sys.argv[1])
        state = store.init(None)
        state, _ = store.round(state, t.cohort_of(range(6)))
        store.flush()
        for _ in range(2):
            state, _ = store.round(state, t.cohort_of(range(6)))
        assert os.path.exists(sys.argv[1] + "-journal")
        os._exit(7)
    """
    path = tmp_path / "clients.db"
    command = [sys.executable, "-c", "import conftest\n" + textwrap.dedent(program), str(path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    with ClientStore(counting(size=100_000), path, resume=True) as store:
        state = store.init(None)
        assert store.rounds == 1
        np.testing.assert_array_equal(store.models(state, range(6)), 1)


def test_types_are_kept(tmp_path):
    def init(params, model_state=None):
        return PerClient(
            {"half": jnp.full((N, 3), 0.1, jnp.bfloat16), "flag": jnp.ones(N, bool), "none": None}
        )

    def rows(state):
        return state.rows

    algorithm = Algorithm(init, lambda state, cohort: (state, {}), rows, rows)
    for resume in (False, True):
        with ClientStore(algorithm, tmp_path / "clients.db", resume=resume) as store:
            state, _ = store.round(store.init(None), cohort_of([0, 2]))
            expected = jax.tree.map(lambda x: x[:2], init(None).rows)
            jax.tree.map(np.testing.assert_array_equal, store.models(state, [0, 1]), expected)
            assert store.models(state, [0])["half"].dtype == jnp.bfloat16


# Mistakes


def opened(path, algorithm=None, **kwargs):
    store = ClientStore(algorithm or counting(), path, **kwargs)
    store.init(None)
    return store


def test_files_that_do_not_fit(tmp_path):
    path = tmp_path / "clients.db"
    with pytest.raises(FileNotFoundError, match="there is no"):
        ClientStore(counting(), path, resume=True)
    with opened(path), pytest.raises(ValueError, match="is open in another store"):
        opened(path, resume=True)
    with pytest.raises(FileExistsError, match="Pass resume=True to continue with it, or remove it"):
        ClientStore(counting(), path)
    with pytest.raises(ValueError, match="has 6 clients, but the algorithm has 7"):
        opened(path, counting(num_clients=7), resume=True)
    expected = r"has float64\[2\] rows of state\['clients'\]\['seen'\], but .* has float64\[3\]"
    with pytest.raises(ValueError, match=expected):
        opened(path, counting(size=3), resume=True)
    path.write_bytes(b"This is no database, whatever its name says." * 100)
    with pytest.raises(ValueError, match="is not a store's file"):
        opened(path, resume=True)
    with pytest.raises(ValueError, match="resume=True needs path="):
        ClientStore(counting(), resume=True)


def test_a_damaged_row_is_noticed(tmp_path):
    path = tmp_path / "clients.db"
    with opened(path) as store:
        store.round({"rounds": jnp.zeros(()), "clients": PerClient(None)}, cohort_of([2, 4]))
    file = sqlite3.connect(path)
    row = bytearray(file.execute("SELECT row FROM clients WHERE position = 4").fetchone()[0])
    row[-1] ^= 1
    file.execute("UPDATE clients SET row = ? WHERE position = 4", [bytes(row)])
    file.commit()
    file.close()
    store = opened(path, resume=True)
    with pytest.raises(ValueError, match=r"the row of client 4 .* is damaged"):
        store.models(None, [4])


def test_cohorts_that_cannot_be(data):
    store = ClientStore(counting())
    with pytest.raises(ValueError, match="closed, or init has not been called"):
        store.flush()
    state = store.init(None)
    with pytest.raises(ValueError, match="client 3 occurs 2 times in the cohort"):
        store.round(state, cohort_of([3, 1, 3]))
    with pytest.raises(ValueError, match="no row for client 6: the algorithm was made for num_cli"):
        store.round(state, cohort_of([3, 6]))
    with pytest.raises(ValueError, match=r"positions is float64\[1\], expected ints"):
        store.models(state, [0.5])
    with pytest.raises(ValueError, match="has one model for all"):
        opened(None, Algorithm(*counting()[:3])).models(state, [0])
    with pytest.raises(ValueError, match="cannot be used in a jitted function"):
        jax.jit(store.round)(state, cohort_of([3]))
    own = ClientStore(personal())
    assert_trees_close(own.params(own.init(Quadratic.start())), Quadratic.start())
    with pytest.raises(ValueError, match="init was called before"):
        store.init(None)
    store.close()
    with pytest.raises(ValueError, match="the store is closed"):
        store.round(state, cohort_of([3]))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "keeps nothing for clients, expected arrays in fax.aggregators.PerClient"),
        (lambda: (jnp.zeros(3), jnp.zeros(4)), r"keeps \['3', '4'\] rows for clients"),
        (lambda: jnp.arange(3.0), "state differs between clients"),
        (
            lambda: jax.random.split(jax.random.key(0), 3),
            "state is key<fry>, which is not a plain number",
        ),
    ],
)
def test_states_that_cannot_be_kept(rows, message):
    def init(params, model_state=None):
        return PerClient(rows()) if rows else jnp.zeros(3)

    with pytest.raises(ValueError, match=message):
        ClientStore(Algorithm(init, fedavg, fedavg)).init(None)


def test_rows_that_change_their_type():
    algorithm = counting()

    def round(state, cohort):
        rows = jax.tree.map(lambda x: x.astype(jnp.float32), state["clients"].rows)
        return {**state, "clients": PerClient(rows)}, {}

    store = ClientStore(algorithm._replace(round=round))
    with pytest.raises(ValueError, match=r"has rows float32\[2\] .* expected 2 of int64\[\]"):
        store.round(store.init(None), cohort_of([0, 1]))
