"""The benchmark models: parameters to the digit, and outputs against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.test_util import check_grads

import fax
from fax.models._lstm import recur

TOKENS = 12
COUNTS = [
    ("emnist_conv", {}, 1_206_590),
    ("emnist_conv", {"num_classes": 10}, 1_199_882),
    ("emnist_dense", {}, 209_662),
    ("emnist_dense", {"num_classes": 10}, 199_210),
    ("emnist_logistic", {}, 48_670),
    ("emnist_logistic", {"num_classes": 10}, 7_850),
    ("cifar100_logistic", {}, 172_900),
    ("shakespeare_lstm", {}, 820_522),
    ("stackoverflow_lstm", {}, 4_050_748),
    ("stackoverflow_lstm", {"tied": True}, 4_050_748 - 96 * 10_004),
    ("char_lstm", {"num_tokens": 100}, 195_300),
    ("dense", {"sizes": (64, 128, 10)}, 9_610),
    ("denoiser", {}, 9 * (3 * 16 + 2 * 16**2 + 16 * 3) + 3 * 16 + 3),
    ("denoiser", {"hidden": 8, "depth": 1}, 84),
    # 3 x 3 convolutions, projections, scales and shifts, and the last layer.
    (
        "resnet18",
        {},
        9 * (3 * 64 + 4 * 64**2)
        + sum(9 * (n // 2 * n + 3 * n**2) + n // 2 * n for n in (128, 256, 512))
        + 2 * (5 * 64 + 5 * (128 + 256 + 512))
        + 100 * 513,
    ),
]


@pytest.mark.parametrize(("name", "options", "count"), COUNTS)
def test_parameters_to_the_digit(name, options, count):
    shapes = jax.eval_shape(fax.models.create(name, **options).init, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {np.dtype("float32")}


# Forward passes, in NumPy


def relu(x):
    return np.maximum(x, 0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def linear(p, x):
    return x @ p["kernel"] + p["bias"]


def convolution(x, kernel, strides=1, same=False):
    """The definition: a sum over a window for every pixel."""
    size = kernel.shape[0]
    if same:
        total = [max((-(-n // strides) - 1) * strides + size - n, 0) for n in x.shape[1:3]]
        x = np.pad(x, [(0, 0), *((t // 2, t - t // 2) for t in total), (0, 0)])
    height, width = (1 + (n - size) // strides for n in x.shape[1:3])
    out = np.zeros((len(x), height, width, kernel.shape[-1]))
    for i in range(height):
        for j in range(width):
            window = x[:, i * strides : i * strides + size, j * strides : j * strides + size]
            out[:, i, j] = np.einsum("bhwc,hwco->bo", window, kernel)
    return out


def emnist_conv(p, x):
    for name in ("conv1", "conv2"):
        x = relu(convolution(x, p[name]["kernel"]) + p[name]["bias"])
    quarters = [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    return linear(p["out"], relu(linear(p["hidden"], np.max(quarters, axis=0).reshape(len(x), -1))))


def dense(p, x):
    x = x.reshape(len(x), -1)
    *hidden, out = (p["layers"][i] for i in range(len(p["layers"])))
    for layer in hidden:
        x = relu(linear(layer, x))
    return linear(out, x)


def denoiser(p, x):
    *hidden, last = (p["layers"][i] for i in range(len(p["layers"])))
    noise = x
    for own in hidden:
        noise = relu(convolution(noise, own["kernel"], same=True) + own["bias"])
    return x - convolution(noise, last["kernel"], same=True) - last["bias"]


def group_norm(p, x):
    groups = x.reshape(len(x), -1, 2, x.shape[-1] // 2)
    mean, var = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
    return ((groups - mean) / np.sqrt(var + 1e-6)).reshape(x.shape) * p["scale"] + p["bias"]


def resnet18(p, x):
    x = relu(group_norm(p["norm"], convolution(x, p["stem"]["kernel"], same=True)))
    for number in range(8):
        block = p["blocks"][number]
        strides = 2 if number in (2, 4, 6) else 1
        y = convolution(x, block["conv1"]["kernel"], strides, same=True)
        y = convolution(relu(group_norm(block["norm1"], y)), block["conv2"]["kernel"], same=True)
        if strides == 2:
            x = convolution(x, block["shortcut"]["kernel"], 2, same=True)
            x = group_norm(block["shortcut_norm"], x)
        x = relu(group_norm(block["norm2"], y) + x)
    return linear(p["out"], x.mean((1, 2)))


def lstm(p, x):
    """Step by step, with one matrix for the input and the state."""
    weights = np.concatenate([p["kernel"], p["recurrent"]])
    hidden = len(p["recurrent"])
    h = c = np.zeros((len(x), hidden))
    states = []
    for t in range(x.shape[1]):
        i, g, f, o = np.split(np.concatenate([x[:, t], h], 1) @ weights + p["bias"], 4, axis=1)
        c = sigmoid(f + 1) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        states.append(h)
    return np.stack(states, 1)


def shakespeare(p, x):
    x = np.tanh(lstm(p["lstm1"], p["embed"]["embedding"][x]))
    return linear(p["out"], np.tanh(lstm(p["lstm2"], x)))


def stackoverflow(p, x):
    table = p["embed"]["embedding"]
    x = linear(p["project"], np.tanh(lstm(p["lstm"], table[x])))
    return x @ table.T + p["bias"] if "bias" in p else linear(p["out"], x)


def char_lstm(p, x):
    return linear(p["out"], lstm(p["lstm"], p["embed"]["embedding"][x]))


FORWARD = [
    ("emnist_conv", {}, emnist_conv, (28, 28, 1)),
    ("emnist_dense", {}, dense, (28, 28, 1)),
    ("emnist_logistic", {}, dense, (28, 28, 1)),
    ("cifar100_logistic", {}, dense, (24, 24, 3)),
    ("dense", {"sizes": (5, 7, 6, 3)}, dense, (5,)),
    ("denoiser", {"hidden": 4, "depth": 3}, denoiser, (5, 6, 3)),
    ("resnet18", {"num_classes": 7}, resnet18, (8, 8, 3)),
    ("shakespeare_lstm", {"num_tokens": TOKENS}, shakespeare, None),
    ("stackoverflow_lstm", {"num_tokens": TOKENS}, stackoverflow, None),
    ("stackoverflow_lstm", {"num_tokens": TOKENS, "tied": True}, stackoverflow, None),
    ("char_lstm", {"num_tokens": TOKENS}, char_lstm, None),
]


def perturbed(params, seed=0):
    """Parameters none of which are zero, as biases are at the start."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.asarray(x) + 0.1 * rng.normal(size=x.shape), params)


