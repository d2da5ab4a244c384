"""What jaxprs promise: one map per round, no copies of server values, no work done twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import subsets
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxprs import count, equations, operators, shapes_between_maps

import fax

N = 7
P = jnp.linspace(0.5, 1.5, 4)
D = jnp.linspace(0.0, 1.0, N * 4).reshape(N, 4)
W = jnp.arange(1.0, N + 1)
M = jnp.arange(N) % 3 != 1


def client(p, d):
    return jnp.tanh(p * d) * p


def program(body):
    return fax.program(clients=N)(body)


@program
def mean_round(p, d):
    return fax.mean(fax.map(client, fax.broadcast(p), d))


@program
def weighted_round(p, d, w, m):
    return fax.mean(fax.map(jax.checkpoint(client), fax.broadcast(p), d), weights=w, where=m)


def squares(fn):
    return lambda *args: sum(jnp.sum(y**2) for y in jax.tree.leaves(fn(*args)))


# Fusion


def test_a_round_is_one_map():
    assert operators(mean_round, P, D) == ["federated_map (server, placed) (sum)"]
    masked = ["federated_map (server, placed, placed, placed) (sum where 0, sum where 0)"]
    assert operators(weighted_round, P, D, W, M) == masked


def test_the_gradient_of_a_round_is_a_round():
    forward, backward = operators(jax.grad(squares(mean_round)), P, D)
    assert forward.startswith("federated_map (server, placed) (sum, placed")
    assert backward.startswith("federated_map (placed")
    assert backward.endswith("d server) (sum)")


def test_the_gradient_of_a_checkpointed_round_stores_nothing():
    gradient = jax.grad(squares(weighted_round), argnums=(0, 2))
    assert operators(gradient, P, D, W, M) == [
        "federated_map (server, placed, placed, placed) (sum where 0, sum where 0)",
        "federated_map (server, placed, placed, placed, d server, d server) "
        "(sum where 0, placed where 0)",
    ]


def test_products_with_several_weights_stay_in_the_checkpoint():
    """Outside of it, the gradient would need every participant's product with the first weight."""

    @program
    def twice_weighted(p, d, w, v):
        rows = fax.map(jax.checkpoint(client), fax.broadcast(p), d)
        return fax.sum(v[:, None] * (w[:, None] * rows))

    gradient = jax.grad(squares(twice_weighted), argnums=(0, 2, 3))
    forward, _ = operators(gradient, P, D, W, W)
    assert forward == "federated_map (server, placed, placed, placed) (sum)"


APART = {
    "reshape": lambda y: y.reshape(3, 3, 1),
    "slice": lambda y: y[:, 1:3],
    "broadcast": lambda y: jnp.broadcast_to(y[:, None], (3, 2, 3)),
    "transpose": lambda y: jnp.swapaxes(y[:, :, None], 1, 2),
}
MIXED = {
    "reshape": lambda y: jax.lax.reshape(y, (3, 3), (1, 0)),
    "broadcast": lambda y: jax.lax.broadcast_in_dim(y, (3, 3, 3), (1, 2)),
    "transpose": lambda y: y.T,
}


def test_operations_that_keep_rows_apart_join_maps():
    """As many columns as rows, so that shapes do not tell them apart."""
    x = np.arange(9.0).reshape(3, 3)

    def between(fn):
        return fax.program(clients=3)(lambda x: fax.sum(fax.map(jnp.sin, fn(fax.map(jnp.cos, x)))))

    every = [*APART.values(), *MIXED.values()]
    found = jax.jit(lambda x: [between(fn)(x) for fn in every])(x)
    for fn, y in zip(every, found, strict=True):
        assert len(operators(between(fn), x)) == (1 if fn in APART.values() else 2)
        np.testing.assert_allclose(y, np.sin(fn(jnp.cos(x))).sum(0), rtol=1e-12)


def test_a_scan_over_rounds_computes_nothing_of_the_clients_in_advance():
    """JAX looks for what a loop repeats; of the clients that would be n intermediate values."""

    def client_of_data(p, d):
        return jnp.sin(d) * p

    @program
    def rounds(p, d):
        def step(p, _):
            return p - fax.mean(fax.map(jax.checkpoint(client_of_data), fax.broadcast(p), d)), None

        return jax.lax.scan(step, p, None, length=3)[0]

    gradient = jax.grad(squares(rounds))
    assert operators(gradient, P, D) == [
        "federated_map (server, placed) (sum)",
        "federated_map (placed, d server) (sum)",
    ]

    def plain(p):
        return p - jax.vmap(client_of_data, (None, 0))(p, D).mean(0)

    reference = jax.grad(lambda p: jnp.sum(plain(plain(plain(p))) ** 2))(P)
    np.testing.assert_allclose(gradient(P, D), reference, rtol=1e-12)


