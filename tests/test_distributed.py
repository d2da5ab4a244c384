"""Several processes: real ones on this machine, which die, disagree, and compute together."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import pytest
from processes import ENV, EXAMPLES, ends, free_port, reports, running

import fax
from fax.sharding import _distributed, _peers

# Together


@pytest.fixture(scope="module")
def together():
    """One run of two processes with two devices each, for everything that goes well."""
    script = """
    start()
    twice = refused(start)
    from jax.sharding import AxisType, Mesh

    @fax.program(clients=8)
    def mean(params, x, keys):
        def client(params, x, key):
            return jnp.tanh(params * x).sum() + jax.random.normal(key)

        return fax.mean(fax.map(client, fax.broadcast(params), x, keys), weights=x[:, 0])

    x = np.arange(24.0, dtype=np.float32).reshape(8, 3) / 10
    keys = jax.device_get(jax.random.key_data(jax.random.split(jax.random.key(0), 8)))

    # In the mesh `mixed` neighbors along the axis are devices of different processes, and in
    # `shared` every row is on a device of both.
    devices = np.array(jax.devices())
    meshes = {
        "contiguous": fax.sharding.make_mesh(clients=4),
        "explicit": fax.sharding.make_mesh(clients=4, axis_types=AxisType.Explicit),
        "mixed": Mesh(devices.reshape(2, 2).T.reshape(4), "clients"),
        "model": Mesh(devices.reshape(2, 2), ("clients", "model")),
        "shared": Mesh(devices.reshape(2, 2).T, ("clients", "model")),
        "layout": Mesh(devices.reshape(2, 2).T, ("pod", "host")),
    }
    results = {}
    for name, mesh in meshes.items():
        axes = ("pod", "host") if name == "layout" else ("clients",)
        with jax.set_mesh(mesh), fax.sharding.layout(clients=axes):
            rows = fax.sharding.local_rows(8)
            data = {"x": x[rows], "keys": jax.random.wrap_key_data(keys[rows])}
            placed = fax.sharding.place(data, rows=rows)
            again = fax.sharding.place(data, "clients", n=8)
            value, gradient = jax.jit(jax.value_and_grad(mean))(
                jnp.float32(0.5), placed["x"], placed["keys"]
            )
            present = {i for s in placed["x"].addressable_shards for i in range(8)[s.index[0]]}
            same = [
                bool((np.asarray(s.data) == x[s.index]).all())
                for p in (placed, again)
                for s in p["x"].addressable_shards
            ]
            results[name] = dict(
                rows=rows.tolist(),
                present=sorted(present),
                same=all(same),
                shape=placed["x"].shape,
                spec=str(placed["x"].sharding.spec),
                value=float(value),
                gradient=float(gradient),
            )

    place, rows = fax.sharding.place, fax.sharding.local_rows
    errors = {"twice": twice, "no mesh": refused(place, x)}
    with jax.set_mesh(meshes["contiguous"]):
        mine = x[rows(8)]
        errors |= {
            "all rows": refused(place, x, n=8),
            "odd rows": refused(place, x[:3]),
            "rows of all": refused(place, x, rows=np.arange(8)),
            "rows of the other": refused(place, mine, rows=(rows(8) + 4) % 8),
            "rows in another order": refused(place, mine, rows=rows(8)[::-1]),
            "one has another n": refused(place, x[: 2 + 2 * me]),
            "one has another shape": refused(place, mine[:, : 1 + me]),
            "one is refused": refused(place, mine if me else x[:3]),
            "uneven": refused(rows, 7),
            "uneven place": refused(place, mine, n=7),
            "no axis": refused(place, mine, "sensors"),
            "placed": refused(place, placed["x"]),
        }
        full = place(np.ones((4, 2)) + jnp.zeros(2), n=8)  # computed under the mesh
    with jax.set_mesh(Mesh(devices[:2], "clients")):
        errors["mesh"] = refused(rows, 8)
    import socket
    try:  # another address of this machine
        elsewhere = str(socket.create_connection(("127.0.0.2", port), timeout=5))
    except OSError:
        elsewhere = None
    report(dict(results=results, errors=errors, full=full.shape, elsewhere=elsewhere))
    """
    return reports(script, 2)


EXPECTED_ROWS = {
    "contiguous": ([0, 1, 2, 3], [4, 5, 6, 7]),
    "explicit": ([0, 1, 2, 3], [4, 5, 6, 7]),
    "mixed": ([0, 1, 4, 5], [2, 3, 6, 7]),
    "model": ([0, 1, 2, 3], [4, 5, 6, 7]),
    "shared": ([0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7]),
    "layout": ([0, 1, 4, 5], [2, 3, 6, 7]),
}


@pytest.mark.parametrize("mesh", EXPECTED_ROWS)
def test_a_process_has_the_rows_that_it_loaded_and_no_others(together, mesh):
    for result, rows in zip((r["results"][mesh] for r in together), EXPECTED_ROWS[mesh]):
        assert result["rows"] == result["present"] == rows
        assert result["same"]
        assert result["shape"] == [8, 3]
        axes = "('pod', 'host')" if mesh == "layout" else "'clients'"
        assert result["spec"].endswith(f"({axes},)")


def test_processes_compute_what_a_single_one_computes(together):
    @fax.program(clients=8)
    def mean(params, x, keys):
        def client(params, x, key):
            return jnp.tanh(params * x).sum() + jax.random.normal(key)

        return fax.mean(fax.map(client, fax.broadcast(params), x, keys), weights=x[:, 0])

    with jax.enable_x64(False):
        x = jnp.arange(24.0).reshape(8, 3) / 10
        keys = jax.random.split(jax.random.key(0), 8)
        single = [float(v) for v in jax.value_and_grad(mean)(0.5, x, keys)]
    for process in together:
        for result in process["results"].values():
            assert [result["value"], result["gradient"]] == pytest.approx(single, rel=1e-5)


ERRORS = {
    "twice": "RuntimeError: fax.sharding.initialize was called a second time",
    "no mesh": "one of 2 processes and no mesh is in scope. Use jax.set_mesh",
    "all rows": "for n=8, expected 4: process {me} must pass those of participants {rows}",
    "odd rows": "tree has 3 rows, expected a multiple of 2, .* process {me} has 2 of the 4 dev",
    "rows of all": (
        "process 1 passed invalid rows. See its error message.",
        "rows are 0-7, but for n=16 process 1 .* 8-15.* Participant 0 belongs to process 0.",
    ),
    "rows of the other": (
        "rows are 4-7, but for n=8 process 0 .* 0-3, .* Participant 4 belongs to process 1.",
        "rows are 0-3, but for n=8 process 1 .* 4-7, .* Participant 0 belongs to process 0.",
    ),
    "rows in another order": "rows are .*, but for n=8 process {me} .* {rows}, in this order",
    "one has another n": (
        "process 0 has rows for n=4 participants, but process 1 for n=8",
        "process 1 has rows for n=8 participants, but process 0 for n=4",
    ),
    "one has another shape": (
        r"process 1 has different leaves.* process 0, which has tree: rows of float32\[1\].* pad",
        r"process 0 has different leaves.* process 1, which has tree: rows of float32\[2\].* pad",
    ),
    "one is refused": ("tree has 3 rows", "process 0 passed invalid rows"),
    "uneven": "7 participants cannot be divided evenly over the 4 devices along clients.* of 4",
    "uneven place": "7 participants cannot be divided evenly over the 4 devices along clients",
    "no axis": "the mesh in scope has the axes clients, but none for 'sensors'.*layout",
    "placed": "tree is already spread over several processes",
    "mesh": "the mesh in scope has no device of process 1. .*make_mesh",
}


@pytest.mark.parametrize("case", ERRORS)
def test_rows_that_do_not_fit_are_refused(together, case):
    assert together[0]["errors"].keys() == ERRORS.keys()
    for me, process in enumerate(together):
        wanted = ERRORS[case] if isinstance(ERRORS[case], str) else ERRORS[case][me]
        wanted = wanted.format(me=me, rows=("0-3", "4-7")[me])
        assert re.search(wanted, process["errors"][case])
        assert case == "twice" or process["errors"][case].startswith("PlacementError: ")


def test_what_was_computed_under_a_mesh_can_be_placed(together):
    assert [process["full"] for process in together] == [[8, 2], [8, 2]]


def test_nothing_listens_but_at_the_coordinators_address(together):
    """Not JAX either."""
    assert [process["elsewhere"] for process in together] == [None, None]


# One dies

ROUNDS = """
    start(heartbeat_timeout=10)

    @fax.program(clients=12)
    def total(x):
        return fax.sum(x)

    with jax.set_mesh(fax.sharding.make_mesh(clients=-1)):
        x = fax.sharding.place(np.ones(12 // count), n=12)
        run = jax.jit(total)
        for i in range(2000):
            run(x).block_until_ready()
            if i == 3 and me == {victim}:
                {how}
            time.sleep(0.01)
"""


@pytest.mark.always("1-raise KeyError('lost')-1-fax: process 1 failed with KeyError: 'lost'")
@pytest.mark.parametrize(
    ("victim", "how", "status", "message"),
    [
        pytest.param(
            *(1, "os.kill(os.getpid(), signal.SIGKILL)", -9, r"fax: process 1 .*died"),
            marks=pytest.mark.long,
        ),
        (0, "os.kill(os.getpid(), signal.SIGKILL)", -9, r"fax: process 0 died|leader task"),
        (1, "raise KeyError('lost')", 1, "fax: process 1 failed with KeyError: 'lost'"),
        pytest.param(
            *(0, "raise KeyError('lost')", 1, "fax: process 0 failed with KeyError: 'lost'"),
            marks=pytest.mark.long,
        ),
    ],
)
def test_when_a_process_dies_the_others_end_and_say_which(victim, how, status, message):
    with running(ROUNDS.format(victim=victim, how=how), 3) as processes:
        processes[victim].wait(timeout=60)
        statuses, _, errs = ends(processes)
    assert statuses.pop(victim) == status
    assert "lost" in errs.pop(victim) or status < 0
    for own, err in zip(statuses, errs):
        assert re.search(message, err)
        assert own in (_peers.EXIT_PEER_LOST, -signal.SIGABRT)


@pytest.mark.long
def test_when_a_process_stands_still_the_others_end_and_say_which():
    stop = "os.kill(os.getpid(), signal.SIGSTOP)"
    with running(ROUNDS.format(victim=1, how=stop), 3) as processes:
        errs = [processes[i].communicate(timeout=60)[1] for i in (0, 2)]
    assert any(re.search(r"unhealthy \(stopped sending heartbeats\):\s+1\b", err) for err in errs)
    for err in errs:
        assert re.search(r"fax: process 1 on \S+ (has sent no heartbeat|is not responding)", err)
        assert not re.search(r"process [02]( on \S+)? died", err)


# The start


def meeting(count, *numbers, timeout=20.0, counts=None, port=None):
    """What comes of it if processes with these numbers meet, here in threads."""
    port = port or free_port()
    results = {}

    def go(i):
        try:
            of = (counts or {}).get(i, count)
            results[i] = _peers.meet(f"localhost:{port}", of, numbers[i], timeout)
        except RuntimeError as error:
            results[i] = str(error)

    threads = [threading.Thread(target=go, args=(i,)) for i in range(len(numbers))]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    for watch in results.values():
        for peer in getattr(watch, "_peers", {}).values():
            peer.socket.close()
    return [results[i] for i in range(len(numbers))]


def test_processes_meet_in_any_order():
    assert all(isinstance(watch, _peers.Watch) for watch in meeting(4, 2, 3, 0, 1))


def test_processes_that_do_not_come_are_named_to_all():
    for message in meeting(4, 0, 2, timeout=0.5):
        assert "process 0 waited 0.5 s" in message
        assert "for 3 others, but processes 1, 3 did not connect" in message


def test_a_process_that_does_not_find_the_first_one_says_so():
    (message,) = meeting(2, 1, timeout=0.3)
    wanted = r"process 1 could not connect to process 0 at localhost:\d+ within 0.3 s"
    assert re.search(wanted, message)
    with socket.create_server(("", 0)) as other:  # somebody else, who says nothing
        (message,) = meeting(2, 1, timeout=0.3, port=other.getsockname()[1])
        assert "the server at this address did not answer as process 0 of this run" in message


def test_two_processes_with_one_number_are_refused():
    first, *others = meeting(3, 0, 1, 1)
    assert "two processes have process_id 1: one on" in first
    assert "its own process_id" in first
    assert any(first == other for other in others)


def test_processes_that_expect_different_numbers_are_refused():
    first, second = meeting(2, 0, 1, counts={1: 3})
    assert "has num_processes=3, but process 0 has num_processes=2" in first
    assert first == second


def test_a_port_that_is_taken_is_refused():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        (message,) = meeting(2, 0, port=port)
    assert f"process 0 cannot listen on port {port}" in message


def test_strangers_at_the_port_do_not_count():
    port = free_port()
    results = []
    thread = threading.Thread(
        target=lambda: results.append(_peers.meet(f"localhost:{port}", 2, 0, 20))
    )
    thread.start()
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"process": "1", "of": 2}\n', b""):
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("localhost", port)) as it:
                it.sendall(words)
                break
            time.sleep(0.02)
    other = _peers.meet(f"localhost:{port}", 2, 1, 20)
    thread.join()
    for watch in (other, *results):
        for peer in watch._peers.values():
            peer.socket.close()
    assert len(results) == 1


def test_initializing_without_all_that_is_needed_is_refused():
    (errors,) = reports(
        """
    initialize = fax.sharding.initialize
    found = {
        "nothing": refused(initialize),
        "no id": refused(initialize, f"localhost:{port}", 2),
        "no port": refused(initialize, "localhost", 2, 0),
        "id": refused(initialize, f"localhost:{port}", 2, 2),
        "count": refused(initialize, f"localhost:{port}", 0, 0),
        "type": refused(initialize, f"localhost:{port}", 2, "0"),
        "absent": refused(initialize, f"localhost:{port}", 2, 0, initialization_timeout=0.5),
    }
    os.environ["SLURM_NTASKS"], os.environ["SLURM_PROCID"] = "two", "0"
    os.environ["SLURM_STEP_NODELIST"] = "host"
    found["environment"] = refused(initialize)
    for name in ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST"):
        del os.environ[name]
    os.environ |= dict(JAX_COORDINATOR_ADDRESS=f"localhost:{port}", JAX_PROCESS_ID="0")
    os.environ["JAX_NUM_PROCESSES"] = "1"
    initialize()  # what was refused has left nothing behind
    found["count of processes"] = jax.process_count()
    found["rows"] = fax.sharding.local_rows(3).tolist()
    report(found)
    """,
        1,
    )
    assert errors.pop("count of processes") == 1
    assert errors.pop("rows") == [0, 1, 2]
    wanted = {
        "nothing": "coordinator_address and num_processes and process_id is neither passed nor "
        "found in the environment.* srun or mpiexec. A single process needs none",
        "no id": "process_id is neither passed nor .* where coordinator_address='localhost:.*2",
        "no port": "coordinator_address is 'localhost', expected the host and port of process 0",
        "id": "process_id is 2, expected an int from 0 to 1, because num_processes is 2",
        "count": "num_processes is 0, expected an int of at least 1",
        "type": "process_id is '0', expected an int",
        "absent": "process 0 waited 0.5 s .* but process 1 did not connect",
        "environment": "the environment has SLURM_NTASKS='two', expected an int",
    }
    assert errors.keys() == wanted.keys()
    for case, message in wanted.items():
        kind = "RuntimeError" if case == "absent" else "ValueError"
        assert re.match(f"{kind}: fax.sharding.initialize: .*{message}", errors[case], re.DOTALL)


def test_initializing_after_jax_was_used_is_refused():
    jax.devices()
    with pytest.raises(RuntimeError, match="called after JAX had been used"):
        fax.sharding.initialize("localhost:1", 2, 0)


SLURM = {
    "SLURM_JOB_ID": "5000",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
OMPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
PORT = 61440 + 5000 % 4096


@pytest.mark.parametrize(
    ("env", "found"),
    [
        ({}, (None, None, None, None)),
        ({"JAX_PROCESS_ID": "1"}, (None, None, 1, None)),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
            ("a:1", 2, 0, None),
        ),
        (SLURM, (None, None, None, None)),  # the script of a job, not a step
        (SLURM | {"SLURM_STEP_NODELIST": "node7"}, (f"node7:{PORT}", 4, 3, 1)),
        (SLURM | {"SLURM_STEP_NODELIST": "n7,other3"}, (f"n7:{PORT}", 4, 3, 1)),
        (SLURM | {"SLURM_STEP_NODELIST": "n-a[007,010-12],b3"}, (f"n-a007:{PORT}", 4, 3, 1)),
        (SLURM | {"SLURM_STEP_NODELIST": "n[07-12]-ib,b[1-3]"}, (f"n07-ib:{PORT}", 4, 3, 1)),
        (
            SLURM | {"SLURM_STEP_NODELIST": "n[7-9]", "JAX_COORDINATOR_PORT": "99"},
            ("n7:99", 4, 3, 1),
        ),
        (OMPI, (None, 4, 2, 0)),
        (OMPI | {"JAX_COORDINATOR_ADDRESS": "a:1"}, ("a:1", 4, 2, 0)),
        (
            OMPI | {"OMPI_MCA_orte_hnp_uri": "20480000.0;tcp://10.1.0.1,10.2.0.1:34911"},
            (f"10.1.0.1:{PORT}", 4, 2, 0),
        ),
        (
            OMPI | {"OMPI_MCA_orte_hnp_uri": "20480000.0;tcp6://[fe80::b9b,::1]:34911"},
            (f"[fe80::b9b]:{PORT}", 4, 2, 0),
        ),
        (
            OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "JAX_COORDINATOR_PORT": "99"},
            ("localhost:99", 4, 2, 0),
        ),
        (MPICH | {"JAX_COORDINATOR_PORT": "99"}, ("localhost:99", 2, 1, 1)),
        (MPICH | {"PMI_SIZE": "8"}, (None, 8, 1, 1)),
        # mpiexec in a job of Slurm, with one step for each host
        (
            MPICH | SLURM | {"PMI_SIZE": "8", "SLURM_STEP_NODELIST": "n[1-4]"},
            (f"n1:{PORT}", 8, 1, 1),
        ),
    ],
)
def test_launchers_are_recognized_by_the_environment(env, found):
    assert _distributed.find(env) == found


def test_processes_of_one_job_agree_on_a_port():
    ranks = [MPICH | {"PMI_RANK": str(i), "MPI_LOCALRANKID": str(i)} for i in range(2)]
    first, second = (_distributed.find(env | {"PMIX_NAMESPACE": "job"}) for env in ranks)
    assert first.address == second.address
    assert first.address != _distributed.find(ranks[0] | {"PMIX_NAMESPACE": "other"}).address


# The example


def example(*options):
    return [sys.executable, str(EXAMPLES / "multiprocess.py"), *options]


@pytest.mark.docs
def test_the_example_trains_in_several_processes_as_in_one():
    """Compiled as users do: the tests' own flags round differently for other numbers of rows."""
    done = subprocess.run(
        example("--processes=2", "--rounds=20", "--check"),
        env={**ENV, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for process in range(2):
        assert re.search(rf"process {process} of 2, .*: 24 of 48 clients on 2 dev", done.stdout)
    (accuracy,) = re.findall(r"test accuracy ([\d.]+)% after 20 rounds in 2 proc", done.stdout)
    assert float(accuracy) > 85
    (difference,) = re.findall(r"largest difference from a single process (\S+)", done.stdout)
    assert 0 <= float(difference) < 1e-5


@pytest.mark.long
def test_the_example_says_which_process_died():
    command = example("--processes=2", "--devices-per-process=1", "--rounds=100000")
    with subprocess.Popen(
        command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        printed = ""
        while not (found := re.search(r"process 1 of 2, pid (\d+)", printed)):
            line = run.stdout.readline()
            assert line, run.stderr.read()
            printed += line
        time.sleep(1)
        os.kill(int(found[1]), signal.SIGKILL)
        out, err = run.communicate(timeout=60)
    assert run.returncode == 1
    assert "process 1 died of signal 9" in out
    assert "fax: process 1" in err
