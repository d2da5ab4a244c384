"""The skeleton of federated algorithms; each algorithm adds what its clients and server do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

import fax
from fax import _arguments, _functions
from fax._notes import called
from fax.aggregators import Aggregator, PerClient
from fax.aggregators._aggregator import bits_of_a_row
from fax.aggregators._per_client import all_finite, each, rows_after
from fax.algorithms._algorithm import Algorithm
from fax.algorithms._averaging import aggregate, averaged, mean_state, strong
from fax.algorithms._checks import (
    arguments,
    check_averaged_state,
    check_like,
    check_private,
    guarded,
)
from fax.algorithms._clients import gather_rows, repeated, scatter_rows
from fax.algorithms._exchange import ClientResult, Received, Server, State
from fax.algorithms._metrics import report
from fax.algorithms._personal import (
    PersonalLoss,
    bare,
    everyones,
    put,
    split,
    with_parts,
    without_parts,
)
from fax.data import Client, Cohort
from fax.metrics import Statistic

PyTree = Any


def federated(
    name: str,
    loss: Callable,
    client: Callable[[Server, PyTree, Client], ClientResult],
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    server: Callable[..., tuple[State, dict[str, jax.Array]]] | None = None,
    server_state: Callable[[PyTree], PyTree] | None = None,
    client_state: Callable[[PyTree], PyTree] | None = None,
    num_clients: int | None = None,
    first: Callable[[Server, PyTree, Client], PyTree] | None = None,
    models: Callable[[State], PyTree] | None = None,
    params: Callable[[State], PyTree] | None = None,
    not_private: str | None = None,
    aggregator: Aggregator | None = None,
    vectorize: int | None = None,
) -> Algorithm:
    """Makes an algorithm from what its clients and its server do in a round.

    In a round every client of the cohort runs ``client``, the aggregator combines their updates
    into one update D, and the server takes a step:

        x' = server_optimizer(x, gradient = -D)

    This function does everything else. It looks up the rows of the clients' state and writes them
    back, derives random keys, weights and aggregates the updates, averages the metrics, and checks
    what users pass. Gradients of a round do not store local steps. The algorithm works with every
    aggregator, on every mesh, with `ClientStore` and with `many_rounds`, and it can be
    differentiated with respect to what ``client`` and ``server`` close over. See
    docs/your_own_algorithm.md for a worked example.

    Args:
      name: the name of the algorithm, for error messages.
      loss: see `fedavg`.
      client: ``client(server, own, data) -> ClientResult``. It gets a `Server`, the client's own
        state (None without ``client_state``) and its batches, a `fax.data.Client`. `local_steps`
        does the usual training.
      server_optimizer: from optax. Default: ``optax.sgd(1.0)``, which adds the update.
      server: ``server(state, received, step) -> (state, metrics)``, if the server does more than
        this step. ``step(update)`` returns the state after a step along ``update`` instead of D.
        The function runs in the round's program, so it can reduce ``received.results``, for example
        with `fax.mean`. Its metrics are added to those of the clients.
      server_state: ``server_state(params)``, the initial value of what else the server keeps.
      client_state: ``client_state(params)``, the initial value of what each client keeps.
      num_clients: the number of clients in the data, ``len(data)``. Required by ``client_state``.
      first: ``first(server, own, data)``, what clients send before they train. Its mean, weighted
        by the numbers of examples, is ``server.first`` when they do.
      models: ``models(state)``, if the algorithm has several models; see `Algorithm`.
      params: ``params(state)``, the one model. Default: ``state.params``.
      not_private: what clients send besides updates, if anything, as the reason in the error for a
        private aggregator. If they send ``extra`` or ``first``, it is refused in any case.
      aggregator: from `fax.aggregators`; it computes D. Default: the mean, weighted by the numbers
        of examples, or by the results' ``weight``.
      vectorize: the number of clients that a device works on at once; see `fedavg`.

    Returns:
      The algorithm. ``init(params, model_state=None)`` makes its `State`.

    Raises:
      ValueError: if an argument is invalid. The functions of the algorithm raise the same errors
        as those of `fedavg`, and one if ``client`` does not return a `ClientResult`.

    Example:

      Clients add half of their last update to the next one.

      >>> import optax
      >>> from fax import algorithms
      >>> loss = lambda params, batch, key: (batch["x"] - params) ** 2 / 2
      >>> def client(server, last, data):
      ...     trained = algorithms.local_steps(loss, optax.sgd(0.1), server.params, data)
      ...     update = trained.params - server.params + last / 2
      ...     return algorithms.ClientResult(update, trained.metrics, own=update)
      >>> algorithm = algorithms.federated(
      ...     "remembering", loss, client, client_state=jnp.zeros_like, num_clients=2
      ... )
      >>> data = fax.data.InMemory({"ann": {"x": jnp.ones(4)}, "bob": {"x": jnp.zeros(4)}})
      >>> rounds = fax.data.cohorts(data, clients=2, batch_size=2)
      >>> state, metrics = algorithm.round(algorithm.init(jnp.ones(())), next(rounds))
      >>> print(state.params, state.clients.rows)
      0.905 [ 0.   -0.19]
    """
    _arguments.text("fax.algorithms.federated", "name", name, "the name of the algorithm")
    _functions.function(name, "client", client, {3: "client(server, own, data)"})
    for argument, fn, count, form in (
        ("server", server, 3, "server(state, received, step)"),
        ("server_state", server_state, 1, "server_state(params)"),
        ("client_state", client_state, 1, "client_state(params)"),
        ("first", first, 3, "first(server, own, data)"),
        ("models", models, 1, "models(state)"),
        ("params", params, 1, "params(state)"),
    ):
        if fn is not None:
            _functions.function(name, argument, fn, {count: form})
    if client_state is not None:
        if num_clients is None:
            raise ValueError(
                f"{name}: num_clients is None, expected an int of at least 1, because each client "
                "has a state. Pass num_clients=len(data)."
            )
        num_clients = _arguments.count(name, "num_clients", num_clients)
    elif num_clients is not None:
        raise ValueError(
            f"{name}: num_clients is {num_clients!r:.80}, but clients have no state. Pass "
            "client_state=, or leave out num_clients."
        )
    if isinstance(loss, PersonalLoss) and num_clients not in (None, loss.num_clients):
        raise ValueError(
            f"{name}: num_clients is {num_clients}, but that of personal_parts is "
            f"{loss.num_clients}. Both are the number of clients in the data."
        )
    server_optimizer = optax.sgd(1.0) if server_optimizer is None else server_optimizer
    aggregator = arguments(name, loss, aggregator, vectorize, server_optimizer=server_optimizer)
    if not_private is not None:
        _arguments.text(name, "not_private", not_private, "what clients send besides updates")
        check_private(name, aggregator, not_private)

    def kept(params: PyTree) -> list[PyTree]:
        return [None if fn is None else fn(params) for fn in (server_state, client_state)]

    def init(params: PyTree, model_state: PyTree = None) -> State:
        params, model_state = jax.tree.map(strong, (params, model_state))
        params, model_state, personal = split(loss, params, model_state)
        check_averaged_state(name, aggregator, model_state)
        own = None if aggregator is None else aggregator.init(params)
        of_server, row = jax.tree.map(strong, kept(params))
        rows = None
        if num_clients is not None and client_state is not None:
            rows = PerClient(repeated(row, num_clients))
        optimizer = server_optimizer.init(params)
        return State(params, optimizer, model_state, own, of_server, rows, personal)

    def checked_client(sent: Server, own: PyTree, data: Client) -> ClientResult:
        result = client(sent, own, data)
        if not isinstance(result, ClientResult):
            raise ValueError(
                f"{name}: client returned {_arguments.shown(result)}, expected a "
                "fax.algorithms.ClientResult."
            )
        _check_metrics(f"{name}: client", result.metrics, statistics=True)
        if own is None and result.own is not None:
            raise ValueError(
                f"{name}: client returned own, but clients have no state. Pass client_state= and "
                "num_clients=, or leave out own."
            )
        if own is not None and result.own is None:
            raise ValueError(
                f"{name}: client: own is None, expected what the client keeps. Return "
                "ClientResult(..., own=...), as client_state returned it at first."
            )
        check_like(f"{name}: client: own", result.own, own)
        # A server function may compute the next state itself, from what clients send as ``extra``.
        if result.model_state is not None or server is None:
            check_like(f"{name}: client: model_state", result.model_state, sent.model_state)
        return result

    def checked_server(made: Any, state: State) -> tuple[State, dict[str, jax.Array]]:
        pair = isinstance(made, tuple | list) and len(made) == 2
        if not pair or not isinstance(made[0], State) or not isinstance(made[1], Mapping):
            raise ValueError(
                f"{name}: server returned {_arguments.shown(made)}, expected a pair of a "
                "fax.algorithms.State and a dict of metrics."
            )
        check_like(f"{name}: server: the state", made[0], state)
        _check_metrics(f"{name}: server", made[1], statistics=False)
        return made[0], dict(made[1])

    def round(state: State, cohort: Cohort) -> tuple[State, dict[str, jax.Array]]:
        expected: Any = jax.tree.structure(jax.eval_shape(kept, state.params))
        rows = None if state.clients is None else state.clients.rows
        same = expected == jax.tree.structure([state.server, rows])
        if not same or (state.personal is None) == isinstance(loss, PersonalLoss):
            raise ValueError(
                f"{name}: round got the State of another algorithm, or one without the clients' "
                "rows, expected the State that init(params) or the last round returned."
            )

        @fax.program(clients=cohort.size)
        def work(state: State, cohort: Cohort) -> tuple[State, dict[str, jax.Array]]:
            own = None if state.clients is None else state.clients.rows
            parts = None if state.personal is None else state.personal.clients.rows
            examples = cohort.num_examples
            data, at_once = cohort.clients(), vectorize or cohort.vectorize

            def at_clients(fn: Callable, sent: Server) -> Any:
                def run(sent: Server, parts: PyTree, own: PyTree, data: Client) -> Any:
                    model_state = with_parts(loss, sent.model_state, parts)
                    return fn(sent._replace(model_state=model_state), own, data)

                # Under jax.checkpoint gradients of a round do not store steps.
                run, sent = jax.checkpoint(run), fax.broadcast(sent)
                return fax.map(run, sent, parts, own, data, vectorize=at_once)

            def trained(sent: Server, own: PyTree, data: Client) -> tuple[ClientResult, PyTree]:
                result = checked_client(sent, own, data)
                model_state, parts = without_parts(loss, result.model_state)
                return result._replace(model_state=model_state), parts

            sent, answers = Server(state.params, state.model_state, state.server), None
            if first is not None:
                answers = at_clients(first, sent)
                sent = sent._replace(first=fax.mean(answers, weights=examples))
            results, new_parts = at_clients(trained, sent)
            if first is not None or results.extra is not None:
                check_private(name, aggregator, "clients send more than updates to the server")
            update, aggregated, more = aggregate(
                aggregator, results.update, state.aggregator, cohort, results.weight
            )
            if "clients/bits" in more:  # those of the updates
                others = answers, results.extra, averaged(results.model_state)
                more = {**more, "clients/bits": more["clients/bits"] + bits_of_a_row(others)}
            # Clients that `fax.aggregators.non_finite` drops keep their rows.
            finite = each(all_finite, results.update)

            def next_rows(new: PyTree, old: PyTree) -> PerClient:
                return PerClient(rows_after(finite, new, old))

            def step(update: PyTree) -> State:
                check_like(f"{name}: the update", update, state.params)
                gradient = optax.tree.scale(-1, update)
                moves, optimizer = called(
                    "server_optimizer",
                    "update",
                    server_optimizer.update,
                    gradient=gradient,
                    state=state.optimizer,
                    params=state.params,
                )
                return State(
                    optax.apply_updates(state.params, moves),
                    optimizer,
                    mean_state(results.model_state, state.model_state, examples, finite),
                    aggregated,
                    state.server,
                    state.clients and next_rows(results.own, own),
                    state.personal and state.personal._replace(clients=next_rows(new_parts, parts)),
                )

            metrics = {**report(results.metrics), **more}
            if server is None:
                return step(update), metrics
            received = Received(update, results, sent.first, cohort, finite)
            after, more = checked_server(server(state, received, step), state)
            return after, {**metrics, **more}

        after, metrics = work(gather_rows(state, cohort), cohort)
        return scatter_rows(state, after, cohort), metrics

    def whole(state: State) -> PyTree:
        found = state.params if params is None else params(state)
        return found if state.personal is None else put(found, state.personal.start.params)

    def with_personal(state: State) -> PyTree:
        assert state.personal is not None
        rows = state.personal.clients.rows
        own = everyones(state.params, rows) if models is None else models(state)
        return put(own, rows.params)

    every = with_personal if isinstance(loss, PersonalLoss) else models
    return guarded(name, bare(loss), State, init, round, whole, every)


def _check_metrics(where: str, metrics: Any, *, statistics: bool) -> None:
    """Checks the metrics of a client, which may be statistics, or those of the server."""
    or_statistics = " or statistics, such as fax.metrics.Mean" if statistics else ""
    named = isinstance(metrics, Mapping) and all(isinstance(name, str) for name in metrics)
    if not named:
        raise ValueError(
            f"{where}: metrics is {_arguments.shown(metrics)}, expected a dict from names to "
            f"arrays{or_statistics}."
        )
    for name, value in metrics.items():
        known = isinstance(value, Statistic)
        if not (known and statistics) and _arguments.dtype_of(value) is None:
            raise ValueError(
                f"{where}: metrics[{name!r}] is {_arguments.shown(value)}, expected an array."
                f"{' Call its result().' if known else ''}"
            )