def test_printed_jaxprs_name_placement_size_and_modes():
    text = " ".join(str(jax.make_jaxpr(mean_round)(P, D)).split())
    for part in ("federated_map[", "placement=clients", f"size={N}", "in=(server, placed)"):
        assert part in text
    assert "out=(sum)" in text

    @program
    def others(x, d):
        x = fax.sum(fax.broadcast(x)) + fax.mean(fax.distribute(d)).sum()
        return x, fax.collect(fax.broadcast(x)), fax.max(d), fax.min(d)

    text = " ".join(str(jax.make_jaxpr(others)(P, D)).split())
    for name in ("broadcast", "sum", "distribute", "mean", "collect", "max", "min"):
        assert f"{name}[placement=clients size={N}]" in text


def test_a_value_reduced_and_returned_leaves_its_map_in_both_modes():
    @program
    def both(p, d):
        y = fax.map(client, fax.broadcast(p), d)
        return fax.mean(y), y, fax.max(y), fax.collect(y)

    assert operators(both, P, D) == [
        "federated_map (server, placed) (placed, sum, max)",
        "collect",
    ]


def test_chains_of_maps_become_one():
    @program
    def chain(p, d):
        y = fax.map(client, fax.broadcast(p), d)
        z = fax.map(lambda y, p: y - p, y, fax.broadcast(p))
        return fax.sum(z)

    assert operators(chain, P, D) == ["federated_map (server, placed) (sum)"]


def test_maps_with_something_between_them_stay_apart():
    @program
    def centered(p, d):
        y = fax.map(client, fax.broadcast(p), d)
        z = fax.map(lambda y, m: (y - m) ** 2, y, fax.broadcast(fax.mean(y)))
        return fax.mean(z)

    assert operators(centered, P, D) == [
        "federated_map (server, placed) (placed, sum)",
        "federated_map (placed, server) (sum)",
    ]
    y = jax.vmap(client, (None, 0))(P, D)
    np.testing.assert_allclose(centered(P, D), y.var(0), rtol=1e-12)


def test_a_map_is_merged_past_what_does_not_concern_it():
    @program
    def crossed(p, d):
        y = fax.map(client, fax.broadcast(p), d)
        total = fax.sum(y)
        after = jnp.sin(total)
        q = jnp.cos(p)
        return fax.sum(fax.map(lambda y, q: y * q, y, fax.broadcast(q))), after

    names = operators(crossed, P, D)
    assert names == ["federated_map (server, placed, server) (sum, sum)"]
    y = jax.vmap(client, (None, 0))(P, D)
    found, after = crossed(P, D)
    np.testing.assert_allclose(found, (y * jnp.cos(P)).sum(0), rtol=1e-12)
    np.testing.assert_allclose(after, jnp.sin(y.sum(0)), rtol=1e-12)


def test_rows_closed_over_as_a_server_value_are_not_merged():
    @program
    def everybody(p, d):
        y = fax.map(client, fax.broadcast(p), d)
        return fax.sum(fax.map(lambda d: d * y.sum(), d))

    assert len(operators(everybody, P, D)) == 2
    y = jax.vmap(client, (None, 0))(P, D)
    np.testing.assert_allclose(everybody(P, D), D.sum(0) * y.sum(), rtol=1e-12)


@pytest.mark.parametrize(("first", "second", "maps"), [(2, 3, 2), (2, 2, 1), (None, 2, 2)])
def test_maps_with_different_batch_sizes_stay_apart(first, second, maps):
    @program
    def two(d):
        y = fax.map(jnp.sin, d, vectorize=first)
        return fax.sum(fax.map(jnp.cos, y, vectorize=second))

    assert len(operators(two, D)) == maps


def test_iterating_over_no_rows_is_no_map():
    @program
    def nothing(d):
        assert not list(jax.random.split(jax.random.key(0), 0))
        return fax.sum(d)

    np.testing.assert_allclose(nothing(D), D.sum(0), rtol=1e-12)


def test_fusion_sees_through_pytrees_casts_and_jit():
    @jax.jit
    def helper(params, data):
        updates = fax.map(lambda p, d: {"u": client(p, d), "n": jnp.sum(d)}, *params, data)
        return [updates["n"], (updates["u"],)]

    @program
    def shuffled(p, d):
        flat, restore = jax.tree.flatten({"p": p.reshape(2, 2)})
        params = jax.tree.unflatten(restore, [flat[0].reshape(4).astype(jnp.float32)])
        n, (u,) = helper([fax.broadcast(params["p"]).astype(p.dtype)], d)
        return fax.mean(u.astype(jnp.float32)), fax.sum(-n)

    assert operators(shuffled, P, D) == ["federated_map (server, placed) (sum, sum)"]
    u = jax.vmap(client, (None, 0))(P.astype(jnp.float32).astype(P.dtype), D)
    mean, total = shuffled(P, D)
    np.testing.assert_allclose(mean, u.astype(jnp.float32).mean(0), rtol=1e-6)
    np.testing.assert_allclose(total, -D.sum(), rtol=1e-12)


