"""Plans on Apache Beam: what the jitted program gives, in any order, by workers without fax."""

import collections
import re
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from scripts import EXAMPLES, is_figure, numbers

import fax
from fax import algorithms, deploy

beam = pytest.importorskip(
    "apache_beam", reason="apache-beam is in an environment of its own: make test-beam"
)
from apache_beam.internal import pickler  # noqa: E402
from apache_beam.options.pipeline_options import PipelineOptions  # noqa: E402

from fax.deploy import _beam_client as worker  # noqa: E402
from fax.deploy import _columns  # noqa: E402

ROOT = EXAMPLES.parent
N = 11
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, 4))
LARGE = RNG.integers(-(2**31), 2**31, size=(N, 3)).astype(np.int32)  # sums of which wrap
CLIENTS = [(i, {"x": X[i], "large": LARGE[i]}) for i in range(N)]
ALL = {"x": X, "large": LARGE}
THREADS = [
    "--runner=FnApiRunner",
    "--direct_running_mode=multi_threading",
    "--direct_num_workers=2",
]


def source_of(clients):
    return lambda pipeline: pipeline | beam.Create(clients)


def backend_of(clients=CLIENTS, number=N, **settings):
    return deploy.Beam(source_of(clients), number, CLIENTS[0][1], **settings)


def check_plan(fn, backend, held, *args):
    """Compares with the jitted function, for which ``held`` are arrays."""
    plan = deploy.cut(fn, *args, backend.held(), held=[*held])
    found = plan.run(backend, *args, backend.held())
    expected = jax.jit(fn)(*args, held)
    for own, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert own.dtype == other.dtype
        if jnp.issubdtype(own.dtype, jnp.inexact):
            np.testing.assert_allclose(own, other, rtol=1e-13, atol=1e-14)
        else:
            np.testing.assert_array_equal(own, other)
    return plan


@fax.program(clients=N)
def reductions(scale, rows):
    """All of them, of all kinds of numbers, by one stage."""

    def client(scale, x, large):
        counts = jnp.zeros(5, jnp.int32).at[jnp.clip(2 + x, 0, 4).astype(int)].add(1)
        weight = jnp.abs(scale * x[0])
        return {
            "histogram": (weight * counts, weight),
            "wide": x * scale,
            "small": x.astype(jnp.bfloat16),
            "large": large,
            "unsigned": large.astype(jnp.uint8),
            "complex": jnp.exp(1j * x),
            "positive": x > 0,
            "late": jnp.where(x > 1.5, jnp.nan, x),
        }

    sent = fax.map(client, fax.broadcast(scale), rows["x"], rows["large"])
    histogram, weight = map(fax.sum, sent["histogram"])
    return (
        {"weighted": histogram / weight, "mean": fax.mean(sent["wide"])},
        {name: fax.sum(sent[name]) for name in ("large", "unsigned", "complex")},
        [fax.max(sent[name]) for name in ("small", "wide", "positive", "late", "large")],
        [fax.min(sent[name]) for name in ("small", "positive", "late")],
    )


@fax.program(clients=N)
def squares(scale, rows):
    return fax.mean(fax.map(lambda s, x: jnp.sum((s * x) ** 2), fax.broadcast(scale), rows["x"]))


def gradient_descent(scale, rows):
    step = jax.grad(squares)
    return jax.lax.fori_loop(0, 2, lambda i, s: s - 0.1 * step(s, rows), scale)


@fax.program(clients=N)
def carried(scale, rows):
    """What clients carry through a loop is computed again in each iteration."""

    def step(own, _):
        own = fax.map(lambda own, x: own + jnp.sum(x), own, rows["x"])
        return own, fax.sum(fax.map(jnp.multiply, own, fax.broadcast(scale)))

    return jax.lax.scan(step, jnp.arange(float(N)), None, length=2)[1]


