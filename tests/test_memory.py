"""Memory that does not grow with the number of participants, by XLA's own figures.

The unit is one model: 524,288 float32 parameters, in 8 layers of 256 units. A compiled
program's temporary memory, here in hundredths of a model, does not count its arguments and
results.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

import fax
from fax.aggregators._per_client import each

LAYERS, UNITS, EXAMPLES = 8, 256, 4
MODEL_BYTES = 4 * LAYERS * UNITS * UNITS


@pytest.fixture
def counts(pytestconfig):
    """Of participants: what holds for few and for many holds for those between, see ``--all``."""
    return [8, 64, 256, 4096] if pytestconfig.option.all else [8, 4096]


def loss(params, x):
    for weight in params:
        x = jnp.tanh(x @ weight)
    return jnp.mean(x**2)


def update(params, x):
    gradient = jax.grad(loss)(params, x)
    return [(-0.1 * g).astype(p.dtype) for p, g in zip(params, gradient, strict=True)]


def train(params, x, rate):
    """The difference that 100 local steps make."""

    def step(p, _):
        return [w - rate * g for w, g in zip(p, jax.grad(loss)(p, x), strict=True)], None

    trained, _ = jax.lax.scan(step, params, None, length=100)
    return [new - old for new, old in zip(trained, params, strict=True)]


def temporary(fn, *args):
    """Temporary memory of the compiled function, in models."""
    compiled = jax.jit(fn).lower(*args).compile()
    return round(compiled.memory_analysis().temp_size_in_bytes / MODEL_BYTES, 2)


def arguments(n, dtype=jnp.float32):
    params = [jax.ShapeDtypeStruct((UNITS, UNITS), dtype)] * LAYERS
    data = jax.ShapeDtypeStruct((n, EXAMPLES, UNITS), dtype)
    weights = jax.ShapeDtypeStruct((n,), jnp.float32)
    mask = jax.ShapeDtypeStruct((n,), jnp.bool_)
    return params, data, weights, mask


def square(tree):
    return sum(jnp.sum(leaf.astype(jnp.float32) ** 2) for leaf in jax.tree.leaves(tree))


def program_of(n, client, variant):
    @fax.program(clients=n)
    def program(params, data, weights, mask):
        if variant == "side output":
            updates, losses = fax.map(client, fax.broadcast(params), data)
            return fax.mean(updates, weights=weights), losses, fax.max(losses)
        updates = fax.map(client, fax.broadcast(params), data)
        if variant == "plain":
            return fax.mean(updates)
        return fax.mean(updates, weights=weights, where=mask if variant == "masked" else None)

    return program


def client_of(variant):
    if variant == "side output":
        return lambda params, x: (update(params, x), loss(params, x))
    return update


VARIANTS = ["plain", "weighted", "masked", "side output"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_mean_of_updates(counts, variant):
    found = [temporary(program_of(n, client_of(variant), variant), *arguments(n)) for n in counts]
    assert max(found) <= 2
    assert max(found) - min(found) < 0.02


@pytest.mark.always("plain", "side output")
@pytest.mark.parametrize("variant", VARIANTS)
def test_its_gradient_with_respect_to_parameters_and_weights(counts, variant):
    found = []
    for n in counts:
        program = program_of(n, jax.checkpoint(client_of(variant)), variant)

        def objective(*args, program=program):
            out = program(*args)
            return square(out[0] if variant == "side output" else out)

        found.append(temporary(jax.grad(objective, argnums=(0, 2)), *arguments(n)))
    assert max(found) <= 3.1
    # A weight's own gradient is a number for each participant.
    assert max(found) - min(found) < 0.02


def test_the_gradient_of_a_scan_over_rounds(counts):
    """It holds the parameters of each round, and nothing of the participants."""
    rounds, found = 5, []
    for n in counts:
        round = program_of(n, jax.checkpoint(update), "weighted")

        def objective(params, data, weights, round=round):
            def step(params, _):
                new = round(params, data, weights, None)
                return [p + u for p, u in zip(params, new, strict=True)], None

            return square(jax.lax.scan(step, params, None, length=rounds)[0])

        found.append(temporary(jax.grad(objective, argnums=(0, 2)), *arguments(n)[:3]))
    assert max(found) - min(found) < 0.02
    assert max(found) <= 2 * rounds + 5


def test_its_jvp_through_a_hundred_local_steps(counts):
    found = []
    for n in counts:

        @fax.program(clients=n)
        def program(params, data, rate):
            return fax.mean(fax.map(lambda p, x: train(p, x, rate), fax.broadcast(params), data))

        def jvp(params, data, program=program):
            return jax.jvp(functools.partial(program, params, data), (0.1,), (1.0,))

        found.append(temporary(jvp, *arguments(n)[:2]))
    assert max(found) <= 3
    assert max(found) - min(found) < 0.02


@pytest.mark.always("masked")
@pytest.mark.parametrize("variant", ["plain", "weighted", "masked"])
def test_in_bfloat16(counts, variant):
    """Sums are held in float32. On CPU, XLA keeps a float32 copy of the parameters and the data.

    The copy of the data grows with the participants, so here they have a number each.
    """

    def client(params, x):
        return [-0.1 * (p - x) for p in params]

    values, gradients = [], []
    for n in counts:
        params, _, weights, mask = arguments(n, jnp.bfloat16)
        params = 2 * params  # twice as many layers, so that a copy of one of them is a small part
        args = params, jax.ShapeDtypeStruct((n,), jnp.bfloat16), weights, mask
        program = program_of(n, jax.checkpoint(client), variant)
        values.append(temporary(program, *args) / 2)
        objective = lambda *args, program=program: square(program(*args))  # noqa: E731
        gradients.append(temporary(jax.grad(objective, argnums=(0, 2)), *args) / 2)
    assert max(values) <= 2
    assert max(gradients) <= 3.1
    assert max(values) - min(values) < 0.02
    assert max(gradients) - min(gradients) < 0.02


def test_vectorized_batches_are_bounded():
    """With a batch size, memory grows with it and not with the number of participants."""

    def found(n, vectorize):
        @fax.program(clients=n)
        def program(params, data):
            sent = fax.broadcast(params)
            return fax.mean(fax.map(update, sent, data, vectorize=vectorize))

        return temporary(program, *arguments(n)[:2])

    assert abs(found(256, 4) - found(64, 4)) < 0.02
    assert found(64, 4) <= 2 * 4


def test_a_map_of_an_aggregator_alone_and_with_others():
    """It runs like the map that it is fused with, and by itself like a user's map by default."""

    def found(n, vectorize):
        @fax.program(clients=n)
        def program(x):
            rows = x if vectorize is None else fax.map(jnp.sin, x, vectorize=vectorize)
            return fax.sum(each(lambda x: jnp.sort(jnp.outer(x, x).ravel())[7], rows))

        rows = jax.ShapeDtypeStruct((n, UNITS), jnp.float32)
        return temporary(program, rows) * LAYERS  # in arrays of the client function

    assert found(64, None) == found(8, None) <= 1.1
    assert found(64, 1) <= 1.1
    assert 3 < found(64, 4) <= 4.1


def test_a_vmap_grows():
    """What the limits above are held against: the same mean of updates without fax."""

    def plain(params, data):
        updates = jax.vmap(update, (None, 0))(params, data)
        return jax.tree.map(lambda u: u.mean(0), updates)

    found = [temporary(plain, *arguments(n)[:2]) for n in (64, 256)]
    assert found[1] > 3 * found[0] > 12