def test_fusion_finds_rounds_in_loops_branches_and_checkpoints():
    @program
    def rounds(p, d):
        def step(p, _):
            return p - 0.1 * fax.mean(fax.map(client, fax.broadcast(p), d)), fax.sum(d)

        p, _ = jax.lax.scan(step, p, None, length=3)
        p = jax.lax.fori_loop(0, 2, lambda i, p: step(p, None)[0], p)
        p = jax.lax.cond(p[0] > 0, lambda p: step(p, None)[0], lambda p: p, p)
        return jax.checkpoint(lambda p: step(p, None)[0])(p)

    names = [name for name in operators(rounds, P, D) if name != "sum"]
    assert names == ["federated_map (server, placed) (sum)"] * 4


def test_nested_placements_fuse_at_both_levels():
    @fax.program(regions=2, clients=3)
    def nested(p, d):
        def region(p, d):
            return fax.mean(fax.map(client, fax.broadcast(p), d))

        sent = fax.broadcast(p, placement="regions")
        return fax.sum(fax.map(region, sent, d, placement="regions"), placement="regions")

    jaxpr = jax.make_jaxpr(nested)(P, jnp.ones((2, 3, 4)))
    maps = [e for e in equations(jaxpr) if "placement" in e.params]
    shown = [(e.params["placement"], str(e.params["in"]), str(e.params["out"])) for e in maps]
    assert shown == [
        ("regions", "(server, placed)", "(sum)"),
        ("clients", "(server, placed)", "(sum)"),
    ]


def test_a_gradient_taken_inside_a_program_is_fused_too():
    @program
    def inner_gradient(p, d):
        def loss(p):
            return fax.mean(fax.map(lambda p, d: jnp.sum((p - d) ** 2), fax.broadcast(p), d))

        return p - 0.5 * jax.grad(loss)(p)

    names = operators(inner_gradient, P, D)
    assert all(name.startswith("federated_map") for name in names)
    assert names[-1].endswith("(sum)")
    np.testing.assert_allclose(inner_gradient(P, D), D.mean(0), rtol=1e-12)


# Copies


@pytest.mark.parametrize("mode", ["grad", "jvp", "hessian"])
def test_no_server_value_is_copied_for_the_participants(mode):
    big = jnp.linspace(0.1, 1.0, 50)  # the size of a model; the data of a client has 4 numbers

    def update(p, d):
        return jnp.cos(p) * jnp.sum(d) + jnp.sin(p.astype(jnp.float32)) ** 2

    @program
    def updates(p, d):
        return fax.mean(fax.map(jax.jit(update), fax.broadcast(p), d))

    derivative = {
        "grad": jax.grad(squares(updates)),
        "jvp": lambda p, d: jax.jvp(lambda p: updates(p, d), (p,), (p,)),
        "hessian": jax.hessian(lambda p, d: squares(updates)(p, d)),
    }[mode]
    shapes = shapes_between_maps(derivative, big, D)
    assert not [s for s in shapes if 50 in s and N in s]
    assert count(derivative, "broadcast", big, D) == 0


def test_residuals_of_server_values_are_computed_by_the_server():
    @program
    def updates(p, d):
        return fax.sum(fax.map(lambda p, d: jnp.sin(p) * jnp.sum(d), fax.broadcast(p), d))

    gradient = jax.grad(squares(updates))
    outside = [
        e.primitive.name for e in equations(jax.make_jaxpr(gradient)(P, D), inside_maps=False)
    ]
    assert outside.count("cos") == 1
    assert count(gradient, "cos", P, D) == 1
    assert count(gradient, "sin", P, D) == 1


def test_without_fusion_a_mean_of_updates_would_be_n_copies():
    """The same program without fax: the shapes that the tests above forbid do occur."""

    def plain(p, d):
        return jax.vmap(lambda p, d: jnp.cos(p) * jnp.sum(d))(jnp.broadcast_to(p, (N, 50)), d).mean(
            0
        )

    assert (N, 50) in shapes_between_maps(jax.grad(squares(plain)), jnp.ones(50), D)


# Work