@pytest.mark.parametrize("fn", [reductions, gradient_descent, carried], ids=lambda f: f.__name__)
def test_programs(fn):
    check_plan(fn, backend_of(), ALL, 1.5)


def test_several_threads_in_any_order():
    """Clients without numbers, in windows, on two threads at the same time."""

    def source(pipeline):
        clients = pipeline | beam.Create([(f"id {i}", own) for i, own in CLIENTS[::-1]])
        windows = clients | beam.WindowInto(beam.window.FixedWindows(1))
        return windows | beam.Reshuffle()

    backend = deploy.Beam(source, N, CLIENTS[0][1], options=PipelineOptions(THREADS))
    check_plan(jax.grad(squares), backend, ALL, 1.5)


def test_federated_averaging():
    """A round, whose random keys the server sends, one to each client."""

    def loss(params, batch, key):
        own, metrics = problems.Logistic.loss(params, batch, key)
        return own * (1 + 0.1 * jax.random.normal(key)), metrics

    cohort = next(
        fax.data.cohorts(problems.data(), clients=4, batch_size=2, max_steps=2, resident=False)
    )
    like = {**cohort.batches, "mask": cohort.mask, "num_examples": cohort.num_examples}
    rows = jax.tree.map(np.asarray, like)
    clients = [(i, {name: x[i] for name, x in rows.items()}) for i in (2, 0, 3, 1)]
    backend = deploy.Beam(source_of(clients), 4, clients[0][1])
    held = backend.held()
    algorithm = algorithms.fedavg(loss, optax.sgd(0.1), optax.adam(0.1))
    own = fax.data.Cohort(
        {name: held[name] for name in cohort.batches},
        held["mask"],
        held["num_examples"],
        positions=cohort.positions,
        keys=cohort.keys,
    )
    state = algorithm.init(problems.Logistic.start())
    plan = deploy.cut(algorithm.round, state, own)
    found, metrics = plan.run(backend, state, own)
    state, expected = jax.jit(algorithm.round)(state, cohort)
    np.testing.assert_allclose(found.params["w"], state.params["w"], rtol=1e-12)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-12)


# Workers


class Recorder(deploy.Beam):
    """Records the program of each pipeline, and what is combined."""

    def _totals(self, columns):
        if columns:
            self.program = self._programs.making(columns)
            self.modes = [column.mode for column in columns]
        return [np.zeros(column.aval.shape, column.aval.dtype) for column in columns]


def recorded(fn, clients=CLIENTS, number=N, **settings):
    """A backend that has recorded the pipeline of a plan."""
    backend = Recorder(source_of(clients), number, CLIENTS[0][1], **settings)
    held = backend.held()
    deploy.cut(fn, 1.5, held, held=[*held]).run(backend, 1.5, held)
    return backend


def totals_of(sums, bundles):
    for bundle in bundles:
        sums.start_bundle()
        for element in bundle:
            yield from sums.process(element)
        yield from (x.value for x in sums.finish_bundle())


def test_bundles_of_any_size_in_any_order():
    backend = recorded(reductions)
    sums, combine = worker.Sums(backend.program, backend.modes), worker.Combine(backend.modes)
    sums.setup()
    orders = [CLIENTS, CLIENTS[::-1], [CLIENTS[i] for i in RNG.permutation(N)]]
    found = []
    for order, size in zip(orders, (N, 1, 4)):
        bundles = [order[i : i + size] for i in range(0, N, size)]
        parts = list(totals_of(sums, bundles))
        assert sum(number for number, *_ in parts) == N
        early = combine.merge_accumulators(map(combine.extract_output, parts[1:]))
        found.append(combine.merge_accumulators([combine.create_accumulator(), early, parts[0]])[1])
    for first, *others in zip(*found, strict=True):
        for other in others:
            if first.dtype.kind in "fc":
                np.testing.assert_allclose(other, first, rtol=1e-14, atol=1e-15)
            else:
                np.testing.assert_array_equal(other, first)


