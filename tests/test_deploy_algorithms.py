"""Plans of algorithms give what the jitted rounds give."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tpus
from deploys import DATA, FEDAVG, PARAMS, N, check_plan, cohort_of, loss, sgd

from fax import aggregators, algorithms, deploy

# What the server needs the rows of clients for, and so cannot be cut without pull=True.
OF_ROWS = {
    "papa_2": r"collect uses the rows of several clients, at .*_papa.py:\d+",
    "krum": r"collect uses the rows of several clients, at .*_krum.py:\d+",
    "multi_krum": r"collect uses the rows of several clients, at .*_krum.py:\d+",
    "median": r"collect uses the rows of several clients, at .*_robust.py:\d+",
    "trimmed_mean": r"collect uses the rows of several clients, at .*_robust.py:\d+",
}
# What clients keep between rounds.
STATE = ("clients", "members", "memory", "replicas")
# These, and those with tests of their own, cover what the others do: models of clusters, rows of an
# aggregator that stay, and two sums in a row. Rows of an algorithm stay in a test of Scaffold, and
# replicas in one of DiLoCo.
ALWAYS = {"hyp_cluster", "power_sgd", "papa_2", "median"}


@pytest.mark.always("secure sum")
@pytest.mark.parametrize("name", FEDAVG)
def test_federated_averaging(name):
    aggregator = FEDAVG[name] and FEDAVG[name]()
    algorithm = algorithms.fedavg(loss, sgd(), optax.adam(0.1), aggregator=aggregator)
    args = algorithm.init(PARAMS), cohort_of()
    plan, _ = check_plan(algorithm.round, args)
    statements = plan.audit().statements
    assert set(statements.values()) <= {"never", "only through sums over 4"}
    assert statements["[1].batches['x']"] == "only through sums over 4"


def test_state_of_clients_stays_there():
    algorithm = algorithms.scaffold(loss, 0.1, num_clients=N)
    cohort = cohort_of()
    args = algorithm.init(PARAMS), cohort
    clients = np.asarray(cohort.positions).tolist()
    plan, (state, _) = check_plan(algorithm.round, args, held=(*DATA, "clients"), clients=clients)
    assert all(isinstance(x, deploy.Held) for x in jax.tree.leaves(state.clients.rows))
    assert state.clients.rows["w"].clients == tuple(range(N))
    assert plan.audit().chosen["[0].clients.rows['w']"] == ("rows chosen by number",)
    with pytest.raises(ValueError, match=r"with different clients: .* Plan.run\(clients=\)"):
        plan.run(deploy.InProcess(), *args)
    with pytest.raises(deploy.CutError, match=r"scatter .* of state .* add its name to held="):
        deploy.cut(algorithm.round, *args)


@pytest.mark.long
def test_two_maps_in_a_round():
    algorithm = algorithms.mime(loss, optax.sgd(0.1, momentum=0.9))
    check_plan(algorithm.round, (algorithm.init(PARAMS), cohort_of()))


def test_replicas_in_a_scan():
    """Replicas stay with the clients between the parts of a round."""
    algorithm = algorithms.diloco(loss, sgd(), replicas=N, steps=2)
    cohort = cohort_of(clients=N, max_steps=4, sampler="stream", placement="replicas")
    args = algorithm.init(PARAMS), cohort
    plan, _ = check_plan(algorithm.round, args, held=(*DATA, "replicas"))
    assert 2 in {exchange.times for exchange in plan.audit().exchanges}


def test_rows_are_fetched_only_if_the_plan_may():
    algorithm = algorithms.fedavg(loss, sgd(), aggregator=aggregators.krum(1))
    args = algorithm.init(PARAMS), cohort_of(clients=5)
    with pytest.raises(deploy.CutError, match=r"rows of .*_krum.py:\d+.*pull=True"):
        deploy.cut(algorithm.round, *args)
    plan, _ = check_plan(algorithm.round, args, pull=True)
    assert plan.audit().statements["[1].batches['x']"] == "as rows"


def a_round(name):
    """A round of an algorithm, or of FedAvg with an aggregator, in float64, and what is held."""
    names = (name, None) if name in tpus.ALGORITHMS else ("fedavg", name)
    of_some = {} if name in tpus.OF_REPLICAS else {"clients": tpus.N - 1}
    fn, args = tpus.a_round(*names, **of_some)
    args = jax.tree.map(lambda x: np.float64(x) if x.dtype == np.float32 else x, args)
    shape = args[1].batches["x"].shape
    args[1].batches["x"] = np.random.default_rng(0).normal(size=shape)
    paths = [path for path, x in jax.tree_util.tree_flatten_with_path(args[0])[0] if x.ndim]
    fields = {getattr(key, "name", None) for path in paths for key in path}
    return fn, args, [*DATA, *fields.intersection(STATE)]


def each(names):
    return [pytest.param(x, marks=[] if x in ALWAYS else pytest.mark.long) for x in names]


@pytest.mark.parametrize("name", each([*tpus.ALGORITHMS, *tpus.AGGREGATORS]))
def test_every_algorithm(name):
    fn, args, held = a_round(name)
    if name in OF_ROWS:
        with pytest.raises(deploy.CutError, match=OF_ROWS[name]):
            deploy.cut(fn, *args, held=held)
        return
    clients = None
    if held != [*DATA] and name not in tpus.OF_REPLICAS:
        clients = np.asarray(args[1].positions).tolist()
    plan, _ = check_plan(fn, args, held=held, clients=clients)
    sums = f"only through sums over {args[1].num_examples.size}"
    assert {*plan.audit().statements.values()} <= {"never", sums}


# Loops and derivatives of rounds


def rates(name):
    """The loss of three rounds and its derivative, by the clients' learning rate."""
    algorithm = {
        "fedavg": lambda rate: algorithms.fedavg(loss, optax.sgd(rate)),
        "mime": lambda rate: algorithms.mime(loss, optax.sgd(rate, momentum=0.9)),
    }[name]
    start = algorithm(0.1).init(PARAMS)

    def total(rate, cohort):
        made = algorithm(rate)

        def again(state, _):
            state, metrics = made.round(state, cohort)
            return state, metrics["loss"]

        return jnp.sum(jax.lax.scan(again, start, None, length=3)[1])

    return jax.value_and_grad(total)


@pytest.mark.always("fedavg")
@pytest.mark.parametrize("name", ["fedavg", "mime"])
def test_derivatives_of_rounds(name):
    """By central differences, too."""
    cohort = cohort_of()
    plan, (_, slope) = check_plan(rates(name), (0.1, cohort))
    backend, step = deploy.InProcess(), 1e-5
    up, down = (plan.run(backend, 0.1 + sign * step, cohort)[0] for sign in (1, -1))
    np.testing.assert_allclose(slope, (up - down) / (2 * step), rtol=1e-6)


@pytest.mark.long
def test_rounds_in_processes():
    """Clients' state stays there, keys travel, and a derivative takes several stages."""
    names = ["scaffold", "diloco", "gaussian", "hyp_cluster", "streaming_diloco"]
    derivative = rates("fedavg"), (0.1, cohort_of()), DATA
    with deploy.Processes(2) as backend:
        for fn, args, held in [*map(a_round, names), derivative]:
            of_clients = "clients" in held
            clients = np.asarray(args[1].positions).tolist() if of_clients else None
            check_plan(fn, args, held=held, clients=clients, backend=backend)