marker_p = Primitive("marker")
marker_p.def_impl(lambda x: x)
marker_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(marker_p, mlir.lower_fun(lambda x: x, multiple_results=False))
ad.deflinear2(marker_p, lambda ct, x: [ct])
batching.primitive_batchers[marker_p] = lambda xs, dims: (marker_p.bind(*xs), dims[0])


def marked(p, d):
    return jnp.sin(marker_p.bind(jnp.tanh(p * d)))


def test_client_work_is_never_duplicated():
    @program
    def shared(p, d, w, m):
        y = fax.map(marked, fax.broadcast(p), d)
        z = fax.map(jnp.cos, y)
        return fax.mean(y, weights=w), fax.mean(z, where=m), fax.sum(y, where=m), fax.max(z), y

    args = (P, D, W, M)
    assert count(shared, "marker", *args) == 1
    # Primal and tangent; linear map and its transpose.
    assert count(lambda p: jax.jvp(lambda p: shared(p, D, W, M), (p,), (p,)), "marker", P) == 2
    gradient = jax.grad(lambda *a: squares(lambda *a: shared(*a)[:3])(*a))
    assert count(gradient, "marker", *args) == 1
    assert count(gradient, "tanh", *args) == 1


def test_a_checkpointed_client_is_recomputed_once():
    @program
    def mean(p, d):
        return fax.mean(fax.map(jax.checkpoint(marked), fax.broadcast(p), d))

    assert count(mean, "tanh", P, D) == 1
    assert count(jax.grad(squares(mean)), "tanh", P, D) == 2


@pytest.mark.kinds(transform=lambda name: "grad" in name, vectorize=subsets.alike)
@pytest.mark.parametrize("transform", ["eager", "jit", "grad", "jit grad", "vmap", "grad scan"])
@pytest.mark.parametrize("vectorize", [1, 3, N])
def test_effects_run_once_per_participant(transform, vectorize):
    seen = []

    @program
    def noisy(x):
        def client(row):
            jax.debug.callback(lambda r: seen.append(float(r)), row)
            return jnp.sin(row)

        y = fax.map(client, x, vectorize=vectorize)
        return fax.mean(fax.map(jnp.cos, y, vectorize=vectorize)) + fax.sum(y)

    fn = {
        "eager": noisy,
        "jit": jax.jit(noisy),
        "grad": jax.grad(noisy),
        "jit grad": jax.jit(jax.grad(noisy)),
        "vmap": lambda x: jax.vmap(noisy)(x[None]),
        "grad scan": jax.grad(
            lambda x: jax.lax.scan(lambda c, _: (c * noisy(x), 0), 1.0, length=1)[0]
        ),
    }[transform]
    fn(W)
    jax.effects_barrier()
    assert sorted(seen) == W.tolist()


def test_effects_do_not_run_again_for_a_mask():
    """A gradient computes masks once more, and what is recomputed for it says something."""

    def noisy(**masks):
        @jax.checkpoint
        def client(row):
            jax.debug.print("here")
            return jnp.sin(row)

        return lambda x: fax.sum(fax.map(client, x), **masks)

    masked, everybody = (
        count(jax.grad(program(noisy(**masks))), "debug_print", W)
        for masks in ({"where": W > 0}, {})
    )
    assert masked == everybody > 0


def test_two_maps_with_effects_keep_their_order():
    @program
    def noisy(x):
        def say(word):
            def client(row):
                jax.debug.print(word)
                return row

            return client

        return fax.sum(fax.map(say("second"), fax.map(say("first"), x)))

    assert len([name for name in operators(noisy, W) if name.startswith("federated_map")]) == 2


def test_a_client_function_without_a_batching_rule_runs_one_at_a_time():
    lonely_p = Primitive("lonely")
    lonely_p.def_abstract_eval(lambda x: x)
    mlir.register_lowering(lonely_p, mlir.lower_fun(lambda x: 2 * x, multiple_results=False))

    def double(vectorize):
        return program(lambda x: fax.sum(fax.map(lonely_p.bind, x, vectorize=vectorize)))

    assert double(1)(W) == double(None)(W) == 2 * W.sum()
    with pytest.raises(NotImplementedError, match="lonely"):
        double(2)(W)


def test_a_branch_in_a_client_function_is_a_branch_at_batch_size_one():
    def step(x):
        return jax.lax.cond(x > 3, lambda x: jnp.linalg.inv(jnp.eye(9) * x).sum(), lambda x: x, x)

    def text(vectorize):
        fn = program(lambda x: fax.sum(fax.map(step, x, vectorize=vectorize)))
        return jax.jit(fn).lower(W).as_text()

    assert "stablehlo.case" in text(1)
    assert "stablehlo.case" not in text(N)
