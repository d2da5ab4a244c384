"""What Streaming DiLoCo sends is in flight while replicas take steps, in the TPU's own schedule.

The TPU compiler decides when a transfer between slices is sent and received. The text of a compiled
program has its instructions in the order in which they run.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tpus
from jax import lax
from tpus import shaped

import fax
from fax.algorithms import streaming_diloco
from fax.inspect._hlo import arrays, parse

pytestmark = pytest.mark.long  # test_streaming_diloco.py looks at what XLA makes for CPUs
tpus.require()

TILE = 8 * 128 * 4  # bytes: smaller arrays take one
LAYERS, WIDTH, HIDDEN, WORDS, LENGTH, BATCH = 4, 256, 512, 256, 16, 4
SHAPES = {
    "embed": (WORDS, WIDTH),
    "layers": {
        "down": (LAYERS, HIDDEN, WIDTH),
        "scale": (LAYERS, WIDTH),
        "up": (LAYERS, WIDTH, HIDDEN),
    },
    "scale": (WIDTH,),
}
SPECS = {
    "embed": jax.P(None, "model"),
    "layers": {
        "down": jax.P(None, "model", "data"),
        "scale": jax.P(),
        "up": jax.P(None, "data", "model"),
    },
    "scale": jax.P(),
}


def loss(params, batch, key):
    """Of a language model with a loop over its layers, sharded over ``data`` and ``model``."""

    def norm(x, scale):
        return x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * (1 + scale)

    def split(x, *spec):
        return lax.with_sharding_constraint(x, jax.P("data", *spec))

    def layer(x, own):
        hidden = jax.nn.gelu(norm(x, own["scale"]) @ own["up"])
        return split(x + hidden @ own["down"], None, None), None

    words = split(batch["words"], None)
    x = split(params["embed"][words[:, :-1]], None, None)
    x, _ = lax.scan(jax.checkpoint(layer), x, params["layers"])
    logits = norm(x, params["scale"]) @ params["embed"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, words[:, 1:]).mean(-1)


def compiled(slices, fragments, tau, steps):
    """The text of a round on slices of 2 x 2 chips, with one replica on each."""
    algorithm = streaming_diloco(
        loss,
        optax.adamw(1e-3),
        replicas=slices,
        steps=steps,
        fragments=fragments,
        tau=tau,
        sharding=SPECS,
    )
    words = {str(i): {"words": np.zeros((BATCH, LENGTH), np.int32)} for i in range(slices)}
    rounds = fax.data.cohorts(
        *(fax.data.InMemory(words), slices, BATCH),
        sampler="stream",
        max_steps=steps,
        placement="replicas",
        resident=False,
    )
    cohort = next(rounds)
    with jax.set_mesh(tpus.mesh(slices=slices, replicas=slices, data=2, model=2)):
        params = jax.tree.map(
            lambda shape, spec: shaped(shape, *spec),
            SHAPES,
            SPECS,
            is_leaf=lambda x: type(x) is tuple,
        )
        state = fax.sharding.eval_shape(algorithm.init, params)
        rows = jax.tree.map(lambda x: shaped(x.shape, "replicas", dtype=x.dtype), cohort)
        return jax.jit(algorithm.round, donate_argnums=0).lower(state, rows).compile().as_text()


def transfers(text):
    """What is sent between slices, and the number of loops of steps.

    Of each transfer its bytes, how many loops end before it is sent, and how many before it is
    received.
    """
    module = parse(text)
    loops, sent, awaited, found = 0, {}, {}, []
    for name, each in module.computations[module.entry].items():
        transfer = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', each.attributes)
        if each.opcode == "while" and "checkpoint/while" in each.attributes:
            loops += 1
        elif each.opcode == "send":
            sent[transfer[1]] = loops
        elif each.opcode == "recv":
            awaited[name] = transfer[1]
        elif each.opcode == "recv-done":
            (array,) = arrays(each.type)
            found.append((array.nbytes, sent.pop(awaited.pop(each.inputs[0])), loops))
    assert not sent
    assert not awaited
    return found, loops


@pytest.mark.parametrize("later", [0, 1])
@pytest.mark.parametrize("tau", [1, 2, 5])
@pytest.mark.parametrize("fragments", [2, 4])
@pytest.mark.parametrize("slices", [2, 4])
def test_every_transfer_is_received_after_the_steps_that_it_may_take(slices, fragments, tau, later):
    """Where one fragment lands, the next is sent at once, or a step later."""
    steps = fragments * (tau + later)
    with jax.enable_x64(False):
        found, loops = transfers(compiled(slices, fragments, tau, steps))
    # One step has the loops over layers, forward and backward; several are a loop themselves.
    delay = 2 if tau == 1 else 1
    between = steps // fragments - tau
    period = delay + 2 * between
    assert loops == fragments * period
    streamed = [each for each in found if each[0] > TILE]
    assert len(streamed) == fragments
    for nbytes, sent, received in streamed:
        assert received - sent == delay, (nbytes, sent, received)
    assert {sent for _, sent, _ in streamed} == {p * period + 2 * between for p in range(fragments)}
    # The number of replicas that take part may be known, and sent, before the first step.
    *counts, (_, sent, received) = [each for each in found if each[0] <= TILE]
    assert sent == received == loops  # the metrics
    assert len(counts) <= 1
    assert all(sent == 0 for _, sent, _ in counts)


@pytest.mark.parametrize(
    ("fragments", "tau", "steps", "expected"),
    [
        (2, 5, 8, [(2, 4), (3, 5)]),  # after steps 1 and 3 of 8, in loops of 1, 2, 3 and 2 steps
        (4, 4, 8, [(2, 10), (4, 12), (6, 14), (8, 16)]),  # after steps 1 to 4, all steps alone
    ],
)
def test_fragments_are_in_flight_at_the_same_time(fragments, tau, steps, expected):
    """If τ > H / P. A fragment crosses as one array of bytes, and metrics are smaller."""
    with jax.enable_x64(False):
        found, _ = transfers(compiled(2, fragments, tau, steps))
    sent = [(sent, received) for nbytes, sent, received in found if nbytes > TILE]
    assert sent == expected
