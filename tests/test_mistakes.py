"""Mistakes of users: each is refused where it is made, in words that say how to fix it."""

import functools
import importlib
import re
import sys

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import pandas
import pytest
from flax import linen, nnx
from jax.sharding import PartitionSpec

import fax
from fax import _extras, aggregators, algorithms, data, metrics

SGD = optax.sgd(0.1)
PARAMS = {"w": jnp.zeros(3)}
MODEL = fax.models.create("dense", sizes=(3, 2))
ACCURACY = {"accuracy": metrics.Accuracy()}


def loss(params, batch, key):
    return (batch["x"] - params["w"].sum()) ** 2


def loss_of_state(params, model_state, batch, key):
    return loss(params, batch, key), {}, model_state


def five(params, model_state, batch, key, more):
    return loss(params, batch, key)


def apply(params, batch):
    return batch["x"][:, None] * params["w"]


def module():
    return nnx.Linear(3, 2, rngs=nnx.Rngs(0))


class WithConstant(nnx.Module):
    def __init__(self, rngs):
        self.out = nnx.Linear(3, 2, rngs=rngs)
        self.scale = jnp.ones(3)


class HalfOfData:
    """Two of the four methods of federated data."""

    def client_ids(self):
        return ("ann",)

    def client(self, client_id):
        return {"x": np.ones(1)}


def of_leaves():
    return optax.multi_transform({"a": SGD}, {"w": "a"})


DATA = data.InMemory(
    {
        name: {"x": np.ones(n, np.float32), "y": np.zeros(n, np.int32)}
        for name, n in (("ann", 3), ("bob", 2))
    }
)
ALGORITHM = algorithms.fedavg(loss, SGD)
STATEFUL = algorithms.fedavg(loss_of_state, SGD)
STATE = ALGORITHM.init(PARAMS)


def cohorts(**how):
    return data.cohorts(DATA, 2, 3, **how)


ROUNDS = cohorts()
COHORT = next(ROUNDS)


def agnostic(**how):
    return algorithms.agnostic_fedavg(loss, SGD, num_domains=2, domain_learning_rate=0.1, **how)


def one_round(loss):
    return jax.eval_shape(algorithms.fedavg(loss, SGD).round, STATE, COHORT)


class Task:
    train, test, model = DATA, DATA, MODEL


class DataFrame:
    """As much of one as there is to see."""

    columns = ("x",)


OPTIMIZER = "expected an optax optimizer (optax.GradientTransformation)."
LOSS = (
    "expected a function loss(params, batch, key), or loss(params, model_state, batch, key) for "
    "a model with state."
)
TRAINED = (
    "expected an array of floats. Pass only the trained leaves as params, and add the others in "
    "the loss: use equinox.partition(model, equinox.is_inexact_array) and equinox.combine, "
    "or flax.nnx.split(model, flax.nnx.Param, ...) and flax.nnx.merge(..., copy=True). Counts "
    "and statistics can go into model_state."
)
AGGREGATOR = "expected one of fax.aggregators, such as fax.aggregators.mean()."
CHAINED = "expected a fax.aggregators.Transformation. Only the last part may be an Aggregator."
STATE_OF = "for the state, expected the State that init(params) or the last round returned."
FEATURES = (
    "expected a mapping from the names of features to arrays with a common leading axis, one "
    "row for each example."
)
DIVIDE = "Divide a table into clients: fax.data.from_pandas(frame, client=...)."
COLUMNS = "{name: frame[name].to_numpy() for name in frame.columns}"
FEDERATED = "expected federated data, such as fax.data.InMemory."
ORDER = "The order is evaluate(apply, params, data, metrics)."
SAMPLERS = (
    "expected 'uniform', 'shuffled', 'minimum_reuse', 'weighted' or 'stream', or a function "
    "sampler(round)."
)