def test_fewer_large_clients_run_together(monkeypatch):
    monkeypatch.setattr(_columns, "_BYTES", 4 * (X[0].nbytes + LARGE[0].nbytes + 8))
    backend = backend_of()
    check_plan(squares, backend, ALL, 1.5)  # 4, 4 and 3
    assert backend._programs.making([]).together == 4


def test_workers_do_not_need_fax(tmp_path):
    backend = recorded(reductions)
    work = worker.Sums(backend.program, backend.modes), CLIENTS
    (tmp_path / "work").write_bytes(pickler.dumps(work))
    code = """if True:
        import sys
        sys.modules["fax"] = None  # importing it fails
        from apache_beam.internal import pickler
        with open("work", "rb") as file:
            sums, clients = pickler.loads(file.read())
        sums.setup()
        sums.start_bundle()
        made = [total for client in clients for total in sums.process(client)]
        made += [total.value for total in sums.finish_bundle()]
        print(sum(number for number, *_ in made), sys.modules["fax"])
    """
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == [str(N), "None"], done.stderr


def test_workers_run_the_stages_of_a_saved_plan(tmp_path):
    held = backend_of().held()
    plan = deploy.cut(squares, 1.5, held, held=[*held])
    plan.save(tmp_path / "plan", platforms=["cpu"])
    check_plan(squares, backend_of(plan=tmp_path / "plan"), ALL, 1.5)
    with pytest.raises(deploy.ClientError, match=r"'clients \d+' is not in the plan"):
        recorded(reductions, plan=tmp_path / "plan")
    (blob,) = (tmp_path / "plan").glob("*.stablehlo")
    blob.write_bytes(blob.read_bytes() + b"\0")
    backend = recorded(squares, plan=tmp_path / "plan")
    with pytest.raises(ValueError, match="not what its hash says"):
        worker.Sums(backend.program, backend.modes).setup()


# Results of clients


@fax.program(clients=N)
def normalized(scale, rows):
    x = fax.map(lambda x, s: s * x / jnp.linalg.norm(x), rows["x"], fax.broadcast(scale))
    return x, fax.sum(x)


def test_rows_are_elements_of_a_pipeline():
    backend = backend_of()
    held = backend.held()
    plan = deploy.cut(normalized, 1.5, held, held=[*held])
    own, total = plan.run(backend, 1.5, held)
    np.testing.assert_allclose(total, normalized(1.5, ALL)[1], rtol=1e-12)

    def again(pipeline):
        return backend.rows(pipeline, x=own, before=held["x"])

    one = {"x": X[0], "before": X[0]}
    rows = {"x": np.asarray(normalized(1.5, ALL)[0]), "before": X}

    @fax.program(clients=N)
    def products(rows):
        return fax.sum(fax.map(jnp.multiply, rows["x"], rows["before"]))

    check_plan(products, deploy.Beam(again, N, one), rows)


# What the documentation promises


def test_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "hand_over_beam.md").read_text(encoding="utf-8")
    names = {"__name__": "page"}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, names)
    assert "[0]['hours']  only through sums over 1000" in capsys.readouterr().out
    hours = np.arange(1000)[:, None] % [24, 7]
    counts = np.bincount(hours.reshape(-1), minlength=24)
    np.testing.assert_array_equal(names["counts"], counts)
    lines = dict(line.split(": ") for line in (tmp_path / "common").read_text().splitlines())
    assert lines == {f"client {i}": f"{counts[own].mean():.1f}" for i, own in enumerate(hours)}