@pytest.mark.always(
    "emnist_conv-options0-emnist_conv-shape0",
    "dense-options4-dense-shape4",
    "denoiser-options5-denoiser-shape5",
    "shakespeare_lstm-options7-shakespeare-None",
    "stackoverflow_lstm-options9-stackoverflow-None",
)
@pytest.mark.parametrize(("name", "options", "reference", "shape"), FORWARD)
def test_outputs(name, options, reference, shape):
    model = fax.models.create(name, **options)
    params = perturbed(model.init(jax.random.key(1)))
    rng = np.random.default_rng(2)
    x = rng.integers(0, TOKENS, (3, 5)) if shape is None else rng.normal(size=(2, *shape))
    found = jax.jit(model.apply)(params, {"x": x})
    np.testing.assert_allclose(found, reference(params, x), rtol=1e-6, atol=1e-8)


def test_initial_distributions_are_haikus():
    """Truncated normals of standard deviation fan_in^-1/2 before they are cut at two."""
    params = fax.models.create("shakespeare_lstm").init(jax.random.key(0))
    cut = 0.8796256610342398
    for name, fan_in in (("lstm1", 8 + 256), ("lstm2", 512)):
        for kernel in ("kernel", "recurrent"):
            values = np.asarray(params[name][kernel]) * fan_in**0.5
            assert abs(values).max() <= 2.001
            np.testing.assert_allclose(values.std(), cut, rtol=0.03)
        assert not np.asarray(params[name]["bias"]).any()
    np.testing.assert_allclose(np.std(params["embed"]["embedding"]), cut, rtol=0.1)
    np.testing.assert_allclose(np.std(params["out"]["kernel"]) * 16, cut, rtol=0.03)
    params = fax.models.create("emnist_conv").init(jax.random.key(0))
    np.testing.assert_allclose(np.std(params["conv2"]["kernel"]) * 288**0.5, cut, rtol=0.03)


