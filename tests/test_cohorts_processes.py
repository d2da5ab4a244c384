"""Cohorts in several processes, each of which reads its own clients; and CPU devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import reports

import fax

TRAINING = """
import optax
from jax.sharding import NamedSharding, PartitionSpec
from fax.algorithms import fedavg, many_rounds

class Watched:
    "Says which clients were read."

    def __init__(self):
        self.read = set()
        self.sizes = [3 + i % 5 for i in range(24)]

    def client_ids(self):
        return list(range(24))

    def __len__(self):
        return 24

    def num_examples(self, client_id):
        return self.sizes[client_id]

    def client(self, client_id):
        self.read.add(client_id)
        n = self.sizes[client_id]
        return {"x": np.float32(client_id) + np.arange(n, dtype=np.float32)}

loss = lambda params, batch, key: (batch["x"] - params) ** 2
algorithm = fedavg(loss, optax.sgd(0.1))
found = {}
with jax.set_mesh(fax.sharding.make_mesh(clients=-1)):
    for resident in (False, True) if count > 1 else (False,):
        data = Watched()
        rounds = fax.data.cohorts(data, 8, 4, resident=resident, seed=1)
        state, losses, members = algorithm.init(jnp.float32(0)), [], []
        train = jax.jit(algorithm.round)
        everywhere = NamedSharding(jax.sharding.get_mesh(), PartitionSpec())
        gather = jax.jit(lambda x: x, out_shardings=everywhere)
        for _ in range(6):
            cohort = next(rounds)
            members.append(np.asarray(gather(cohort.positions)).tolist())
            state, metrics = train(state, cohort)
            losses.append(float(metrics["loss"]))
        kept = {"own": sorted(data.read), "members": members, "losses": losses}
        kept["params"], kept["is"] = float(state.params), rounds.resident
        if resident:
            state, metrics = many_rounds(algorithm, state, rounds, 3)
            kept["more"] = [float(loss) for loss in metrics["loss"]]
        rounds.close()
        found[str(resident)] = kept
report(found)
"""


@pytest.fixture(scope="module")
def runs():
    alone: list[dict] = []
    names = {"jax": jax, "jnp": jnp, "np": np, "fax": fax, "count": 1, "report": alone.append}
    with jax.enable_x64(False):
        exec(TRAINING, names)
    return reports("start()" + TRAINING, 2), alone


def test_processes_train_what_one_process_trains(runs):
    (first, second), (alone,) = runs
    for key in ("members", "losses", "params", "is"):
        assert first["False"][key] == second["False"][key]
    assert not first["False"]["is"]
    np.testing.assert_allclose(first["False"]["losses"], alone["False"]["losses"], rtol=1e-5)
    np.testing.assert_allclose(first["False"]["params"], alone["False"]["params"], rtol=1e-5)
    everybody = [sorted(cohort) for cohort in first["False"]["members"]]
    assert everybody == [sorted(cohort) for cohort in alone["False"]["members"]]


def test_processes_hold_their_own_clients(runs):
    (first, second), _ = runs
    own = [set(run["True"]["own"]) for run in (first, second)]
    # Everybody reads the first client, to see what examples look like.
    assert (own[0] | own[1]) == set(range(24))
    assert (own[0] & own[1]) <= {0}
    for cohort in first["True"]["members"]:
        assert len(set(cohort)) == 8
        assert set(cohort[:4]) <= own[0]
        assert set(cohort[4:]) <= own[1]
    assert len({client for cohort in first["True"]["members"] for client in cohort}) > 16
    for key in ("members", "losses", "params", "more", "is"):
        assert first["True"][key] == second["True"][key]
    assert first["True"]["is"]
    assert len(first["True"]["more"]) == 3


CPU = """
import os, json
import fax
{before}
import jax
try:
    mesh = fax.sharding.use_cpu_devices({arguments})
    made = [len(jax.devices()), dict(mesh.shape), os.environ.get("XLA_FLAGS", "")]
except ValueError as error:
    made = str(error)
print("REPORT", json.dumps(made))
"""


def cpu(arguments="", before=""):
    (made,) = reports(CPU.format(arguments=arguments, before=before), 1)
    return made


def test_cores_become_devices():
    count, shape, flags = cpu("3, 'pods'")
    assert (count, shape) == (3, {"pods": 3})
    assert "--xla_cpu_multi_thread_eigen=false" in flags
    count, shape, _ = cpu()
    assert shape == {"clients": count}


@pytest.mark.long
def test_cores_cannot_become_devices_twice():
    early = "import jax; jax.config.update('jax_num_cpu_devices', 2); jax.devices()"
    assert "JAX has already set up 2 CPU devices, expected 3" in cpu("3", early)
    assert cpu("2", early)[1] == {"clients": 2}
    assert "count is 0, expected an int of at least 1" in cpu("0")