def test_frequent_words(tmp_path, monkeypatch, capsys):
    """The example, with fewer clients and less noise."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["example", "--clients=1000", "--epsilon=8"])
    example = runpy.run_path(str(EXAMPLES / "federated_analytics.py"), run_name="__main__")
    printed = capsys.readouterr().out
    true = collections.Counter(example["words_of_python"]()[:1000].tolist())
    noise, threshold = numbers(r"noise of ([\d.]+) clients, threshold (\d+)", printed)
    assert numbers(r"epsilon = ([\d.]+)", printed) == [8]
    assert noise == pytest.approx(fax.aggregators.calibrate(8.0, 7, 1e-6), abs=0.05)
    found = re.findall(r"^(\w+) +([\d.]+) clients, in truth (\d+)$", printed, re.MULTILINE)
    for word, count, truth in found:
        assert true[word] == int(truth)
        assert abs(float(count) - true[word]) < 6 * noise
        assert float(count) > threshold - 0.5
    assert any(float(count) != true[word] for word, count, _ in found)
    most = [word for word, n in true.most_common(5) if n > threshold + 6 * noise]
    assert len(most) >= 3
    assert set(most) <= {word for word, *_ in found}
    assert is_figure(tmp_path / "runs" / "federated_analytics.png")


def test_the_query_is_a_gaussian_mechanism():
    """A client adds one to one count, or nothing, and the noise is that of its epsilon."""
    example = runpy.run_path(str(EXAMPLES / "federated_analytics.py"), run_name="example")
    words, begin = ["the", "then", "this", "so", "some", "sort", "as"], ["th", "so"]
    rows = np.stack([example["parse"](f"client {word}")[1]["word"] for word in words])
    beginnings = np.full((example["BEGINNINGS"], rows.shape[1]), -1, np.int32)
    for i, text in enumerate(begin):
        beginnings[i] = example["parse"](f"beginning {text}")[1]["word"]
    expected = np.zeros((len(beginnings), 27))
    for word in words:
        if word[:2] in begin:  # at the end of a word there is a zero
            letter = ord(word[2]) - ord("a") + 1 if word[2:] else 0
            expected[begin.index(word[:2]), letter] += 1
    assert np.sum(expected) == 6

    def counts(multiplier, rounds):
        aggregator = fax.aggregators.gaussian(1.0, multiplier)
        query, state = jax.jit(example["query"](len(words), aggregator)), aggregator.init(expected)
        for _ in range(rounds):
            found, state = query(beginnings, np.int32(2), state, jax.random.key(0), {"word": rows})
            yield np.asarray(found) - expected

    (error,) = counts(0.0, 1)
    np.testing.assert_allclose(error, 0, atol=1e-5)
    scale = fax.aggregators.calibrate(1.0, example["LETTERS"] + 1, example["DELTA"])
    noise = [*counts(scale, 2)]
    for own in noise:  # 864 numbers, so five standard errors
        assert abs(np.std(own) / scale - 1) < 5 / np.sqrt(2 * own.size)
    assert abs(np.corrcoef(*map(np.ravel, noise))[0, 1]) < 5 / np.sqrt(own.size)
    # Seven of these are as one with the noise divided by the root of seven (arXiv:1805.06530).
    mu = np.sqrt(7) / scale
    cdf = jax.scipy.stats.norm.cdf
    assert cdf(mu / 2 - 1 / mu) - np.e * cdf(-mu / 2 - 1 / mu) <= 1e-6


# Mistakes


def test_errors_name_the_client():
    """Also those of a pipeline, at the end."""
    sums = worker.Sums(recorded(squares).program, ["sum"])
    sums.setup()
    sums.start_bundle()
    whole = {"x": X[0], "large": LARGE[0]}
    for element, message in (
        ("ann", "the source has 'ann', expected a pair"),
        (("ann", X), "expected a pair of a client and a dict"),
        (("ann", {"x": X[0]}), r"client 'ann' has no 'large', only \['x'\], expected int32\[3\]"),
        (
            ("ann", whole | {"x": X[0, :3]}),
            r"'x' of client 'ann' is float64\[3\], expected float64",
        ),
        (("ann", whole | {"x": [1, 2, 3, 4]}), r"'x' of client 'ann' is int64\[4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            list(sums.process(element))
    clients = [*CLIENTS[:-1], ("ann", whole | {"x": X[0].astype(np.float32)})]
    backend = backend_of(clients)
    held = backend.held()
    plan = deploy.cut(squares, 1.5, held, held=[*held])
    with pytest.raises(deploy.ClientError, match=r"'x' of client 'ann' is float32\[4\], expected"):
        plan.run(backend, 1.5, held)


@fax.program(clients=N)
def noisy(scale, rows):
    """The server sends each client a key."""
    keys = fax.keys(jax.random.key(3))
    numbers = jnp.arange(N) * 2.0
    noise = fax.map(lambda k, n: n + jax.random.normal(k), keys, fax.distribute(numbers))
    return fax.sum(fax.map(jnp.multiply, noise, rows["x"][:, 0])) * scale


def test_clients_are_numbered_if_each_gets_a_value_of_its_own():
    check_plan(noisy, backend_of(CLIENTS[::-1]), ALL, 1.5)
    sums = worker.Sums(recorded(noisy).program, ["sum"])
    sums.setup()
    sums.start_bundle()
    for name in ("ann", N, -1, True, 1.0):
        with pytest.raises(ValueError, match=f"client {name!r}, expected an int below {N}"):
            list(sums.process((name, CLIENTS[0][1])))


def test_clients_that_are_not_those_of_the_plan():
    plan = deploy.cut(squares, 1.5, backend_of().held(), held=["x", "large"])
    for clients, number in ((CLIENTS[:-1], 10), ([], 0), ([*CLIENTS, CLIENTS[0]], 12)):
        backend = backend_of(clients)
        with pytest.raises(
            deploy.ClientError, match=rf"has {number} clients, expected clients={N}"
        ):
            plan.run(backend, 1.5, backend.held())
    backend = backend_of([*CLIENTS[:-1], CLIENTS[0]])
    plan = deploy.cut(noisy, 1.5, backend.held(), held=["x", "large"])
    with pytest.raises(deploy.ClientError, match="only 10 numbers for 11 clients"):
        plan.run(backend, 1.5, backend.held())


@fax.program(clients=N)
def last(rows):
    return fax.collect(rows["x"])[-1]


@fax.program(clients=2)
def of_two(rows):
    own = rows["x"][jnp.array([3, 1])]
    return fax.sum(fax.map(jnp.square, own))


@fax.program(clients=N)
def replaced(rows):
    state = rows["x"].at[jnp.array([3, 1])].set(rows["x"][jnp.array([3, 1])] * 2)
    return fax.sum(fax.map(jnp.square, state))


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (last, "does not bring the rows of clients to the server"),
        (of_two, "state, which pipelines do not keep"),
        (replaced, "state.* which pipelines do not keep"),
    ],
    ids=["rows", "state", "new state"],
)
def test_what_pipelines_cannot_do(fn, message):
    backend = backend_of()
    held = backend.held()
    plan = deploy.cut(fn, held, held=[*held], pull=True)
    with pytest.raises(deploy.CutError, match=message):
        plan.run(backend, held)


def test_arguments():
    one = CLIENTS[0][1]
    for args, message in (
        ((beam.Create(CLIENTS), N, one), r"source is .*, expected a function source\(pipeline\)"),
        ((source_of(CLIENTS), 0, one), "clients is 0"),
        ((source_of(CLIENTS), N, X), "like is .*, expected a dict of the arrays of one client"),
        ((source_of(CLIENTS), N, {"x": [1.0]}), "like is a dict, expected a dict of the arrays"),
    ):
        with pytest.raises(ValueError, match=rf"fax.deploy.Beam: {message}"):
            deploy.Beam(*args)
    held = backend_of().held()
    plan = deploy.cut(squares, 1.5, held, held=[*held])
    with pytest.raises(ValueError, match="another backend"):
        plan.run(backend_of(), 1.5, held)
