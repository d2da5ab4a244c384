"""What steps of DiLoCo cost, read from the compiled program, against JAX by hand."""

import collections
import dataclasses
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

import fax
from fax.inspect._hlo import arrays, operand_arrays, parse
from fax.inspect._loops import runs

sys.path.append(str(pathlib.Path(__file__).parent.parent / "benchmarks"))

import diloco_by_hand

REPLICAS, STEPS, WIDTH = 2, 4, 16
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while")


def loss(params, batch, key):
    return jnp.sum((jnp.tanh(batch["x"] @ params["in"]) @ params["out"]) ** 2, axis=-1)


def passes(compiled, *, loops):
    """The instructions in so many loops with matrices, and the bytes that these read and write."""
    work, nbytes = collections.Counter(), 0
    for run in runs(parse(compiled.as_text())):
        if run.loops != loops or run.frame.role == "fusion" or run.instruction.opcode in FREE:
            continue
        used = [*arrays(run.instruction.type), *operand_arrays(run.frame.own, run.instruction)]
        large = [array.nbytes for array in used if array.nbytes >= 4 * WIDTH * WIDTH]
        if large:
            work[run.instruction.opcode, run.instruction.type] += 1
            nbytes += sum(large)
    return work, nbytes


def test_steps_cost_what_they_cost_by_hand():
    """With a replica on each device, inner steps are the same instructions. Those of an outer step
    read and write at most a tenth more: a replica could be absent, and would keep its parameters.
    """
    rng = np.random.default_rng(0)
    mesh = fax.sharding.make_mesh(devices=jax.devices()[:REPLICAS], replicas=REPLICAS)
    with jax.enable_x64(False), jax.set_mesh(mesh):
        params = {name: jnp.eye(WIDTH) for name in ("in", "out")}
        x = rng.normal(size=(REPLICAS, STEPS, 3, WIDTH)).astype(np.float32)
        data = fax.data.InMemory({i: {"x": x[i].reshape(-1, WIDTH)} for i in range(REPLICAS)})
        with fax.data.cohorts(
            data,
            REPLICAS,
            3,
            sampler="stream",
            shuffle=False,
            max_steps=STEPS,
            resident=False,
            placement="replicas",
        ) as rounds:
            cohort = next(rounds)
        inner, outer = optax.adamw(0.01), optax.sgd(0.7, momentum=0.9, nesterov=True)

        init = diloco_by_hand.make_round(loss, inner, outer, REPLICAS)[0]
        round = diloco_by_hand.make_round(loss, inner, outer, 1, axis="replicas")[1]
        specs = (P(), P(), P("replicas"), P("replicas")), P(None, "replicas")
        start = init(params), {"x": x[None]}
        spread = jax.shard_map(round, in_specs=specs, out_specs=specs, check_vma=False)
        by_hand = jax.jit(spread).lower(*start).compile()

        algorithm = fax.algorithms.diloco(loss, inner, outer, replicas=REPLICAS)
        state = algorithm.init(params)
        step = jax.jit(algorithm.round)
        ours = step.lower(state, cohort).compile()
        padded = dataclasses.replace(cohort, mask=jnp.array(cohort.mask))
        with_padding = step.lower(state, padded).compile()

        expected = by_hand(*start)[0][0]
        for name, found in ours(state, cohort)[0].params.items():
            np.testing.assert_allclose(found, expected[name], rtol=1e-5, atol=1e-6)

    work, nbytes = passes(by_hand, loops=1)
    assert nbytes > 20 * 4 * WIDTH * WIDTH  # it has found the loop
    assert passes(ours, loops=1) == (work, nbytes)
    assert passes(with_padding, loops=1)[1] > 1.1 * nbytes
    assert passes(ours, loops=0)[1] <= 1.1 * passes(by_hand, loops=0)[1]
