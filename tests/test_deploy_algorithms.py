"""Plans of algorithms give what the jitted rounds give."""

import jax
import numpy as np
import optax
import pytest
from deploys import DATA, FEDAVG, PARAMS, N, check_plan, cohort_of, loss, sgd

from fax import aggregators, algorithms, deploy


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
    with pytest.raises(ValueError, match="rows that are with different clients"):
        plan.run(deploy.InProcess(), *args)


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