# Training


def test_dropout_is_on_with_a_key_and_differs_by_key():
    model = fax.models.create("emnist_conv", num_classes=10)
    params = model.init(jax.random.key(0))
    batch = {"x": np.random.default_rng(0).random((2, 28, 28, 1))}
    apply = jax.jit(model.apply)
    plain = apply(params, batch)
    one, same, other = (apply(params, batch, jax.random.key(i)) for i in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert abs(one - other).max() > 1e-3
    np.testing.assert_array_equal(plain, apply(params, batch))
    raw = apply(params, batch, jax.random.PRNGKey(1))
    np.testing.assert_array_equal(one, raw)


@pytest.mark.long
def test_dropout_rates():
    """Means over keys of what is left of ones: 3/4 and 1/2, scaled to keep the mean."""
    module = fax.models.EmnistConv(rngs=nnx.Rngs(0))
    module.train()
    for dropout, keep in ((module.dropout1, 0.75), (module.dropout2, 0.5)):
        out = np.asarray(dropout(jnp.ones(40_000)))
        np.testing.assert_allclose(np.unique(out), [0, 1 / keep], rtol=1e-6)
        np.testing.assert_allclose((out > 0).mean(), keep, atol=0.01)


def plain_lstm(z, recurrent):
    """The same recurrence, differentiated by JAX."""

    def step(state, z):
        h, c = state
        i, g, f, o = jnp.split(z + h @ recurrent, 4, -1)
        c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zero = jnp.zeros((z.shape[1], len(recurrent)))
    return jax.lax.scan(step, (zero, zero), z)[1]


def lstm_arguments():
    rng = np.random.default_rng(0)
    return rng.normal(size=(5, 2, 12)), rng.normal(size=(3, 12))


@pytest.mark.long
def test_derivatives_of_the_lstm_are_those_of_finite_differences():
    check_grads(jax.jit(recur), lstm_arguments(), order=2, modes=("fwd", "rev"), rtol=1e-5)


def test_the_derivative_of_the_lstm():
    z, recurrent = lstm_arguments()

    def gradient(fn):
        return jax.grad(lambda *a: jnp.sum(jnp.sin(fn(*a))), argnums=(0, 1))

    @jax.jit
    def gradients(z, several):
        """Of one, and of several at once."""
        batch = (jax.vmap(gradient(fn), (None, 0))(z, several) for fn in (recur, plain_lstm))
        return gradient(recur)(z, several[0]), *batch

    several = np.stack([recurrent, -recurrent])
    alone, found, expected = gradients(z, several)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[0], rtol=1e-10), alone, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), found, expected)


