"""DiLoCo on Python's standard library: what the example prints, and what it compares with."""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from scripts import EXAMPLES, is_figure, numbers
from tqdm import tqdm

import fax

WIDTH, BLOCKS, LENGTH, CHARACTERS = 16, 1, 16, 101
ROUNDS, H = 3, 3
FLOAT = 4  # bytes
SMALL = (
    f"--rounds={ROUNDS}",
    f"--inner-steps={H}",
    f"--length={LENGTH}",
    f"--width={WIDTH}",
    f"--blocks={BLOCKS}",
)
# Little time for the compiler, which would take longer than all else.
QUICKLY = """
import jax, diloco_pystdlib as example
jax.config.update("jax_disable_most_optimizations", True)
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
    printed = run("-c", QUICKLY, *SMALL, timeout=900)

    whole = [(CHARACTERS, WIDTH), (LENGTH, WIDTH), (WIDTH,), (WIDTH,)]  # and the last norm
    whole += [(WIDTH, CHARACTERS), (CHARACTERS,)] + [(WIDTH,)] * 4 * BLOCKS
    split = [(WIDTH, n * WIDTH) for n in (3, 1, 4, 4)] * BLOCKS  # over `model`
    size, part = (sum(map(np.prod, whole)) + sum(map(np.prod, split)) / n for n in (1, 2))
    read = ROUNDS * H * 4 * 8 * LENGTH
    line = f"{size:,.0f} parameters, 4 replicas, {ROUNDS * H} steps, H = {H}, {read:,} characters"
    assert line in printed
    (start,) = numbers(r"held-out loss ([\d.]+) at the start", printed)
    assert np.log(CHARACTERS) < start < np.log(CHARACTERS) + 1

    row = r"(\w.*?) +([\d.]+) +([-+][\d.]+)% +([\d,]+) +([\d.]+)% +([\d,]+)(?: +([\d,]+))?"
    rows = {
        name: [float(x.replace(",", "")) if x else None for x in found]
        for name, *found in re.findall(rf"^{row}$", printed, re.MULTILINE)
    }
    parallel = [f"data-parallel, {kind}" for kind in ("1 x batch", "4 x batch", "Muon")]
    alone = ["DiLoCo", "Streaming DiLoCo", "MuLoCo", "SparseLoCo"]
    assert list(rows) == [*parallel, *alone]
    reference, _, most, *_ = rows["data-parallel, 4 x batch"]
    assert most == FLOAT * (part + 1)  # gradients and a loss
    for name, (loss, gap, between, share, within, encoded) in rows.items():
        assert loss < start
        assert gap == pytest.approx(100 * (loss / reference - 1), abs=0.06)
        assert share == pytest.approx(100 * between / most, abs=0.01)
        assert within > between
        assert (encoded is None) == (name in parallel)
        if name in alone:  # at most each byte once, from one of the four devices of a replica
            assert between < 1.1 * FLOAT * size / 4 / H
    leaves = len(whole) + len(split)
    for name in ("DiLoCo", "MuLoCo"):
        assert rows[name][2] >= round(FLOAT * size / 4 / H)
        assert rows[name][-1] == round(FLOAT * size / H)
    # Each of the four devices of a replica sends a quarter of the numbers, all scales, and a weight
    # with each of the three fragments. Uneven parts are padded.
    between, *_, encoded = rows["Streaming DiLoCo"][2:]
    least = (size / 2 + 4 * FLOAT * (leaves + 3)) / H
    assert least <= encoded < 1.05 * least
    sent = 2 / 4 * encoded  # of two replicas, by one device
    assert sent <= between < 1.02 * sent
    assert rows["SparseLoCo"][-1] < FLOAT * size / H / 20
    assert is_figure(tmp_path / "runs" / "diloco_pystdlib.png")


def test_bytes_are_those_of_the_compiled_program(example):
    """In a round of two steps, a device sends 64 numbers and a few metrics between replicas.

    Each of the two replicas that it works on sums the gradients of the halves of its batches.
    """
    params = {"w": jnp.zeros(64, jnp.float32)}
    x = np.ones((4, 8, 64), np.float32)
    data = fax.data.InMemory({str(i): {"x": x[i]} for i in range(4)})
    losses = iter([0.5, 0.25])

    def loss(params, batch, key):
        x = jax.lax.with_sharding_constraint(batch["x"], P("data"))
        return jnp.sum(jnp.tanh(x * params["w"]) ** 2, axis=1)

    with jax.set_mesh(fax.sharding.make_mesh(replicas=2, data=2, model=2)):
        algorithm = fax.algorithms.diloco(loss, optax.sgd(0.1), replicas=4)
        with fax.data.cohorts(
            data, 4, 4, sampler="stream", max_steps=2, placement="replicas"
        ) as cohorts:
            curve, sent = example.train(
                algorithm, cohorts, params, 2, lambda params: next(losses), tqdm(disable=True)
            )
    np.testing.assert_array_equal(curve, [[2, 0.5], [4, 0.25]])
    assert sent.encoded == 64 * FLOAT / 2
    assert 64 * FLOAT <= 2 * sent.between < 72 * FLOAT
    assert 2 * 64 * FLOAT <= sent.within < 2 * 72 * FLOAT


def test_muon_takes_the_matrices_of_layers(example):
    with jax.set_mesh(fax.sharding.make_mesh(data=4, model=2)):
        model, specs = example.make_model(CHARACTERS, LENGTH, WIDTH, BLOCKS)
        shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.tree.structure(shapes) == jax.tree.structure(specs)
    layer = {"attend": (16, 16), "mix": (16, 16), "hide": (16, 64), "show": (64, 16)}
    found = {}
    axes = example.matrices(shapes)
    for path, x in jax.tree.leaves_with_path(shapes):
        own = axes
        for key in path:
            own = own[key.key]
        if own is not None:
            rows, columns = (
                np.prod([x.shape[axis] for axis in np.atleast_1d(which)])
                for which in (own.reduction_axis, own.output_axis)
            )
            found[path[-2].key] = (rows, columns)
    assert found == layer


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


# Learners that come and go


def of_runs(printed):
    """Of the undisturbed run and the disturbed one: loss, merges, characters, kills, goodput."""
    row = (
        r"disturbed: held-out loss ([\d.]+), (\d+) merges in [\d.]+ s, ([\d,]+) characters "
        r"counted, (\d+) kills, goodput ([\d.]+)%"
    )
    rows = re.findall(row, printed)
    assert len(rows) == 2
    return [[float(x.replace(",", "")) for x in found] for found in rows]


@pytest.mark.docs
def test_a_short_run_of_learners_that_nobody_kills(run, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    sizes = (f"--length={LENGTH}", f"--width={WIDTH}", "--blocks=2", "--learners=2")
    script = EXAMPLES / "elastic_diloco.py"
    printed = run(script, "--periods=2", "--inner-steps=4", *sizes, timeout=600)
    (start,) = numbers(r"held-out loss ([\d.]+) at the start", printed)
    for loss, merges, read, kills, goodput in of_runs(printed):
        assert loss < start
        assert (merges, kills) == (6, 0)  # three fragments, twice
        assert 0 < read <= 2 * 2 * 4 * 8 * LENGTH
        assert goodput > 0  # of a single period, so steps before it may count, too
    assert is_figure(tmp_path / "runs" / "elastic_diloco.png")


@pytest.mark.long
def test_killing_a_learner_every_20_seconds_hardly_changes_the_loss(run):
    printed = run(EXAMPLES / "elastic_diloco.py", timeout=3000)
    (start,) = numbers(r"held-out loss ([\d.]+) at the start", printed)
    calm, wild = of_runs(printed)
    assert calm[0] < 0.5 * start
    assert abs(wild[0] / calm[0] - 1) < 0.02
    assert calm[1] == wild[1] == 300
    assert calm[3] == 0
    assert wild[3] >= 1
    assert wild[4] < calm[4]
