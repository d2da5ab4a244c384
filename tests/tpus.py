"""TPUs for tests: meshes of devices that are only described, and reports of programs for them."""

import jax
import pytest
from jax.sharding import AxisType

import fax

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
FOUR = "v5e:2x2"


def require():
    """Skips a file's tests where the TPU compiler is not installed."""
    pytest.importorskip(
        "libtpu", reason="the TPU compiler is not installed: pip install 'fax-jax[tpu]'"
    )


def mesh(kind=AUTO, *, name=FOUR, slices=1, **axes):
    """A mesh of all devices of TPUs; the default has four on ``clients``."""
    devices = fax.sharding.topology(name, slices=slices)
    axes = axes or {"clients": len(devices)}
    return fax.sharding.make_mesh(devices=devices, axis_types=(kind,) * len(axes), **axes)


def shaped(shape, *spec, dtype="float32"):
    """An argument, laid out over the mesh in scope."""
    sharding = jax.NamedSharding(jax.sharding.get_mesh(), jax.P(*spec))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