def test_no_step_of_the_lstm_adds_up_gradients_of_weights():
    """Loops backwards carry no array of the shape of the recurrent weights."""

    def results(fn):
        z, recurrent = np.ones((5, 2, 12)), np.ones((3, 12))
        jaxpr = jax.make_jaxpr(jax.grad(lambda r: jnp.sum(fn(z, r) ** 2)))(recurrent)
        scans = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
        assert len(scans) == 2
        return [x.aval.shape for eqn in scans for x in eqn.outvars]

    assert (3, 12) not in results(recur)
    assert (3, 12) in results(plain_lstm)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "options", "shape", "rate"),
    [
        ("emnist_dense", {"num_classes": 3}, (28, 28, 1), 0.01),
        # In full size they learn in test_tasks.py.
        pytest.param(
            *("shakespeare_lstm", {"num_tokens": 8, "loss_length": 8.0}, None, 2.0),
            marks=pytest.mark.long,
        ),
        pytest.param("stackoverflow_lstm", {"num_tokens": 8}, None, 1.0, marks=pytest.mark.long),
    ],
)
def test_federated_averaging_lowers_the_loss(name, options, shape, rate):
    rng = np.random.default_rng(0)
    templates, clients = rng.normal(size=(3, *(shape or ()))), {}
    for i, n in enumerate([5, 9, 3]):
        if shape is None:
            tokens = (np.arange(9) + rng.integers(0, 8, (n, 1))) % 7 + 1  # it counts
            clients[str(i)] = {"x": tokens[:, :-1], "y": tokens[:, 1:]}
        else:
            y = rng.integers(0, 3, n)
            clients[str(i)] = {"x": templates[y] + 0.1 * rng.normal(size=(n, *shape)), "y": y}
    model = fax.models.create(name, **options)
    algorithm = fax.algorithms.fedavg(model.loss, optax.sgd(rate))
    rounds = fax.data.cohorts(fax.data.InMemory(clients), 3, 4)
    state = algorithm.init(model.init(jax.random.key(0)))
    state, metrics = fax.algorithms.many_rounds(algorithm, state, rounds, 12)
    assert metrics["loss"][-1] < 0.6 * metrics["loss"][0]
    assert metrics["accuracy"][-1] > metrics["accuracy"][0]


# Losses


def test_cross_entropy():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(6, 4)), rng.integers(0, 4, 6)
    evaluate = jax.jit(fax.models.cross_entropy)
    losses, metrics = jax.device_get(evaluate(scores, {"y": labels}))
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    np.testing.assert_allclose(losses, -np.log(p[np.arange(6), labels]), rtol=1e-12)
    np.testing.assert_array_equal(metrics["accuracy"], scores.argmax(1) == labels)
    beyond = {"y": np.array([4, -1, 0])}
    losses, metrics = jax.device_get(evaluate(scores[:3], beyond))
    assert np.isnan(losses[:2]).all()
    assert not np.isnan(losses[2])
    assert not metrics["accuracy"][:2].any()


def test_squared_error():
    rng = np.random.default_rng(0)
    found, targets = rng.normal(size=(2, 5, 2, 3))
    losses, metrics = jax.device_get(jax.jit(fax.models.squared_error)(found, {"y": targets}))
    np.testing.assert_allclose(losses, [((a - b) ** 2).mean() for a, b in zip(found, targets)])
    assert metrics == {}
    pixels = jnp.array([[200, 100]], jnp.uint8)  # whose differences and squares do not fit
    assert fax.models.squared_error(jnp.zeros_like(pixels), {"y": pixels})[0].tolist() == [25000]
    assert fax.models.squared_error(jnp.ones((0, 3)), {"y": jnp.ones((0, 3))})[0].shape == (0,)


