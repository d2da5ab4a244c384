"""DiLoCo on Python's standard library: what the example prints, and what it compares with."""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scripts import EXAMPLES, is_figure, numbers

import fax

WIDTH, BLOCKS, LENGTH, CHARACTERS = 16, 1, 16, 101
ROUNDS, H = 3, 3
# A small model, and little time for the compiler, which would take longer than all else.
SMALL = f"""
import jax, diloco_pystdlib as example
jax.config.update("jax_disable_most_optimizations", True)
example.WIDTH, example.BLOCKS, example.LENGTH = {WIDTH}, {BLOCKS}, {LENGTH}
example.EVALUATIONS = 1
example.main()
"""


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))
    try:
        import diloco_pystdlib

        yield diloco_pystdlib
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.mark.long
def test_the_table_says_what_is_learned_and_what_is_sent(run, tmp_path):
    printed = run("-c", SMALL, f"--rounds={ROUNDS}", f"--inner-steps={H}")

    shapes = [(CHARACTERS, WIDTH), (LENGTH, WIDTH), (WIDTH,), (WIDTH,)]  # and the last norm
    shapes += [(WIDTH, CHARACTERS), (CHARACTERS,)]
    for _ in range(BLOCKS):
        shapes += [(WIDTH,)] * 4 + [(WIDTH, n * WIDTH) for n in (3, 1, 4)] + [(4 * WIDTH, WIDTH)]
    size = sum(map(np.prod, shapes))
    assert f"{size:,} parameters, 4 replicas, {ROUNDS * H} steps, H = {H}, held" in printed
    (start,) = numbers(r"held-out loss ([\d.]+) at the start", printed)
    assert np.log(CHARACTERS) < start < np.log(CHARACTERS) + 1
    gradients = 4 * size * ROUNDS * H
    bytes_sent = {
        "data-parallel, 1 x batch": gradients,
        "data-parallel, 4 x batch": gradients,
        "DiLoCo": 4 * size * ROUNDS,
        "Streaming DiLoCo": (size / 2 + 4 * len(shapes)) * ROUNDS,  # and a scale for each leaf
    }

    row = re.compile(r"(\w.*?)\s+([\d.]+)\s+([-+][\d.]+)%\s+([\d,]+)\s+1/(\d+)")
    rows = {found[1]: found.groups()[1:] for found in row.finditer(printed)}
    assert list(rows) == list(bytes_sent)
    reference = float(rows["data-parallel, 4 x batch"][0])
    for name, (loss, gap, sent, share) in rows.items():
        assert float(loss) < start - 0.1
        assert float(gap) == pytest.approx(100 * (float(loss) / reference - 1), abs=0.06)
        assert int(sent.replace(",", "")) == round(bytes_sent[name])
        assert int(share) == round(gradients / bytes_sent[name])
    assert is_figure(tmp_path / "runs" / "diloco_pystdlib.png")


def test_data_parallel_steps_are_those_of_one_large_batch(example):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4, 12, 3)), rng.normal(size=(4, 12))

    def loss(params, batch, key):
        return (batch["x"] @ params - batch["y"]) ** 2, {}

    algorithm = example.data_parallel(loss, optax.sgd(0.05, momentum=0.9))
    data = fax.data.InMemory({str(i): {"x": x[i], "y": y[i]} for i in range(4)})
    cohorts = fax.data.cohorts(
        data, 4, 3, sampler="stream", shuffle=False, max_steps=2, placement="replicas"
    )
    state, train = algorithm.init(jnp.zeros(3)), jax.jit(algorithm.round)
    w, v, losses = np.zeros(3), np.zeros(3), []
    for number in range(2):
        state, metrics = train(state, next(cohorts))
        for step in range(2 * number, 2 * number + 2):
            rows = slice(3 * step, 3 * step + 3)
            own_x, own_y = x[:, rows].reshape(12, 3), y[:, rows].reshape(12)
            residuals = own_x @ w - own_y
            losses.append(np.mean(residuals**2))
            v = 0.9 * v + 2 * own_x.T @ residuals / 12
            w = w - 0.05 * v
        np.testing.assert_allclose(algorithm.params(state), w, rtol=1e-12)
        np.testing.assert_allclose(metrics["loss"], np.mean(losses[-2:]), rtol=1e-12)
        np.testing.assert_array_equal(metrics["replicas/bits"], [2 * 3 * 64] * 4)
    cohorts.close()


def test_shards_are_whole_modules_and_about_equally_large(example):
    sizes = [1, 9, 4, 2, 7, 3, 3, 5]
    modules, first = {}, 0
    for number, size in enumerate(sizes):
        x = np.arange(first, first + size)[:, None]
        modules[str(number)], first = {"x": x, "y": -x}, first + size
    shards = example.deal(fax.data.InMemory(modules))
    found = [shards.client(name) for name in shards.client_ids()]
    np.testing.assert_array_equal(
        np.sort(np.concatenate([one["x"] for one in found]).ravel()), np.arange(first)
    )
    assert sorted(len(one["x"]) for one in found) == [8, 8, 9, 9]
    for one in found:
        np.testing.assert_array_equal(one["y"], -one["x"])
        own = set(one["x"].ravel())
        assert all(
            own >= set(m["x"].ravel()) or not own & set(m["x"].ravel()) for m in modules.values()
        )
