"""TPUs that are not there: their descriptions, and programs that are compiled for them."""

import importlib.util
import sys

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import pytest

import fax
from fax.inspect import report
from fax.sharding import topology

NEEDS_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU's compiler, is missing"
)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("v9:2x2", {}, "name is 'v9:2x2', expected a generation .* as in v2:4x4, .*, tpu7x:4x4x4"),
        ("v5e", {}, "name is 'v5e', expected a generation and the number of chips in each dim"),
        (16, {}, "name is 16, expected"),
        ("v5p:4x4", {}, "'v5p:4x4', but a slice of v5p has 3 dimensions and from 1 to 8,960 chips"),
        ("v5e:32x32", {}, "has 2 dimensions and from 1 to 256 chips. For more chips, pass slices"),
        ("v5e:0x2", {}, "has 2 dimensions and from 1 to 256 chips"),
        ("v5e:2x2", {"slices": 0}, "slices is 0, expected an int of at least 1"),
        ("v5e:2x2", {"slices": True}, "slices is True, expected an int of at least 1"),
    ],
)
def test_there_is_no_such_tpu(name, options, message):
    with pytest.raises(fax.PlacementError, match=rf"^fax\.sharding\.topology: .*{message}"):
        topology(name, **options)


def test_what_to_install(monkeypatch):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fax-jax\[tpu\]'"):
        topology("v5e:2x2")


@NEEDS_LIBTPU
def test_devices_of_all_generations():
    sizes = {"v2:2x2": 8, "v3:2x2": 8, "v4:2x2x1": 4, "v5e:4x4": 16, "v5p:2x2x2": 8, "v6e:2x4": 8,
             "tpu7x:2x2x1": 8}  # fmt: skip
    found = {name: topology(name) for name in sizes}
    assert {name: len(devices) for name, devices in found.items()} == sizes
    kinds = [devices[0].device_kind for devices in found.values()]
    assert kinds[:-1] == ["TPU v2", "TPU v3", "TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite"]
    assert [d.slice_index for d in topology("v5e:1x1", slices=3)] == [0, 1, 2]
    with pytest.raises(fax.PlacementError, match=r"'v5e:3x3', but libtpu says: .*not divisible"):
        topology("v5e:3x3")


@NEEDS_LIBTPU
def test_cohorts_need_devices():
    data = fax.data.InMemory({"ann": {"x": np.ones(2)}, "bob": {"x": np.ones(2)}})
    with (
        jax.set_mesh(fax.sharding.make_mesh(devices=topology("v5e:1x1"), clients=-1)),
        pytest.raises(fax.PlacementError, match=r"only described.* outside of jax.set_mesh"),
    ):
        fax.data.cohorts(data, 2, 1)


@NEEDS_LIBTPU
def test_a_round_on_two_slices():
    """The mean is scattered in each slice, summed between slices, and gathered again."""
    width, steps, batch = 256, 3, 8

    def loss(params, batch, key):
        return jnp.sum((batch["x"] @ params["w"] - batch["x"]) ** 2, axis=1)

    x = np.ones((steps * batch, width), np.float32)
    data = fax.data.InMemory({f"{number}": {"x": x} for number in range(16)})
    algorithm = fax.algorithms.fedavg(loss, optax.sgd(0.1), vectorize=1)
    state = algorithm.init({"w": np.ones((width, width), np.float32)})
    mesh = fax.sharding.make_mesh(devices=topology("v5e:2x2", slices=2), clients=-1)
    cohort = next(fax.data.cohorts(data, clients=16, batch_size=batch, resident=False))
    with jax.set_mesh(mesh):
        found = report(jax.jit(algorithm.round, donate_argnums=0), state, cohort)
    assert (found.num_devices, found.num_slices, found.device_kind) == (8, 2, "TPU v5 lite")
    model, part = 4 * width**2, width**2
    large = [c for c in found.collectives if c.bytes >= part]
    assert [(c.operation, c.bytes, c.group_size, c.between_slices) for c in large] == [
        ("reduce-scatter", model, 4, False),
        ("all-reduce", part, 2, True),
        ("all-gather", part, 4, False),
    ]
    assert {(c.axes, c.count, c.loops) for c in found.collectives} == {(("clients",), 1, 0)}
    assert sum(c.total_bytes for c in found.between_slices) <= part + 1024  # and a few numbers
    assert found.flops == 2 * steps * 2 * (2 * batch * width**2)  # 2 clients, 2 products a step
    assert found.padding == fax.inspect.Padding(0, 0, 0)
    rows = 4 * 2 * steps * batch * width
    assert model + rows <= found.memory.argument_bytes <= model + rows + 4096
    assert found.memory.aliased_bytes >= model
    assert found.cycles / 1.5e9 == pytest.approx(found.seconds)
    # The products alone, with all four matrix units of 128 x 128 at work.
    assert found.cycles > found.flops / (4 * 2 * 128**2)
    lines = str(found).splitlines()
    assert lines[0] == "8 devices (TPU v5 lite) in 2 slices, mesh clients=8"
    (line,) = [line for line in lines if "between slices" in line and "64.0 KiB" in line]
    assert line.split()[:6] == ["clients", "all-reduce", "float32", "64.0", "KiB", "1"]
    assert line.endswith(f"between slices, in flight for {large[1].cycles_in_flight:,} cycles")