@pytest.mark.parametrize("length", [None, 7.0])
def test_sequence_cross_entropy(length):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(3, 4, 5))
    labels = np.array([[1, 4, 2, 3], [2, 0, 0, 0], [0, 0, 0, 0]])
    evaluate = jax.jit(functools.partial(fax.models.sequence_cross_entropy, length=length))
    found, metrics = jax.device_get(evaluate(scores, {"y": labels}))
    p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    for i, n in enumerate([4, 1, 0]):
        total = -sum(np.log(p[i, t, labels[i, t]]) for t in range(n))
        right = sum(scores[i, t].argmax() == labels[i, t] for t in range(n))
        np.testing.assert_allclose(found[i], total / (length or max(n, 1)), rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(metrics["accuracy"][i], right / max(n, 1), rtol=1e-6)
    scores[1, 1:] = np.nan  # what is padding is not looked at, by gradients neither
    gradient = jax.jit(
        jax.grad(lambda s: fax.models.sequence_cross_entropy(s, {"y": labels})[0].sum())
    )(scores)
    assert np.isfinite(np.asarray(gradient)[0]).all()


# Models


def test_the_same_name_and_options_give_the_same_functions():
    create = fax.models.create
    assert create("dense", sizes=[4, 2]) is create("dense", sizes=(4, 2))
    of_80 = create("char_lstm", loss_length=80)
    assert create("char_lstm") is not of_80 is create("char_lstm", loss_length=np.array(80.0))


def test_numbers_that_are_no_tokens_are_not_those_of_others():
    model = fax.models.create("char_lstm", num_tokens=8)
    params = model.init(jax.random.key(0))
    scores = model.apply(params, {"x": jnp.array([[1, 2], [8, 1], [-1, 1]])})
    np.testing.assert_array_equal(np.isnan(scores).all((1, 2)), [False, True, True])


def test_a_module_with_batch_statistics_is_refused():
    with pytest.raises(ValueError, match=r"BatchNorm with state that is not trained.*GroupNorm"):
        fax.models.functional(lambda rngs: nnx.BatchNorm(3, rngs=rngs))


@pytest.mark.parametrize(
    ("name", "x", "message"),
    [
        ("emnist_conv", np.zeros((2, 28, 27, 1)), r"feature 'x' has shape \(2, 28, 27, 1\), exp"),
        ("emnist_dense", np.zeros(784), r"expected \('batch', 784\)"),
        ("denoiser", np.zeros((2, 24, 24)), r"expected \('batch', 'height', 'width', 3\)"),
        ("resnet18", np.zeros((2, 24, 24)), r"expected \('batch', 'height', 'width', 3\)"),
        ("char_lstm", np.zeros((2, 5)), r"feature 'x' is float64 of shape \(2, 5\), expected int"),
        ("char_lstm", np.zeros(5, int), r"expected integers of shape \('batch', 'length'\)"),
    ],
)
def test_features_that_do_not_fit(name, x, message):
    model = fax.models.create(name)
    params = jax.eval_shape(model.init, jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.apply, params, {"x": x})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fax.models.create("emnist"), r"name is 'emnist', expected .*'emnist_conv'"),
        (lambda: fax.models.create("dense", size=3), r"has no option 'size'. It has 'sizes'\."),
        (lambda: fax.models.create("dense", loss_length=3), r"has no option 'loss_length'"),
        (
            lambda: fax.models.create("dense", sizes=(3,)),
            r"expected at least the numbers of",
        ),
        (
            lambda: fax.models.cross_entropy(jnp.ones((3, 2)), {"y": jnp.ones((3, 1), int)}),
            r"scores have shape \(3, 2\) and labels \(3, 1\)",
        ),
        (
            lambda: fax.models.cross_entropy(jnp.ones((3, 4, 2)), {"y": jnp.ones((3, 4), int)}),
            r"labels have shape \(3, 4\), expected \[batch\].* use fax.models.sequence_cross_entr",
        ),
        (
            lambda: fax.models.squared_error(jnp.ones((3, 1)), {"y": jnp.ones(3)}),
            r"predictions have shape \(3, 1\) and targets \(3,\), expected a prediction for each",
        ),
        (
            lambda: fax.models.squared_error(jnp.ones(()), {"y": jnp.ones(())}),
            r"predictions are a scalar, expected \[batch, ...\]",
        ),
        (
            lambda: fax.models.cross_entropy(jnp.ones((3, 2)), {"y": jnp.ones(3)}),
            "labels are float64, expected integers",
        ),
    ],
)
def test_mistakes(call, message):
    kind = TypeError if "no option" in message else ValueError
    with pytest.raises(kind, match=message):
        call()
