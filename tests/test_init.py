"""What init returns: memory of its own, on the devices of the mesh in scope."""

import functools

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import fax
from fax import aggregators, algorithms

SGD = optax.sgd(0.1)
# Its state is the parameters themselves, of which some algorithms warn.
KEEPING = optax.GradientTransformation(
    lambda params: params, lambda g, state, params=None: (g, state)
)
COPIES = pytest.mark.filterwarnings("ignore:.*inner_optimizer has a copy of the parameters")
pytestmark = COPIES
MODELS = {"w": np.array([[0.5, 1.0], [1.5, 2.0]]), "b": np.arange(2.0)}


def loss(params, batch, key):
    return (batch["x"] - params["w"].sum() - params["b"]) ** 2


def loss_of_state(params, model_state, batch, key):
    return loss(params, batch, key), {}, model_state


ALGORITHMS = {
    "fedavg": lambda loss: algorithms.fedavg(loss, SGD, KEEPING),
    "power_sgd": lambda loss: algorithms.fedavg(
        loss, SGD, optax.adam(0.1), aggregator=aggregators.power_sgd(1, num_clients=2)
    ),
    "fedprox": lambda loss: algorithms.fedprox(loss, SGD, KEEPING, mu=0.1),
    "fednova": lambda loss: algorithms.fednova(loss, SGD, KEEPING),
    "feddyn": lambda loss: algorithms.feddyn(loss, SGD, KEEPING, alpha=0.1, num_clients=2),
    "qfedavg": lambda loss: algorithms.qfedavg(loss, SGD, KEEPING, q=1, lipschitz=10),
    "fedper": lambda loss: algorithms.fedper(loss, SGD, KEEPING, personal="b", num_clients=2),
    "ditto": lambda loss: algorithms.ditto(loss, SGD, KEEPING, mu=0.1, num_clients=2),
    "scaffold": lambda loss: algorithms.scaffold(loss, 0.1, num_clients=2),
    "mime": lambda loss: algorithms.mime(loss, KEEPING),
    "mime_lite": lambda loss: algorithms.mime_lite(loss, KEEPING),
    "maml": lambda loss: algorithms.maml(loss, SGD, KEEPING),
    "agnostic_fedavg": lambda loss: algorithms.agnostic_fedavg(
        loss, SGD, KEEPING, num_domains=2, domain_learning_rate=0.1
    ),
    "apfl": lambda loss: algorithms.apfl(loss, SGD, KEEPING, num_clients=2),
    "hyp_cluster": lambda loss: algorithms.hyp_cluster(loss, SGD, KEEPING, num_clusters=2),
    "diloco": lambda loss: algorithms.diloco(loss, KEEPING, KEEPING, replicas=2),
    "local_sgd": lambda loss: algorithms.local_sgd(loss, KEEPING, replicas=1),
    "streaming_diloco": lambda loss: algorithms.streaming_diloco(
        loss, KEEPING, KEEPING, replicas=2, steps=2, fragments=2
    ),
    "papa": lambda loss: algorithms.papa(loss, KEEPING, replicas=2),
    "papa_2": lambda loss: algorithms.papa_2(loss, KEEPING, replicas=2),
    "branch_train_merge": lambda loss: algorithms.branch_train_merge(loss, KEEPING, replicas=2),
}


def given(name):
    """The params as users have them: of a model, or of two."""
    return MODELS if name == "hyp_cluster" else {"w": MODELS["w"][0], "b": MODELS["b"][0]}


@functools.partial(jax.jit, donate_argnums=0)
def spend(state):
    """What a jitted round does to the memory of the state that it is given."""
    return jax.tree.map(lambda x: x | x if x.dtype == bool else x + x, state)


@pytest.mark.always(
    "fedavg",
    "power_sgd",
    "scaffold",
    "maml",
    "hyp_cluster",
    "diloco",
    "streaming_diloco",
    "papa",
    "branch_train_merge",
)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_state_that_is_donated_takes_nothing_with_it(name):
    algorithm = ALGORITHMS[name](loss_of_state)
    arrays = given(name)
    state_of_model = {"mean": MODELS["b"] if name == "hyp_cluster" else MODELS["w"]}
    mine = jax.tree.map(jnp.asarray, (arrays, state_of_model))
    for init in (algorithm.init, jax.jit(algorithm.init)):
        for params in (mine, (arrays, state_of_model)):
            state = init(*params)
            spend(state)  # JAX refuses to donate an array twice
            assert all(x.is_deleted() for x in jax.tree.leaves(state))
    assert not any(x.is_deleted() for x in jax.tree.leaves(mine))
    for found in (mine, (arrays, state_of_model)):
        jax.tree.map(np.testing.assert_array_equal, found, (given(name), state_of_model))


@pytest.mark.always(
    "fedavg-explicit",
    "power_sgd-auto",
    "scaffold-auto",
    "maml-explicit",
    "hyp_cluster-auto",
    "diloco-explicit",
    "streaming_diloco-auto",
    "papa-auto",
    "branch_train_merge-explicit",
    "ditto-auto",
)
@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_state_is_on_the_mesh_in_scope(name, kind):
    params = jax.tree.map(jnp.asarray, given(name))  # before there is a mesh
    with jax.set_mesh(meshes.mesh(kind, clients=2)), fax.sharding.layout(replicas="clients"):
        state = ALGORITHMS[name](loss).init(params)
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        assert x.sharding.device_set == set(jax.devices()[:2]), (path, x.sharding)


def test_a_round_is_compiled_once_for_params_that_are_older_than_the_mesh():
    params = {"w": jnp.zeros(3), "b": jnp.zeros(())}
    data = fax.data.InMemory({name: {"x": np.ones(3, np.float32)} for name in ("ann", "bob")})
    algorithm = algorithms.fedavg(loss, SGD, optax.adam(0.1))
    with jax.set_mesh(meshes.mesh(clients=2)):
        cohort = next(fax.data.cohorts(data, 2, 3))
        state, train = algorithm.init(params), jax.jit(algorithm.round, donate_argnums=0)
        for _ in range(2):
            state, _ = train(state, cohort)
    assert train._cache_size() == 1
    assert not params["w"].is_deleted()


def test_init_within_a_transformation():
    def start(mu):
        algorithm = algorithms.fedprox(loss, SGD, optax.adam(0.1), mu=mu)
        return mu * algorithm.init({"w": np.ones(3), "b": 1.0}).params["w"].sum()

    assert jax.grad(start)(2.0) == 3.0
    np.testing.assert_array_equal(jax.vmap(start)(jnp.arange(3.0)), [0.0, 3.0, 6.0])


def test_shardings_of_params_are_kept():
    with jax.set_mesh(meshes.mesh(clients=2, model=2)):
        sharding = NamedSharding(jax.sharding.get_mesh(), PartitionSpec("model"))
        params = {"w": jax.device_put(jnp.arange(4.0), sharding), "b": jnp.zeros(())}
        state = algorithms.fedavg(loss, SGD, optax.adam(0.1)).init(params)
    assert state.params["w"].sharding == sharding
    np.testing.assert_array_equal(state.params["w"], np.arange(4.0))
