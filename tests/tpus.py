"""TPUs for tests: meshes of devices that are only described, and what is compiled for them."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import fax
from fax import aggregators as a
from fax import algorithms

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


def require():
    """Skips a file's tests where the TPU compiler is not installed."""
    reason = "the TPU compiler is not installed: pip install 'fax-jax[tpu]'"
    pytest.importorskip("libtpu", reason=reason)


def mesh(kind=AUTO, *, name="v5e:2x2", slices=1, **axes):
    """A mesh of all devices of TPUs."""
    devices = fax.sharding.topology(name, slices=slices)
    return fax.sharding.make_mesh(devices=devices, axis_types=(kind,) * len(axes), **axes)


def shaped(shape, *spec, dtype="float32"):
    """An argument, laid out over the mesh in scope."""
    sharding = jax.NamedSharding(jax.sharding.get_mesh(), jax.P(*spec))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


# Every algorithm and every aggregator, on a small problem

N, FEATURES, CLASSES = 4, 6, 3
PARAMS = {"w": np.ones((FEATURES, CLASSES), np.float32), "b": np.zeros(CLASSES, np.float32)}
TWO = jax.tree.map(lambda x: np.stack([x, x + 1]), PARAMS)
SGD = optax.sgd(0.1)


def loss(params, batch, key):
    logits = batch["x"] @ params["w"] + params["b"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return losses, {"accuracy": logits.argmax(1) == batch["y"]}


def cohorts(clients=N, **options):
    """Rounds of clients with two batches each."""
    data = {
        str(i): {
            "x": np.ones((3 + i, FEATURES), np.float32),
            "y": np.zeros(3 + i, np.int32),
            "query": np.arange(3 + i) % 2 == 0,
            "domain": np.full(3 + i, i % 2, np.int32),
        }
        for i in range(N)
    }
    options = dict(max_steps=2, resident=False) | options
    return fax.data.cohorts(fax.data.InMemory(data), clients, 3, **options)


ALGORITHMS = {
    "agnostic_fedavg": lambda **own: algorithms.agnostic_fedavg(
        loss, SGD, num_domains=2, domain_learning_rate=0.1, **own
    ),
    "apfl": lambda **own: algorithms.apfl(loss, SGD, num_clients=N, **own),
    "branch_train_merge": lambda: algorithms.branch_train_merge(loss, SGD, replicas=N),
    "diloco": lambda **own: algorithms.diloco(loss, optax.adam(0.1), replicas=N, **own),
    "ditto": lambda **own: algorithms.ditto(loss, SGD, mu=0.1, num_clients=N, **own),
    "fedavg": lambda **own: algorithms.fedavg(loss, SGD, optax.adam(0.1), **own),
    "fedbn": lambda **own: algorithms.fedbn(loss, SGD, num_clients=N, layers="b", **own),
    "feddyn": lambda **own: algorithms.feddyn(loss, SGD, alpha=0.1, num_clients=N, **own),
    "fednova": lambda **own: algorithms.fednova(loss, SGD, algorithms.server_momentum(0.1), **own),
    "fedopt": lambda **own: algorithms.fedopt(loss, SGD, algorithms.server_adam(0.1), **own),
    "fedper": lambda **own: algorithms.fedper(loss, SGD, personal="b", num_clients=N, **own),
    "fedprox": lambda **own: algorithms.fedprox(
        loss, SGD, algorithms.server_yogi(0.1), mu=0.1, **own
    ),
    "hyp_cluster": lambda **own: algorithms.hyp_cluster(loss, SGD, num_clusters=2, **own),
    "local_sgd": lambda **own: algorithms.local_sgd(loss, SGD, replicas=N, **own),
    "maml": lambda **own: algorithms.maml(loss, SGD, algorithms.server_adagrad(0.1), **own),
    "mime": lambda **own: algorithms.mime(loss, optax.sgd(0.1, momentum=0.9), **own),
    "mime_lite": lambda **own: algorithms.mime_lite(loss, optax.adam(0.1), **own),
    "papa": lambda **own: algorithms.papa(loss, SGD, replicas=N, steps=1, **own),
    "papa_2": lambda: algorithms.papa_2(loss, SGD, replicas=N),
    "papa_all": lambda **own: algorithms.papa_all(loss, SGD, replicas=N, **own),
    "qfedavg": lambda **own: algorithms.qfedavg(loss, SGD, q=1, lipschitz=10, **own),
    "reptile": lambda **own: algorithms.reptile(loss, SGD, optax.sgd(0.5), **own),
    "scaffold": lambda **own: algorithms.scaffold(loss, 0.1, num_clients=N, **own),
    "streaming_diloco": lambda **own: algorithms.streaming_diloco(
        loss, SGD, replicas=N, steps=2, fragments=2, **own
    ),
}
ALONE = ("branch_train_merge", "papa_2")  # they take no aggregator
OF_REPLICAS = (*ALONE, "diloco", "local_sgd", "papa", "papa_all", "streaming_diloco")
AGGREGATORS = {
    "adaptive_clip": a.chain(a.adaptive_clip()),
    "clip_by_norm": a.chain(a.clip_by_norm(0.5)),
    "dp_ftrl": a.dp_ftrl(1.0, 0.5, num_clients=N, separation=2, participations=3),
    "drive": a.chain(a.drive()),
    "e3m0": a.chain(a.e3m0()),
    "e4m3": a.chain(a.e4m3()),
    "error_feedback": a.chain(a.error_feedback(a.top_k(3), num_clients=N)),
    "gaussian": a.gaussian(1.0, 0.5, quantile=0.5, count_noise=2.0),
    "geometric_median": a.geometric_median(),
    "hadamard": a.chain(a.hadamard(a.uniform_quantization(4))),
    "int8": a.chain(a.int8()),
    "krum": a.krum(0),
    "laplace": a.laplace(1.0, 0.5),
    "mean": a.mean(),
    "median": a.median(),
    "multi_krum": a.multi_krum(0, 2),
    "non_finite": a.chain(a.non_finite()),
    "power_sgd": a.power_sgd(1, num_clients=N),
    "secure_sum": a.secure_sum(4.0, 5, bits=20),
    "terngrad": a.chain(a.terngrad()),
    "top_k": a.chain(a.top_k(1, per=4, values=a.e3m0())),
    "trimmed_mean": a.trimmed_mean(count=1),
    "uniform_quantization": a.chain(a.uniform_quantization(4, entropy_coded=True)),
}


def a_round(algorithm, aggregator=None, **options):
    """The round of an algorithm, and its arguments. There must not be a mesh in scope."""
    own = {} if aggregator is None else {"aggregator": AGGREGATORS[aggregator]}
    made = ALGORITHMS[algorithm](**own)
    if algorithm in OF_REPLICAS:
        options = dict(placement="replicas", sampler="stream") | options
    state = made.init(TWO if algorithm == "hyp_cluster" else PARAMS)
    return made.round, (state, next(cohorts(**options)))
