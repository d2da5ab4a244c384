"""Masks: who is left out reaches neither values nor gradients, wherever the gradient is taken.

The client function ``w log(d)`` is infinite, with infinite derivatives, at d = 0. What is
expected is computed by plain code on the participants that count alone.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from subsets import alike

import fax

D = np.array([1.0, 0.0, 2.0, 0.0, 3.0])
MASK = D > 0
W = np.float64(0.7)


def client(w, d):
    return w * jnp.log(d)


BETWEEN = {
    "nothing": lambda u, w: u,
    "a division": lambda u, w: u / 2,
    "a server scalar": lambda u, w: u * w,
    "a difference": lambda u, w: u - w,
    "a row of the server's": lambda u, w: (u[:, None] - jnp.stack([w, 2 * w]))[:, 1],
    "a power": lambda u, w: u**2,
    "a reshape": lambda u, w: u.reshape(-1, 1, 1)[:, 0, 0],
    "a transpose": lambda u, w: jnp.stack([u, u], 1)[:, None].transpose(0, 2, 1).sum((1, 2)),
    "a concatenation": lambda u, w: jnp.concatenate([u[:, None], w * u[:, None]], 1).sum(1),
    "a function": lambda u, w: jnp.tanh(u),
    "a stopped gradient": lambda u, w: u + jax.lax.stop_gradient(u),
    "a jitted function": lambda u, w: jnp.clip(u, -0.2, 0.4),
    "a selection": lambda u, w: jnp.where(u > 0.3, u, 0),
}


@functools.cache
def expected(between):
    def plain(w, d):
        return jnp.mean(between(client(w, d), w))

    value, (dw, dd) = jax.jit(jax.value_and_grad(plain, (0, 1)))(W, D[MASK])
    of_all = np.zeros_like(D)
    of_all[MASK] = dd
    return value, (dw, of_all)


def program(between, vectorize=None):
    @fax.program(clients=len(D))
    def masked(w, d):
        updates = fax.map(client, fax.broadcast(w), d, vectorize=vectorize)
        return fax.mean(between(updates, w), where=d > 0)

    return masked


@pytest.mark.parametrize("between", BETWEEN)
def test_code_between_map_and_reduction(between):
    between = BETWEEN[between]
    found = jax.value_and_grad(program(between), (0, 1))(W, D)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), found, expected(between)
    )


@pytest.mark.parametrize("between", [name for name in BETWEEN if name != "a selection"])
def test_gradients_taken_inside_of_a_program(between):
    between = BETWEEN[between]

    @fax.program(clients=len(D))
    def inside(w, d):
        def loss(w, d):
            updates = fax.map(client, fax.broadcast(w), d)
            return fax.mean(between(updates, w), where=MASK)

        return jax.value_and_grad(loss, (0, 1))(w, d)

    found = inside(W, D)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), found, expected(between)
    )


def test_gradients_taken_inside_of_a_client_function():
    @fax.program(regions=2, clients=len(D))
    def nested(w, d):
        def region(w, d):
            def loss(w):
                updates = fax.map(client, fax.broadcast(w), d)
                return fax.mean(updates, where=d > 0)

            return jax.grad(loss)(w)

        return fax.map(region, fax.broadcast(w, placement="regions"), d, placement="regions")

    wanted = expected(BETWEEN["nothing"])[1][0]
    np.testing.assert_allclose(nested(W, np.stack([D, D])), [wanted, wanted], rtol=1e-12)


def test_vmap_inside_and_a_gradient_outside():
    @fax.program(clients=len(D))
    def swept(ws, d):
        def mean(w):
            return fax.mean(fax.map(client, fax.broadcast(w), d), where=d > 0)

        return jnp.sum(jax.vmap(mean)(ws))

    wanted = expected(BETWEEN["nothing"])[1][0]
    np.testing.assert_allclose(jax.grad(swept)(np.array([0.7, 0.7]), D), [wanted, wanted])


# Outputs of different masks

OTHER = D != 1


@fax.program(clients=len(D))
def two_means(w, d, mask, other):
    updates, losses = fax.map(
        lambda w, d: (w * jnp.log(d), (w + d) * jnp.log(jnp.abs(1 - d))), fax.broadcast(w), d
    )
    return fax.mean(updates, where=mask), fax.mean(losses, where=other)


@fax.program(clients=len(D))
def mean_and_metric(w, d, mask, other):
    del other
    updates, squares = fax.map(lambda w, d: (w * jnp.log(d), w * w * d), fax.broadcast(w), d)
    return fax.mean(updates, where=mask), fax.mean(squares)


def plain_two_means(w, d, mask, other):
    d, e = d[np.asarray(mask)], d[np.asarray(other)]
    return jnp.mean(w * jnp.log(d)), jnp.mean((w + e) * jnp.log(jnp.abs(1 - e)))


def plain_mean_and_metric(w, d, mask, other):
    return jnp.mean(w * jnp.log(d[np.asarray(mask)])), jnp.mean(w * w * d)


PAIRS = [(two_means, plain_two_means), (mean_and_metric, plain_mean_and_metric)]


def loss(fn):
    return lambda w, d: sum(jnp.sum(x**2) for x in fn(w, d, MASK, OTHER))


@pytest.mark.always(
    "<lambda>1-mean_and_metric-plain_mean_and_metric",
    "<lambda>2-two_means-plain_two_means",
    "<lambda>5-mean_and_metric-plain_mean_and_metric",
)
@pytest.mark.kinds(found=alike, plain=alike, transform=alike)
@pytest.mark.parametrize(("found", "plain"), PAIRS)
@pytest.mark.parametrize(
    "transform",
    [
        lambda f: jax.grad(f, (0, 1)),
        lambda f: jax.jit(jax.grad(jax.checkpoint(f), (0, 1))),
        lambda f: jax.hessian(f),
        lambda f: jax.jacrev(jax.jacrev(f)),
        lambda f: jax.jacfwd(jax.jacrev(f, (0, 1))),
        lambda f: lambda w, d: jax.vmap(jax.grad(f, (0, 1)), (0, None))(jnp.array([w, 2 * w]), d),
    ],
)
def test_outputs_of_different_masks(found, plain, transform):
    got, wanted = (jax.jit(transform(loss(fn)))(W, D) for fn in (found, plain))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10), got, wanted)


@pytest.mark.parametrize(("found", "plain"), PAIRS)
def test_outputs_of_different_masks_that_are_batched(found, plain):
    def total(w):
        outs = jax.vmap(found, (None, None, 0, 0))(
            w, D, np.stack([MASK, MASK]), np.stack([OTHER, OTHER])
        )
        return sum(jnp.sum(x**2) for x in outs)

    @jax.jit
    def slopes(w):
        return (
            jax.grad(lambda w: 2 * loss(plain)(w, D))(w),
            jax.grad(total)(w),
            jax.jacfwd(total)(w),
        )

    wanted, *found = slopes(W)
    for slope in found:
        np.testing.assert_allclose(slope, wanted, rtol=1e-12)


@jax.custom_vjp
def log(x):
    return jnp.log(x)


log.defvjp(lambda x: (log(x), x), lambda x, ct: (ct / x,))


def test_a_client_with_a_custom_vjp_that_is_batched():
    """Once, and once more: JAX cannot batch a derivative that such a rule has made."""

    @fax.program(clients=len(D))
    def program(w, d, mask, other):
        updates = fax.map(lambda w, d: w**2 * log(d), fax.broadcast(w), d)
        return fax.mean(updates, where=mask), fax.sum(updates, where=other)

    masks, others = np.stack([MASK, MASK & OTHER]), np.stack([OTHER & MASK, MASK])

    def total(w, *axes):
        batched = program
        for axis in axes:
            batched = jax.vmap(batched, axis)
        return sum(map(jnp.sum, batched(w, D, masks, others)))

    once, twice = (None, None, 0, 0), (0, None, None, None)
    slopes = jax.jit(
        lambda w: (
            jax.grad(total)(w, once),
            jax.grad(lambda w: total(jnp.stack([w, w]), once, twice))(w),
        )
    )(W)
    logs = [np.log(D[own]) for own in (*masks, *others)]
    wanted = 2 * W * (logs[0].mean() + logs[1].mean() + logs[2].sum() + logs[3].sum())
    np.testing.assert_allclose(slopes, [wanted, 2 * wanted], rtol=1e-12)


def test_a_gradient_with_one_mask_is_one_round():
    jaxpr = jax.make_jaxpr(jax.grad(program(BETWEEN["a division"])))(W, D)
    rounds = [eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "federated_map"]
    assert [str(eqn.params["out"]) for eqn in rounds][-1] == "(sum where 0)"
    assert len(rounds) == 2
