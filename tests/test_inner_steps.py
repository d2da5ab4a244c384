"""What an inner step of DiLoCo costs, read from the compiled program, against JAX by hand."""

import collections
import dataclasses
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fax
from fax.inspect._hlo import arrays, operand_arrays, parse
from fax.inspect._loops import runs

sys.path.append(str(pathlib.Path(__file__).parent.parent / "benchmarks"))

import diloco_by_hand

REPLICAS, STEPS, WIDTH = 2, 4, 16
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")


def loss(params, batch, key):
    return jnp.sum((jnp.tanh(batch["x"] @ params["in"]) @ params["out"]) ** 2, axis=-1)


def inner_loop(compiled):
    """What the innermost loop does with arrays of the size of a matrix, and the bytes for it."""
    work, nbytes = collections.Counter(), 0
    for run in runs(parse(compiled.as_text())):
        ours = run.frame.role == "body" and run.loops == 2
        if not ours or run.instruction.opcode in FREE:
            continue
        used = [*arrays(run.instruction.type), *operand_arrays(run.frame.own, run.instruction)]
        large = [array.nbytes for array in used if array.nbytes >= 4 * WIDTH * WIDTH]
        if large:
            work[run.instruction.opcode, run.instruction.type] += 1
            nbytes += sum(large)
    return work, nbytes


def test_an_inner_step_costs_what_it_costs_by_hand():
    """The same passes over parameters, gradients and moments, unless there may be padding."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(False):
        params = {name: jnp.eye(WIDTH) for name in ("in", "out")}
        x = rng.normal(size=(REPLICAS, STEPS, 3, WIDTH)).astype(np.float32)
        data = fax.data.InMemory({i: {"x": x[i].reshape(-1, WIDTH)} for i in range(REPLICAS)})
        cohort = next(
            fax.data.cohorts(
                data,
                REPLICAS,
                3,
                sampler="stream",
                shuffle=False,
                max_steps=STEPS,
                resident=False,
                placement="replicas",
            )
        )
        inner, outer = optax.adamw(0.01), optax.sgd(0.7, momentum=0.9, nesterov=True)
        init, round = diloco_by_hand.make_round(loss, inner, outer, REPLICAS)
        start = init(params), {"x": x[None]}
        by_hand = round.lower(*start).compile()

        algorithm = fax.algorithms.diloco(loss, inner, outer, replicas=REPLICAS)
        state = algorithm.init(params)
        step = jax.jit(algorithm.round)
        ours = step.lower(state, cohort).compile()
        padded = dataclasses.replace(cohort, mask=jnp.array(cohort.mask))
        with_padding = step.lower(state, padded).compile()

        expected = by_hand(*start)[0][0]
        for name, found in ours(state, cohort)[0].params.items():
            np.testing.assert_allclose(found, expected[name], rtol=1e-5, atol=1e-6)

    work, nbytes = inner_loop(by_hand)
    assert nbytes > 20 * 4 * WIDTH * WIDTH  # it has found the loop
    assert inner_loop(ours) == (work, nbytes)
    assert inner_loop(with_padding)[1] > 1.1 * nbytes