# What is done by mistake, and what is said.
MISTAKES = {
    "an optimizer that was not called": (
        lambda: algorithms.fedavg(loss, optax.sgd),
        ValueError,
        f"fax.algorithms.fedavg: client_optimizer is the function optax.sgd, {OPTIMIZER} Call "
        "it, as in optax.sgd(0.1).",
    ),
    "an optimizer that is a number": (
        lambda: algorithms.fedavg(loss, 0.1),
        ValueError,
        f"fax.algorithms.fedavg: client_optimizer is 0.1, {OPTIMIZER} For this learning "
        "rate, pass optax.sgd(0.1).",
    ),
    "an optimizer that is None": (
        lambda: algorithms.fedopt(loss, SGD, None),
        ValueError,
        f"fax.algorithms.fedopt: server_optimizer is None, {OPTIMIZER} Pass one, as in "
        "optax.sgd(0.1).",
    ),
    "an optimizer that is an array": (
        lambda: algorithms.fedprox(loss, SGD, jnp.array(0.5), mu=1.0),
        ValueError,
        f"fax.algorithms.fedprox: server_optimizer is float64[], {OPTIMIZER} For this learning "
        "rate, pass optax.sgd(0.5).",
    ),
    "an optimizer's class": (
        lambda: algorithms.mime(loss, optax.MultiSteps),
        ValueError,
        "fax.algorithms.mime: base_optimizer is the class optax.transforms.MultiSteps, "
        f"{OPTIMIZER} Call it with its settings, as in optax.sgd(0.1).",
    ),
    "an optimizer that is an aggregator": (
        lambda: algorithms.diloco(loss, SGD, aggregators.mean(), replicas=2),
        ValueError,
        f"fax.algorithms.diloco: outer_optimizer is an Aggregator, {OPTIMIZER} Pass one, as in "
        "optax.sgd(0.1).",
    ),
    "an optimizer that is a transformation": (
        lambda: algorithms.papa(loss, aggregators.clip_by_norm(1.0), replicas=2),
        ValueError,
        f"fax.algorithms.papa: inner_optimizer is a Transformation, {OPTIMIZER} Pass one, as in "
        "optax.sgd(0.1).",
    ),
    "an optimizer for a loss": (
        lambda: algorithms.fedavg(SGD, loss),
        ValueError,
        f"fax.algorithms.fedavg: loss is a GradientTransformationExtraArgs, {LOSS}",
    ),
    "an optimizer of the parameters' leaves": (
        lambda: algorithms.apfl(loss, of_leaves(), num_clients=2).init(PARAMS),
        ValueError,
        "fax.algorithms.apfl: alpha_optimizer, which defaults to client_optimizer, does not work "
        "on alpha, a scalar. If client_optimizer depends on the leaves of the parameters, as with "
        "optax.multi_transform or optax.masked, pass another optimizer for alpha, such as "
        "alpha_optimizer=optax.sgd(0.1).",
    ),
    "a loss of two arguments": (
        lambda: algorithms.fedavg(lambda params, batch: 0, SGD),
        ValueError,
        f"fax.algorithms.fedavg: loss is a lambda, which takes (params, batch), {LOSS}",
    ),
    "a loss of five arguments": (
        lambda: algorithms.local_sgd(five, SGD, replicas=2),
        ValueError,
        "fax.algorithms.local_sgd: loss is the function test_mistakes.five, which takes "
        f"(params, model_state, batch, key, more), {LOSS}",
    ),
    "a model for its loss": (
        lambda: algorithms.hyp_cluster(MODEL, SGD, num_clusters=2),
        ValueError,
        f"fax.algorithms.hyp_cluster: loss is a Model, {LOSS} Pass its .loss.",
    ),
    "a task for its model's loss": (
        lambda: algorithms.streaming_diloco(Task(), SGD, replicas=2, steps=1, fragments=1, tau=0),
        ValueError,
        f"fax.algorithms.streaming_diloco: loss is a Task, {LOSS} Pass its .model.loss.",
    ),
    "a loss that returns a scalar": (
        lambda: one_round(lambda params, batch, key: jnp.mean(loss(params, batch, key))),
        ValueError,
        "loss returned 'loss' of shape (), expected (3,): one number for each example of the "
        "batch. fax takes the mean, without padding. Leave out the mean over the batch, such as "
        ".mean() or jnp.mean.",
    ),
    "a loss of each token": (
        lambda: one_round(lambda *args: jnp.ones((3, 5)) * loss(*args)[:, None]),
        ValueError,
        "loss returned 'loss' of shape (3, 5), expected (3,): one number for each example of the "
        "batch. fax takes the mean, without padding. Take the mean over the other axes, such as "
        "the tokens of a sequence.",
    ),
    "a loss that returns None": (
        lambda: one_round(lambda params, batch, key: None),
        ValueError,
        "loss returned None for 'loss', expected an array [3], one number for each example of "
        "the batch.",
    ),
    "a loss that returns integers": (
        lambda: one_round(lambda params, batch, key: batch["y"]),
        ValueError,
        "loss returned losses of dtype int32, expected real floats, which are differentiable.",
    ),
    "a loss without the model's state": (
        lambda: ALGORITHM.init(PARAMS, {"mean": jnp.zeros(3)}),
        ValueError,
        "fax.algorithms.fedavg: init got a model_state, but the loss has the form loss(params, "
        "batch, key). It must have the form loss(params, model_state, batch, key), and return "
        "(losses, metrics, model_state).",
    ),
    "no state for a loss that needs it": (
        lambda: algorithms.scaffold(loss_of_state, 0.1, num_clients=2).init(PARAMS),
        ValueError,
        "fax.algorithms.scaffold: init got no model_state, but the loss has the form "
        "loss(params, model_state, batch, key). Call init(params, model_state).",
    ),
    "an aggregator that was not called": (
        lambda: algorithms.fedavg(loss, SGD, aggregator=aggregators.mean),
        ValueError,
        f"fax.algorithms.fedavg: aggregator is the function fax.aggregators.mean, {AGGREGATOR} "
        "Call it: fax.aggregators.mean(...).",
    ),
    "a transformation that was not called": (
        lambda: algorithms.maml(loss, SGD, SGD, aggregator=aggregators.top_k),
        ValueError,
        f"fax.algorithms.maml: aggregator is the function fax.aggregators.top_k, {AGGREGATOR} "
        "Call it: fax.aggregators.top_k(...).",
    ),
    "a list of transformations": (
        lambda: algorithms.reptile(loss, SGD, SGD, aggregator=[aggregators.clip_by_norm(1.0)]),
        ValueError,
        f"fax.algorithms.reptile: aggregator is a list, {AGGREGATOR} To combine several, use "
        "fax.aggregators.chain(*parts).",
    ),
    "an aggregator that is a number": (
        lambda: algorithms.mime_lite(loss, SGD, aggregator=1.0),
        ValueError,
        f"fax.algorithms.mime_lite: aggregator is 1.0, {AGGREGATOR}",
    ),
    "a chain of what was not called": (
        lambda: aggregators.chain(aggregators.clip_by_norm, aggregators.mean()),
        ValueError,
        "fax.aggregators.chain: part 0 is the function fax.aggregators.clip_by_norm, "
        f"{CHAINED} Call it: fax.aggregators.clip_by_norm(...).",
    ),
    "an aggregator before the end": (
        lambda: aggregators.chain(aggregators.mean(), aggregators.clip_by_norm(1.0)),
        ValueError,
        f"fax.aggregators.chain: part 0 is Aggregator(mean), {CHAINED}",
    ),
    "a rotation of what was not called": (
        lambda: aggregators.hadamard(aggregators.uniform_quantization),
        ValueError,
        "fax.aggregators.hadamard: transformation is the function "
        "fax.aggregators.uniform_quantization, expected a fax.aggregators.Transformation, or a "
        "chain of transformations alone. Call it: fax.aggregators.uniform_quantization(...).",
    ),
    "no client at once": (
        lambda: algorithms.fedavg(loss, SGD, vectorize=0),
        ValueError,
        "fax.algorithms.fedavg: vectorize is 0, expected an int of at least 1.",
    ),
    "half a replica at once": (
        lambda: algorithms.branch_train_merge(loss, SGD, replicas=2, vectorize=0.5),
        ValueError,
        "fax.algorithms.branch_train_merge: vectorize is 0.5, expected an int of at least 1.",
    ),
    "a negative rate of domains": (
        lambda: algorithms.agnostic_fedavg(loss, SGD, num_domains=2, domain_learning_rate=-1),
        ValueError,
        "fax.algorithms.agnostic_fedavg: domain_learning_rate is -1, expected a number of at "
        "least 0.",
    ),
    "alpha above 1": (
        lambda: algorithms.streaming_diloco(
            loss, SGD, replicas=2, steps=1, fragments=1, tau=0, alpha=1.5
        ),
        ValueError,
        "fax.algorithms.streaming_diloco: alpha is 1.5, expected a number from 0 to 1.",
    ),
    "tau beyond the steps": (
        lambda: algorithms.streaming_diloco(loss, SGD, replicas=2, steps=2, fragments=1, tau=2),
        ValueError,
        "fax.algorithms.streaming_diloco: tau is 2, expected an int from 0 to 1, below steps=2.",
    ),
    "a number that is True": (
        lambda: algorithms.fedprox(loss, SGD, mu=True),
        ValueError,
        "fax.algorithms.fedprox: mu is True, expected a number of at least 0.",
    ),
    "alpha of zero": (
        lambda: algorithms.feddyn(loss, SGD, alpha=0, num_clients=2),
        ValueError,
        "fax.algorithms.feddyn: alpha is 0, expected a number above 0.",
    ),
    "a negative power": (
        lambda: algorithms.qfedavg(loss, SGD, q=-1, lipschitz=1.0),
        ValueError,
        "fax.algorithms.qfedavg: q is -1, expected a number of at least 0.",
    ),
    "a smoothness of zero": (
        lambda: algorithms.qfedavg(loss, SGD, q=1, lipschitz=0.0),
        ValueError,
        "fax.algorithms.qfedavg: lipschitz is 0.0, expected a number above 0.",
    ),
    "a population that is not there": (
        lambda: algorithms.ditto(loss, SGD, mu=1.0, num_clients=0),
        ValueError,
        "fax.algorithms.ditto: num_clients is 0, expected an int of at least 1.",
    ),
    "an optimizer of leaves where there is a scalar": (
        lambda: algorithms.fednova(loss, of_leaves()),
        ValueError,
        "fax.algorithms.fednova: client_optimizer does not work on a scalar, which FedNova uses to "
        "measure its steps. Use an optimizer that does not depend on the leaves of the "
        "parameters, such as optax.sgd(0.1).",
    ),
    "an optimizer for a learning rate": (
        lambda: algorithms.scaffold(loss, optax.sgd(0.1), num_clients=2),
        ValueError,
        "fax.algorithms.scaffold: client_learning_rate is a GradientTransformationExtraArgs, "
        "expected a number above 0, the learning rate of plain SGD.",
    ),
    "two numbers of clients": (
        lambda: algorithms.scaffold(
            algorithms.personal_parts(loss, "w", SGD, num_clients=2), 0.1, num_clients=3
        ),
        ValueError,
        "fax.algorithms.scaffold: num_clients is 3, but that of personal_parts is 2. Both are the "
        "number of clients in the data.",
    ),
    "a personal optimizer that is a number": (
        lambda: algorithms.ditto(loss, SGD, mu=1.0, num_clients=2, personal_optimizer=0.1),
        ValueError,
        f"fax.algorithms.ditto: personal_optimizer is 0.1, {OPTIMIZER} For this learning rate, "
        "pass optax.sgd(0.1).",
    ),
    "a number that is text": (
        lambda: aggregators.gaussian("1", 1.0),
        ValueError,
        "fax.aggregators.gaussian: clip_norm is '1', expected a number above 0.",
    ),
    "a traced number that is an array": (
        lambda: jax.eval_shape(
            lambda mu: algorithms.fedprox(loss, SGD, mu=mu).init(PARAMS), jnp.zeros(2)
        ),
        ValueError,
        "fax.algorithms.fedprox: mu is float64[2], expected a number of at least 0.",
    ),
    "a flag that is a word": (
        lambda: algorithms.diloco(loss, SGD, replicas=2, weighted="no"),
        ValueError,
        "fax.algorithms.diloco: weighted is 'no', expected True or False.",
    ),
    "the name of a feature that is a number": (
        lambda: algorithms.maml(loss, SGD, SGD, query=3),
        ValueError,
        "fax.algorithms.maml: query is 3, expected a string, the name of a feature.",
    ),
    "no params": (
        lambda: ALGORITHM.init({}),
        ValueError,
        "fax.algorithms.fedavg: init: params has no leaves, expected a pytree of arrays of floats.",
    ),
    "an int among params": (
        lambda: ALGORITHM.init({"w": [1.0, 0]}),
        ValueError,
        "fax.algorithms.fedavg: init: params['w'][1] is 0, expected an array of floats. Write "
        "0.0 for a number to be trained.",
    ),
    "an array of ints among params": (
        lambda: ALGORITHM.init({"w": jnp.zeros(2), "step": jnp.zeros((), jnp.int32)}),
        ValueError,
        f"fax.algorithms.fedavg: init: params['step'] is int32[], {TRAINED}",
    ),
    "complex numbers among params": (
        lambda: ALGORITHM.init({"w": jnp.zeros(2, jnp.complex64)}),
        ValueError,
        "fax.algorithms.fedavg: init: params['w'] is complex64[2], expected an array of real "
        "floats. Make its real and its imaginary part leaves of their own: a step against the "
        "gradient that JAX returns for a complex number leads uphill in the imaginary part.",
    ),
    "a function among params": (
        lambda: ALGORITHM.init({"w": jnp.zeros(2), "layers": [{"activation": jax.nn.relu}]}),
        ValueError,
        "fax.algorithms.fedavg: init: params['layers'][0]['activation'] is the function "
        f"jax.relu, {TRAINED}",
    ),
    "a random key among params": (
        lambda: ALGORITHM.init({"w": jnp.zeros(2), "key": jax.random.key(0)}),
        ValueError,
        f"fax.algorithms.fedavg: init: params['key'] is key<fry>[], {TRAINED}",
    ),
    "text in a model's state": (
        lambda: STATEFUL.init(PARAMS, {"name": "norm"}),
        ValueError,
        "fax.algorithms.fedavg: init: model_state['name'] is 'norm', expected an array of "
        "numbers or bools.",
    ),
    "a random key in a model's state": (
        lambda: STATEFUL.init(PARAMS, {"dropout": jax.random.key(0)}),
        ValueError,
        "fax.algorithms.fedavg: init: model_state['dropout'] is key<fry>[], expected an array "
        "of numbers or bools.",
    ),
    "params for the state": (
        lambda: ALGORITHM.round(PARAMS, COHORT),
        ValueError,
        f"fax.algorithms.fedavg: round got a dict {STATE_OF}",
    ),
    "an array for the state": (
        lambda: jax.eval_shape(ALGORITHM.round, jnp.zeros(3), COHORT),
        ValueError,
        f"fax.algorithms.fedavg: round got float64[3] {STATE_OF}",
    ),
    "another algorithm's state": (
        lambda: STATEFUL.round(algorithms.apfl(loss, SGD, num_clients=2).init(PARAMS), COHORT),
        ValueError,
        "fax.algorithms.fedavg: round got the State of another algorithm, or one without the "
        "clients' rows, expected the State that init(params) or the last round returned.",
    ),
    "the cohort before the state": (
        lambda: ALGORITHM.round(COHORT, STATE),
        ValueError,
        "fax.algorithms.fedavg: round got the cohort first and the state second. Write "
        "round(state, cohort).",
    ),
    "the iterator for a cohort": (
        lambda: ALGORITHM.round(STATE, ROUNDS),
        ValueError,
        "fax.algorithms.fedavg: round got the iterator over all cohorts, expected the cohort of "
        "one round. Pass next(cohorts).",
    ),
    "the iterator for a cohort, jitted": (
        lambda: jax.jit(ALGORITHM.round)(STATE, ROUNDS),
        TypeError,
        "The iterator that fax.data.cohorts returns cannot be passed to a function of JAX. Pass "
        "next(cohorts), the cohort of one round.",
    ),
    "data for a cohort": (
        lambda: ALGORITHM.round(STATE, DATA),
        ValueError,
        "fax.algorithms.fedavg: round got an InMemory for the cohort, expected a "
        "fax.data.Cohort, from the iterator that fax.data.cohorts returns.",
    ),
    "the cohorts of several rounds": (
        lambda: ALGORITHM.round(STATE, cohorts().take(2)),
        ValueError,
        "fax.algorithms.fedavg: round got a cohort whose mask has shape (2, 2, 1, 3), expected "
        "[clients, steps, batch], for a single round. To run several rounds in one call, use "
        "fax.algorithms.many_rounds.",
    ),
    "params for the state of params": (
        lambda: ALGORITHM.params(PARAMS),
        ValueError,
        f"fax.algorithms.fedavg: params got a dict {STATE_OF}",
    ),
    "a cohort for many rounds": (
        lambda: algorithms.many_rounds(ALGORITHM, STATE, COHORT, 2),
        ValueError,
        "fax.algorithms.many_rounds: cohorts is a Cohort, expected the iterator that "
        "fax.data.cohorts returns.",
    ),
    "a round for many rounds": (
        lambda: algorithms.many_rounds(ALGORITHM.round, STATE, ROUNDS, 2),
        ValueError,
        "fax.algorithms.many_rounds: algorithm is the function fax.algorithms.fedavg.round, "
        "expected an Algorithm, such as fax.algorithms.fedavg(loss, optax.sgd(0.1)).",
    ),
    "half a round": (
        lambda: algorithms.many_rounds(ALGORITHM, STATE, ROUNDS, 0.5),
        data.DataError,
        "fax.data.cohorts: rounds is 0.5, expected an int of at least 1.",
    ),
    "a loss for a store": (
        lambda: algorithms.ClientStore(loss),
        ValueError,
        "fax.algorithms.ClientStore: algorithm is the function test_mistakes.loss, expected an "
        "Algorithm, such as fax.algorithms.fedavg(loss, optax.sgd(0.1)).",
    ),
    "params after the cohort": (
        lambda: algorithms.personalize(loss, SGD)(COHORT, PARAMS),
        ValueError,
        "fax.algorithms.personalize: adapt got a dict for the cohort, expected a "
        "fax.data.Cohort, from the iterator that fax.data.cohorts returns.",
    ),
    "the iterator for clusters": (
        lambda: algorithms.hyp_cluster_choice(loss, PARAMS, ROUNDS),
        ValueError,
        "fax.algorithms.hyp_cluster_choice got the iterator over all cohorts, expected the "
        "cohort of one round. Pass next(cohorts).",
    ),
    "weights before the experts": (
        lambda: algorithms.branch_train_merge(loss, SGD, replicas=2).branch(jnp.ones(2), None),
        ValueError,
        "fax.algorithms.branch_train_merge: branch got float64[2] for the state, expected the "
        "BranchTrainMergeState that init(params) or the last round returned.",
    ),
    "params before the model": (
        lambda: metrics.evaluate(PARAMS, apply, DATA, ACCURACY),
        ValueError,
        f"fax.metrics.evaluate: apply is a dict, expected a function apply(params, batch). {ORDER}",
    ),
    "data before params": (
        lambda: metrics.evaluate(apply, DATA, PARAMS, ACCURACY),
        ValueError,
        "fax.metrics.evaluate: params is an InMemory, expected an array of numbers or bools. "
        f"{ORDER}",
    ),
    "metrics before data": (
        lambda: metrics.evaluate(apply, PARAMS, ACCURACY, DATA),
        data.DataError,
        f"fax.metrics.evaluate: data is a dict, {FEDERATED} Wrap a mapping from clients to "
        f"their examples: fax.data.InMemory(clients). {ORDER}",
    ),
    "a model for its function": (
        lambda: metrics.evaluate(MODEL, PARAMS, DATA, ACCURACY),
        ValueError,
        "fax.metrics.evaluate: apply is a Model, expected a function apply(params, batch). Pass "
        f"its .apply. {ORDER}",
    ),
    "a model of one argument": (
        lambda: metrics.evaluate_clients(lambda batch: batch, PARAMS, DATA, ACCURACY),
        ValueError,
        "fax.metrics.evaluate_clients: apply is a lambda, which takes (batch), expected a "
        "function apply(params, batch). The order is evaluate_clients(apply, params, data, "
        "metrics).",
    ),
    "a metric's class": (
        lambda: metrics.evaluate(apply, PARAMS, DATA, {"accuracy": metrics.Accuracy}),
        ValueError,
        "fax.metrics.evaluate: metric 'accuracy' is the class fax.metrics.Accuracy, expected a "
        "function metric(batch, scores), such as fax.metrics.Accuracy().",
    ),
    "a metric without a name": (
        lambda: metrics.evaluate(apply, PARAMS, DATA, metrics.Accuracy()),
        ValueError,
        "fax.metrics.evaluate: metrics is Accuracy(label='y'), expected a mapping from names "
        "to metrics, such as {'accuracy': fax.metrics.Accuracy()}, or names of metrics, such as "
        "['accuracy'].",
    ),
    "one score for each example": (
        lambda: metrics.evaluate(lambda params, batch: batch["x"], PARAMS, DATA, ACCURACY),
        ValueError,
        "scores have shape (5,) and labels (5,), expected scores of shape (5, 'classes'), one for "
        "each label and class. If z are logits of class 1 of 2, return "
        "jnp.stack([jnp.zeros_like(z), z], -1).",
    ),
    "one-hot labels": (
        lambda: metrics.Accuracy()({"y": jnp.eye(2)}, jnp.eye(2)),
        ValueError,
        "scores have shape (2, 2) and labels (2, 2), expected scores of shape (2, 2, 'classes'), "
        "one for each label and class. If the labels are one-hot, replace them by y.argmax(-1), "
        "with fax.data.map.",
    ),
    "F1 of logits": (
        lambda: metrics.evaluate(lambda params, batch: batch["x"], PARAMS, DATA, ["f1"]),
        ValueError,
        "scores have shape (5,) and labels (5,), expected scores of shape (5, 'classes'), one for "
        "each label and class. If they are logits of yes-or-no labels, use F1(binary=True).",
    ),
    "a word for personal": (
        lambda: metrics.evaluate_clients(apply, PARAMS, DATA, ACCURACY, personal="yes"),
        ValueError,
        "fax.metrics.evaluate_clients: personal is 'yes', expected True or False.",
    ),
    "a cohort for data": (
        lambda: metrics.prepare(COHORT),
        data.DataError,
        f"fax.metrics.prepare: data is a Cohort, {FEDERATED}",
    ),
    "a token for tokens": (
        lambda: metrics.TokenAccuracy(ignore=0),
        ValueError,
        "TokenAccuracy: ignore is 0, expected a sequence of ints, as in ignore=(0,).",
    ),
    "the metric's class for domains": (
        lambda: metrics.PerDomain(metrics.Accuracy, 2),
        ValueError,
        "PerDomain: metric is the class fax.metrics.Accuracy, expected a function metric(batch, "
        "scores).",
    ),
    "a mapping for data": (
        lambda: data.cohorts({"ann": {"x": [1.0]}}, 1, 1),
        data.DataError,
        f"fax.data.cohorts: data is a dict, {FEDERATED} Wrap a mapping from clients to their "
        "examples: fax.data.InMemory(clients).",
    ),
    "a task for its data": (
        lambda: data.cohorts(Task(), 1, 1),
        data.DataError,
        f"fax.data.cohorts: data is a Task, {FEDERATED} Pass its .train or .test.",
    ),
    "the parts of a split for data": (
        lambda: data.cohorts(data.split(DATA, 1), 1, 1),
        data.DataError,
        f"fax.data.cohorts: data is a tuple, {FEDERATED} Pass one of them, or "
        "fax.data.concatenate(*datas).",
    ),
    "a table for clients": (
        lambda: data.InMemory(DataFrame()),
        data.DataError,
        "fax.data.InMemory: clients is a DataFrame, expected a mapping from client ids to their "
        f"features. {DIVIDE}",
    ),
    "a table for a client": (
        lambda: data.InMemory({"ann": DataFrame()}),
        data.DataError,
        f"client 'ann' is a DataFrame, {FEATURES} Pass the columns of a table: {COLUMNS}.",
    ),
    "a table for arrays": (
        lambda: data.partition.iid(DataFrame(), 2),
        data.DataError,
        f"fax.data.partition.iid: arrays is a DataFrame, {FEATURES} Pass the columns of a "
        f"table: {COLUMNS}.",
    ),
    "a table for data": (
        lambda: data.cohorts(DataFrame(), 1, 1),
        data.DataError,
        f"fax.data.cohorts: data is a DataFrame, {FEDERATED} {DIVIDE}",
    ),
    "examples that differ in number": (
        lambda: data.partition.iid({"x": np.ones(2), "y": np.ones(3)}, 2),
        data.DataError,
        "fax.data.partition.iid: arrays has 2 examples by feature 'x', but 3 by 'y', of shape "
        "(3,). All features need one row for each example.",
    ),
    "no arrays": (
        lambda: data.partition.by_column({}, "x"),
        data.DataError,
        "fax.data.partition.by_column: arrays has no features.",
    ),
    "no weights to sample by": (
        lambda: cohorts(sampler="weighted"),
        data.DataError,
        "fax.data.cohorts: sampler='weighted' needs weights=, a number for each client of the "
        "data.",
    ),
    "weights that nobody samples by": (
        lambda: cohorts(weights=[1.0, 2.0]),
        data.DataError,
        "fax.data.cohorts: weights are for sampler='weighted' only, but sampler is 'uniform'.",
    ),
    "weights that are no numbers": (
        lambda: cohorts(sampler="weighted", weights="ab"),
        data.DataError,
        "fax.data.cohorts: weights is 'ab', expected 2 numbers, one for each client of the data.",
    ),
    "a sampler that there is not": (
        lambda: cohorts(sampler="random"),
        data.DataError,
        f"fax.data.cohorts: sampler is 'random', {SAMPLERS}",
    ),
    "a list for a sampler": (
        lambda: cohorts(sampler=[0, 1]),
        data.DataError,
        f"fax.data.cohorts: sampler is [0, 1], {SAMPLERS}",
    ),
    "a sampler without an argument": (
        lambda: cohorts(sampler=lambda: [0, 1]),
        data.DataError,
        "fax.data.cohorts: sampler is a lambda, which takes (), expected a function "
        "sampler(round).",
    ),
    "a word for a flag": (
        lambda: cohorts(shuffle="no"),
        data.DataError,
        "fax.data.cohorts: shuffle is 'no', expected True or False.",
    ),
    "a number for a placement": (
        lambda: cohorts(placement=2),
        data.DataError,
        "fax.data.cohorts: placement is 2, expected a string, the name of a placement.",
    ),
    "a key for a seed": (
        lambda: data.split(DATA, 1, seed="a"),
        data.DataError,
        "fax.data.split: seed is 'a', expected an int from 0 to 2147483647.",
    ),
    "a key of JAX for a seed": (
        lambda: data.split(DATA, 1, seed=jax.random.key(0)),
        data.DataError,
        "fax.data.split: seed is key<fry>[], expected an int from 0 to 2147483647.",
    ),
    "a share that is text": (
        lambda: data.split(DATA, "a"),
        data.DataError,
        "fax.data.split: held_out is 'a', expected 1, so that a client is left to "
        "train with, or a share of the clients between 0 and 1.",
    ),
    "a function without return": (
        lambda: data.map(DATA, lambda client_id, examples: None).client("ann"),
        data.DataError,
        "client 'ann': fn of fax.data.map returned None, expected the client's examples, a mapping "
        "from names to arrays. Does it end without a return statement?",
    ),
    "ids of clients with a missing one": (
        lambda: data.from_records([{"u": 1.0, "x": 1}, {"u": float("nan"), "x": 2}], "u"),
        data.DataError,
        "fax.data.from_records: column 'u' has 1 missing value, the first in row 1. Fill them, or "
        "drop these rows.",
    ),
    "a table without rows": (
        lambda: data.from_pandas(pandas.DataFrame({"u": [], "x": []}), "u"),
        data.DataError,
        "fax.data.from_pandas: there are no rows, expected at least one.",
    ),
    "ids of clients that are floats": (
        lambda: data.from_records([{"u": 1.0, "x": 1}, {"u": 2.0, "x": 2}], "u"),
        data.DataError,
        "fax.data.from_records: column 'u' has dtype float64, but ids of clients are ints, bools "
        "or strings. Convert it first, for example by astype(int).",
    ),
    "a function of examples alone": (
        lambda: data.map(DATA, lambda examples: examples),
        data.DataError,
        "fax.data.map: fn is a lambda, which takes (examples), expected a function "
        "fn(client_id, examples).",
    ),
    "an id for a list of ids": (
        lambda: data.subset(DATA, 3),
        data.DataError,
        "fax.data.subset: ids is 3, expected a list of client ids.",
    ),
    "an id that no client can have": (
        lambda: data.subset(DATA, [[1]]),
        data.DataError,
        "fax.data.subset: ids has [1], but data has no such clients. It has 'ann', 'bob'.",
    ),
    "a mask for a list of ids": (
        lambda: data.subset(data.InMemory({i: {"x": [i]} for i in range(2)}), np.array([True])),
        data.DataError,
        "fax.data.subset: ids has np.True_, but data has no such clients. It has 0, 1.",
    ),
    "a position that is text": (
        lambda: data.slice(DATA, "ann"),
        data.DataError,
        "fax.data.slice: start is 'ann', expected an int.",
    ),
    "a policy that there is not": (
        lambda: data.validate(DATA, on_bad="drop"),
        data.DataError,
        "fax.data.validate: on_bad is 'drop', expected 'raise' or 'skip'.",
    ),
    "a path that is a number": (
        lambda: data.Files(3),
        data.DataError,
        "fax.data.Files: folder is 3, expected a path.",
    ),
    "a model that there is not": (
        lambda: fax.models.create("emnist"),
        ValueError,
        "fax.models.create: name is 'emnist', expected 'char_lstm', 'cifar100_logistic', "
        "'denoiser', 'dense', 'emnist_conv', 'emnist_dense', 'emnist_logistic', 'resnet18', "
        "'shakespeare_lstm' or 'stackoverflow_lstm'.",
    ),
    "no class": (
        lambda: fax.models.create("emnist_conv", num_classes=0),
        ValueError,
        "fax.models.create('emnist_conv'): num_classes is 0, expected an int of at least 1.",
    ),
    "a size for sizes": (
        lambda: fax.models.create("dense", sizes=10),
        ValueError,
        "fax.models.create('dense'): sizes is 10, expected a sequence of ints of at least 1, as in "
        "sizes=(64, 512, 10).",
    ),
    "a module for what makes it": (
        lambda: fax.models.functional(module()),
        ValueError,
        "fax.models.functional: build is a Linear, expected a function build(rngs=rngs) that "
        "makes a module, such as lambda rngs: nnx.Linear(4, 3, rngs=rngs).",
    ),
    "a module with a constant": (
        lambda: fax.models.functional(WithConstant),
        ValueError,
        "fax.models.functional: build returned a WithConstant with an array that is not trained, "
        "float64[3] at scale. Make it an nnx.Param to train it. Make a constant in __call__, or "
        "outside the module.",
    ),
    "a module of flax.linen": (
        lambda: fax.models.functional(linen.Dense(2)),
        ValueError,
        "fax.models.functional: build is a Dense, expected a function build(rngs=rngs) that makes "
        "a module, such as lambda rngs: nnx.Linear(4, 3, rngs=rngs). For a module of flax.linen, "
        "write the loss: see docs/how_to/model.md.",
    ),
    "an optimizer that needs the loss": (
        lambda: algorithms.fedavg(loss, SGD, optax.contrib.reduce_on_plateau()),
        ValueError,
        "fax.algorithms.fedavg: server_optimizer is a GradientTransformationExtraArgs, whose "
        "update needs value. Expected an optimizer that needs only the gradient, its state and the "
        "parameters, such as optax.sgd(0.1).",
    ),
    "parameters for the start of an experiment": (
        lambda: fax.experiment.Experiment(ALGORITHM, jnp.zeros(3), ROUNDS, rounds=1),
        ValueError,
        "fax.experiment.Experiment: start is float64[3], expected a tuple of the arguments of "
        "algorithm.init. Write start=(params,).",
    ),
    "a seed for a model's key": (
        lambda: MODEL.init(0),
        ValueError,
        "fax.models.functional: init: key is int64[], expected a random key, as in "
        "jax.random.key(0).",
    ),
    "a loss before the name": (
        lambda: algorithms.federated(loss, "ours", apply),
        ValueError,
        "fax.algorithms.federated: name is the function test_mistakes.loss, expected a string, the "
        "name of the algorithm.",
    ),
    "data without two of its methods": (
        lambda: data.cohorts(HalfOfData(), 1, 1),
        data.DataError,
        f"fax.data.cohorts: data is a HalfOfData, {FEDERATED} It has no method num_examples and no "
        "__len__.",
    ),
    "a batch before its scores": (
        lambda: fax.models.cross_entropy({"y": jnp.zeros(2, int)}, jnp.zeros((2, 3))),
        ValueError,
        "fax.models.cross_entropy: batch is float64[2,3], expected a mapping with the "
        "labels 'y'. Call cross_entropy(scores, batch).",
    ),
    "labels of another name": (
        lambda: fax.models.cross_entropy(jnp.zeros((2, 3)), {"label": jnp.zeros(2, int)}),
        ValueError,
        "fax.models.cross_entropy: batch has the features ['label'], expected the labels as 'y'. "
        "Rename a feature with fax.data.map.",
    ),
    "inputs of another name": (
        lambda: MODEL.apply(MODEL.init(jax.random.key(0)), {"image": jnp.zeros((2, 3))}),
        ValueError,
        "fax.models.functional: batch has the features ['image'], expected the inputs as 'x'. "
        "Rename a feature with fax.data.map.",
    ),
    "a task that there is not": (
        lambda: fax.tasks.load("mnist"),
        ValueError,
        "fax.tasks.load: name is 'mnist', expected 'bible', 'cifar100', 'digits', 'emnist', "
        "'flights', 'photographs', 'pystdlib', 'shakespeare' or 'stackoverflow'.",
    ),
    "a folder that is a number": (
        lambda: fax.tasks.load("digits", 3),
        ValueError,
        "fax.tasks.load: cache is 3, expected a path.",
    ),
    "half a word": (
        lambda: fax.tasks.Words(["a"]).sequences([b"a"], 0.5),
        ValueError,
        "fax.tasks.Words: length is 0.5, expected an int of at least 1.",
    ),
    "a size that is text": (
        lambda: fax.sharding.make_mesh(clients="2"),
        fax.PlacementError,
        "fax.sharding.make_mesh: clients is '2', expected an int of at least 1, or -1 for the "
        "remaining devices.",
    ),
    "a type that is none": (
        lambda: fax.sharding.make_mesh(clients=-1, axis_types=1),
        fax.PlacementError,
        "fax.sharding.make_mesh: axis_types is 1, expected one jax.sharding.AxisType, or one for "
        "each of the axes clients.",
    ),
    "half a device": (
        lambda: fax.sharding.use_cpu_devices(0.5),
        fax.PlacementError,
        "fax.sharding.use_cpu_devices: count is 0.5, expected an int of at least 1.",
    ),
    "an axis that is a number": (
        lambda: fax.sharding.layout(clients=2).__enter__(),
        fax.PlacementError,
        "fax.sharding.layout: clients is 2, expected the name of a mesh axis, or several names.",
    ),
    "half a participant": (
        lambda: fax.sharding.local_rows(0.5),
        fax.PlacementError,
        "fax.sharding.local_rows: n is 0.5, expected an int of at least 1, the number of "
        "participants.",
    ),
    "a number that is too large": (
        lambda: fax.sharding.place({"x": 10**30}),
        fax.PlacementError,
        "fax.sharding.place: tree['x'] is int 1000000000000000000000000000000, expected an array "
        "with a row for each participant. Server values do not need to be placed.",
    ),
    "a mesh without devices": (
        lambda: fax.sharding.make_mesh(devices=[], clients=-1),
        fax.PlacementError,
        "fax.sharding.make_mesh: devices is [], expected a list of devices, such as jax.devices().",
    ),
    "numbers of devices": (
        lambda: fax.sharding.make_mesh(devices=[0, 1], clients=-1),
        fax.PlacementError,
        "fax.sharding.make_mesh: devices is [0, 1], expected a list of devices, such as "
        "jax.devices().",
    ),
    "a rate for the optimizer of local steps": (
        lambda: algorithms.local_steps(loss, 0.1, PARAMS, COHORT),
        ValueError,
        "fax.algorithms.local_steps: optimizer is 0.1, expected an optax optimizer "
        "(optax.GradientTransformation). For this learning rate, pass optax.sgd(0.1).",
    ),
    "layers of nothing": (
        lambda: algorithms.layer_fragments({}, 1),
        ValueError,
        "fax.algorithms.layer_fragments: params has no leaves, expected a pytree of arrays.",
    ),
    "positions for a cohort": (
        lambda: algorithms.gather_rows(PARAMS, [0, 1]),
        ValueError,
        "fax.algorithms.gather_rows: cohort is a list, expected a fax.data.Cohort, from the "
        "iterator that fax.data.cohorts returns.",
    ),
    "an initial value that does not fit": (
        lambda: fax.program(clients=2)(lambda x: fax.max(x, initial=300))(np.ones(2, np.int8)),
        fax.PlacementError,
        "fax.max: initial is 300, expected a scalar that fits the dtype int8.",
    ),
    "a placement that is a number": (
        lambda: fax.sharding.place(jnp.ones(2), 2),
        fax.PlacementError,
        "fax.sharding.place: placement is 2, expected a string, the name of a placement.",
    ),
    "a seed for a key": (
        lambda: algorithms.hyp_cluster_start(loss, SGD, PARAMS, COHORT, 0, num_clusters=1),
        ValueError,
        "fax.algorithms.hyp_cluster_start: key is 0, expected a random key, as in "
        "jax.random.key(0).",
    ),
    "weights that are text": (
        lambda: agnostic(domain_weights="ab"),
        ValueError,
        "fax.algorithms.agnostic_fedavg: domain_weights is 'ab', expected 2 numbers, a number "
        "for each of num_domains.",
    ),
    "counts for other domains": (
        lambda: agnostic(domain_counts=[1, 1, 1]),
        ValueError,
        "fax.algorithms.agnostic_fedavg: domain_counts has shape (3,), expected (2,), a number "
        "for each of num_domains.",
    ),
    "a schedule without an argument": (
        lambda: algorithms.diloco(loss, SGD, replicas=2, steps=lambda: 3),
        ValueError,
        "fax.algorithms.diloco: steps is a lambda, which takes (), expected a function "
        "steps(outer_steps).",
    ),
    "a schedule of two arguments": (
        lambda: algorithms.server_adagrad(lambda epoch, step: 0.1),
        ValueError,
        "fax.algorithms.server_adagrad: learning_rate is a lambda, which takes (epoch, step), "
        "expected a function learning_rate(round).",
    ),
    "fragments that know no path": (
        lambda: algorithms.streaming_diloco(
            loss, SGD, replicas=2, steps=2, fragments=lambda: 0
        ).init(PARAMS),
        ValueError,
        "fax.algorithms.streaming_diloco: fragments is a lambda, which takes (), expected a "
        "function fragments(path).",
    ),
    "a share of two": (
        lambda: algorithms.papa(loss, SGD, replicas=2, alpha=2),
        ValueError,
        "fax.algorithms.papa: alpha is 2, expected a number from 0 to 1.",
    ),
    "noise that is negative": (
        lambda: aggregators.gaussian(1.0, 1.0, quantile=0.5, count_noise=-1),
        ValueError,
        "fax.aggregators.gaussian: count_noise is -1, expected a number above 0.",
    ),
    "a number for a label": (
        lambda: metrics.Accuracy(3),
        ValueError,
        "Accuracy: label is 3, expected a string, the name of a feature.",
    ),
    "None for a placement": (
        lambda: metrics.evaluate(apply, PARAMS, DATA, ACCURACY, placement=None),
        ValueError,
        "fax.metrics.evaluate: placement is None, expected a string, the name of a placement.",
    ),
    "a module's maker without rngs": (
        lambda: fax.models.functional(lambda: None),
        ValueError,
        "fax.models.functional: build is a lambda, expected a function build(rngs=rngs) that "
        "makes a module, such as lambda rngs: nnx.Linear(4, 3, rngs=rngs).",
    ),
    "half a seed": (
        lambda: fax.tasks.load("digits", seed=0.5),
        ValueError,
        "fax.tasks.load('digits'): seed is 0.5, expected an int from 0 to 2147483647.",
    ),
    "a word for words": (
        lambda: fax.tasks.Words("to be"),
        ValueError,
        "fax.tasks.Words: vocabulary is 'to be', expected a list of words.",
    ),
    "a number for devices": (
        lambda: fax.sharding.make_mesh(devices=2, clients=2),
        fax.PlacementError,
        "fax.sharding.make_mesh: devices is 2, expected a list of devices, such as jax.devices().",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_said(mistake):
    make, kind, message = MISTAKES[mistake]
    with pytest.raises(kind) as caught:
        make()
    assert str(caught.value) == message


def test_a_transformation_is_a_chain():
    clip = aggregators.clip_by_norm(0.1)
    rounds = [
        algorithms.fedavg(loss, SGD, aggregator=own) for own in (clip, aggregators.chain(clip))
    ]
    one, other = (algorithm.round(algorithm.init(PARAMS), COHORT)[0] for algorithm in rounds)
    np.testing.assert_array_equal(one.params["w"], other.params["w"])
    assert abs(np.linalg.norm(one.params["w"]) - 0.1) < 1e-6


def test_an_optimizer_of_the_parameters_leaves_where_alpha_has_its_own():
    algorithm = algorithms.apfl(loss, of_leaves(), num_clients=2, alpha_optimizer=SGD)
    jax.eval_shape(algorithm.round, algorithm.init(PARAMS), COHORT)


def test_losses_that_are_called_in_other_ways():
    for own in (functools.partial(loss), jax.jit(loss), jax.checkpoint(loss), MODEL.loss):
        algorithms.fedavg(own, SGD)
    algorithms.fedavg(lambda *args: loss(*args), SGD).init(PARAMS)
    algorithms.fedavg(lambda params, batch, key, *, mask: mask, SGD).init(PARAMS)


def test_a_cohort_is_not_drawn_for_what_is_refused():
    rounds = cohorts()
    for algorithm, state in ((ALGORITHM, COHORT), (loss, STATE)):
        with pytest.raises(ValueError, match=r"round got|algorithm is"):
            algorithms.many_rounds(algorithm, state, rounds, 2)
    assert rounds.round == 0


# Packages, what needs them, and the extra that brings them.
EXTRAS = [
    ("optax", "fax.aggregators", "algorithms"),
    ("optax", "fax.algorithms", "algorithms"),
    ("flax", "fax.models", "models"),
    ("optax", "fax.tasks", "tasks"),
    ("flax", "fax.tasks", "tasks"),
]


@pytest.mark.parametrize(("package", "module", "extra"), EXTRAS)
def test_an_extra_that_is_not_installed(monkeypatch, package, module, extra):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ModuleNotFoundError) as caught:
        importlib.import_module(module)
    assert str(caught.value) == (
        f"{module} needs the package {package}, which is not installed. Install it with "
        f"pip install 'fax-jax[{extra}]'."
    )


def test_an_extra_that_is_broken_says_so_itself(monkeypatch, tmp_path):
    (tmp_path / "broken_extra.py").write_text("import not_there_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="No module named 'not_there_at_all'"):
        _extras.require("fax.algorithms", "broken_extra", "algorithms")


# Warnings


def summed(x):
    return fax.program(clients=4)(lambda x: fax.sum(fax.map(jnp.sin, x)))(x)


def test_a_mesh_without_an_axis_of_the_placement():
    x = jnp.ones((4, 2))
    message = (
        "A program over clients runs under a mesh of batch=2, which has no axis 'clients', so that "
        "all of its devices do the same work. Name an axis 'clients', or use "
        "fax.sharding.layout(clients='batch'). If only the client functions should use the mesh, "
        "use fax.sharding.layout(clients=())."
    )
    with jax.set_mesh(meshes.mesh(batch=2)):
        with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
            jax.eval_shape(summed, x)
        jax.eval_shape(summed, x)  # once is enough


def test_meshes_that_are_not_idle():
    x = jnp.ones((4, 2))
    with jax.set_mesh(meshes.mesh(spare=2)):
        with fax.sharding.layout(clients="spare"):
            jax.eval_shape(summed, x)
        with fax.sharding.layout(clients=()):
            np.testing.assert_allclose(summed(x), 4 * np.sin(x[0]), rtol=1e-12)
        summed(meshes.put(x, None, "spare"))

        def constrained(x):
            return summed(jax.lax.with_sharding_constraint(x, PartitionSpec(None, "spare")))

        def inside(x):
            own = fax.program(clients=4)(lambda x: fax.sum(fax.map(halves, x)))
            return own(x)

        def halves(x):
            return jax.lax.with_sharding_constraint(x, PartitionSpec("spare"))

        jax.eval_shape(inside, x)
    with jax.set_mesh(meshes.mesh("explicit", spare=2)):
        jax.eval_shape(jax.jit(summed), meshes.put(x, None, "spare"))
    with jax.set_mesh(meshes.mesh(spare=1)):
        jax.eval_shape(summed, x)


def test_a_function_that_is_made_anew_for_every_evaluation():
    ready, scale = metrics.prepare(DATA), 2.0

    def scaled(params, batch, *, scale):
        return scale * batch["x"]

    def total(batch, scores):
        return metrics.Sum(scores)

    def evaluate(own, total=total):
        return metrics.evaluate(own, PARAMS, ready, {"total": total})["total"]

    def three_times():
        for _ in range(3):
            assert evaluate(lambda params, batch: scale * batch["x"]) == 10

    def of_parts():
        for _ in range(2):
            evaluate(functools.partial(scaled, scale=3.0))

    def twice():
        for _ in range(2):
            evaluate(apply, lambda batch, scores: metrics.Sum(scores[:, 0]))

    def made(scale):
        return lambda params, batch: scale * batch["x"]

    message = (
        "fax.metrics.evaluate: apply is a lambda that is redefined for every call, at "
        f"{__file__}:{three_times.__code__.co_firstlineno + 2}, and so is compiled in every call. "
        "Define it once, outside of the loop."
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$") as caught:
        three_times()
    assert len(caught) == 1
    assert [evaluate(made(factor)) for factor in (1.0, 3.0)] == [5, 15]  # others, each of its own
    with pytest.warns(UserWarning, match=r"metric 'total' is a lambda that is redefined"):
        twice()
    with pytest.warns(
        UserWarning, match=r"apply is a partial that is redefined for every call and"
    ):
        of_parts()


# What things are


def test_reprs_are_one_line_that_says_what_it_is(tmp_path):
    files = data.Files.write(tmp_path / "people", DATA)
    database = data.SQLite.write(tmp_path / "p.db", DATA)
    hand = data.Cohort({"x": jnp.ones((2, 1, 3, 5))}, *(np.ones((2, 1, 3), bool), *[None] * 3))
    expected = [
        (DATA, "InMemory(clients=2, examples=5, features=x float32[], y int32[])"),
        (data.subset(DATA, ["ann"]), "Subset(clients=1)"),
        (
            data.map(DATA, lambda i, examples: examples),
            "Map(InMemory(clients=2, examples=5, features=x float32[], y int32[]))",
        ),
        (data.concatenate(DATA), "Concatenation(clients=2)"),
        (files, f"Files({str(tmp_path / 'people')!r})"),
        (database, f"SQLite({str(tmp_path / 'p.db')!r})"),
        (
            cohorts(epochs=2),
            "Cohorts(clients=2 of 2, batch_size=3, epochs=2, round=0, examples on the devices)",
        ),
        (COHORT, "Cohort(clients=2, steps=1, batch_size=3, features=x float32[], y int32[])"),
        (
            cohorts().take(2),
            "Cohort(rounds=2, clients=2, steps=1, batch_size=3, features=x float32[], y int32[])",
        ),
        (hand, "Cohort(clients=2, steps=1, batch_size=3, features=x float64[5])"),
        (jax.tree.map(lambda x: None, COHORT), "Cohort(...)"),
        (COHORT.batches, "Gathered(features=x float32[], y int32[])"),
        (metrics.prepare(DATA), "Prepared(clients=2, examples=5, on the devices)"),
        (ALGORITHM, "Algorithm(fedavg)"),
        (
            algorithms.branch_train_merge(loss, SGD, replicas=2),
            "BranchTrainMerge(branch_train_merge)",
        ),
        (
            algorithms.ClientStore(ALGORITHM),
            "ClientStore(Algorithm(fedavg), clients=0, rounds=0, in memory)",
        ),
        (aggregators.chain(aggregators.median()), "Aggregator(chain)"),
        (aggregators.top_k(3), "Transformation(top_k)"),
        (
            aggregators.Budget(1.0, np.array(1e-5), 20.0, record={"a key": 2}),
            "Budget(limit=1, delta=1e-05, spent=2 of 28 releases)",
        ),
        (MODEL, "Model(init, apply and loss of functional)"),
    ]
    for thing, text in expected:
        assert repr(thing) == text
    seen = []
    fax.program(clients=2)(
        lambda cohort: fax.map(lambda own: seen.append(repr(own)), cohort.clients())
    )(COHORT)
    assert seen[0] == "Client(steps=1, batch_size=3, features=x float32[], y int32[])"


def test_errors_of_a_loss_say_how_it_is_called():
    def swapped(batch, model_state, params, key):
        return loss(params, batch, key)

    params = PARAMS | {f"b{i}": jnp.zeros(()) for i in range(9)}
    algorithm = algorithms.fedavg(swapped, SGD)
    with pytest.raises(KeyError) as caught:
        jax.jit(algorithm.round)(algorithm.init(params, jnp.ones(2)), COHORT)
    shown = ", ".join(f"['b{i}'] float64[]" for i in range(8))
    assert caught.value.__notes__[:5] == [  # JAX adds one of its own
        "This came from the loss, which fax calls as loss(params, model_state, batch, key).",
        f"  params: {shown}, and 2 more",
        "  model_state: float64[2]",
        "  batch: ['x'] float32[3], ['y'] int32[3]",
        "  key: key<fry>[]",
    ]


def test_errors_of_other_functions_say_how_they_are_called():
    needy = optax.polyak_sgd()
    of_client, of_server = algorithms.fedavg(loss, needy), algorithms.fedavg(loss, SGD, needy)
    calls = {
        "the optimizer, which fax calls as update(gradient, state, params).": (
            lambda: jax.eval_shape(of_client.round, STATE, COHORT)
        ),
        "server_optimizer, which fax calls as update(gradient, state, params).": (
            lambda: jax.eval_shape(of_server.round, of_server.init(PARAMS), COHORT)
        ),
        "apply, which fax calls as apply(params, batch).": (
            lambda: metrics.evaluate(apply, STATE, DATA, ACCURACY)
        ),
        "metric 'of z', which fax calls as metric(batch, scores).": (
            lambda: metrics.evaluate(apply, PARAMS, DATA, {"of z": lambda batch, z: z["z"]})
        ),
    }
    for said, call in calls.items():
        with pytest.raises(TypeError) as caught:
            call()
        assert f"This came from {said}" in caught.value.__notes__