@NEEDS_LIBTPU
def test_arguments_are_placed_on_described_devices():
    devices = topology("v5e:2x2")
    rows = np.ones((6, 2))
    with jax.set_mesh(fax.sharding.make_mesh(devices=devices, clients=2, model=2)):
        placed = fax.sharding.place(
            {"x": rows, "key": jax.ShapeDtypeStruct((6,), "int8")}, "clients"
        )
        mask = np.ones((6, 2, 1), bool)
        cohort = fax.data.Cohort(rows, mask, mask[:, 0, 0], mask[:, 0, 0], mask[:, 0, 0])
        several = jax.tree.map(lambda x: np.stack([x] * 3), cohort)
        with pytest.raises(fax.PlacementError, match="any of the mesh axes clients, model"):
            report(lambda cohort: cohort, cohort)
        with fax.sharding.layout(clients="clients"):
            found = report(lambda *x: x, placed, cohort, several, rows, 2.0)
            program = fax.program(clients=6)(lambda x: fax.mean(x["x"]))
            (only,) = report(program, placed).collectives
    assert placed["x"].sharding.spec == jax.P(("clients",))
    assert {name: (x.shape, x.dtype) for name, x in placed.items()} == {
        "x": ((6, 2), rows.dtype), "key": ((6,), np.int8)
    }  # fmt: skip
    assert (only.operation, only.axes) == ("all-reduce", ("clients",))
    assert found.num_devices == 4


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_a_described_state_is_like_the_real_one(kind):
    """Parameters that are split, their moments, and rows of replicas."""
    algorithm = fax.algorithms.diloco(lambda *_: 0.0, optax.adam(0.1), replicas=2, steps=2)
    with jax.set_mesh(meshes.mesh(kind, replicas=2, model=4)):
        params = {"in": meshes.put(np.ones((2, 8)), None, "model"), "out": np.ones(3)}
        real = algorithm.init(params)
        found = fax.sharding.eval_shape(algorithm.init, params)
    assert jax.tree.structure(found) == jax.tree.structure(real)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(real), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert one.sharding.is_equivalent_to(other.sharding, other.ndim)
    moment = found.replicas.rows.optimizer[0].mu["in"]
    assert moment.sharding.shard_shape(moment.shape) == (1, 2, 2)


def test_without_a_mesh_there_are_no_shardings():
    found = fax.sharding.eval_shape(lambda x, n: x.sum() * n, np.ones(3, np.float32), n=2)
    assert (found.shape, found.dtype, found.sharding) == ((), np.float32, None)
    with pytest.raises(fax.PlacementError, match=r"^fax.sharding.eval_shape: fn is 3, expected a"):
        fax.sharding.eval_shape(3)


@pytest.mark.parametrize("axes", [{"clients": 4}, {"clients": 2, "model": 2}])
def test_types_are_placed_on_devices_that_are_there(axes):
    with jax.set_mesh(fax.sharding.make_mesh(devices=jax.devices()[:4], **axes)):
        found = fax.sharding.place(jax.ShapeDtypeStruct((8, 3), "float32"), "clients")
        like = fax.sharding.place(np.ones((8, 3), np.float32), "clients")
    assert (found.shape, found.dtype, found.sharding) == (like.shape, like.dtype, like.sharding)
