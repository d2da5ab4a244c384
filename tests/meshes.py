"""Meshes for tests, in every kind of axis types."""

import math

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import fax

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit

# The types of the first axis and of all others.
KINDS = {
    "auto": (AUTO, AUTO),
    "explicit": (EXPLICIT, EXPLICIT),
    "first-explicit": (EXPLICIT, AUTO),
    "first-auto": (AUTO, EXPLICIT),
}


def mixed(kind):
    """For `subsets`: axes of one type, in whichever, are alike, and so are those of two types."""
    return kind not in ("auto", "explicit")


def mesh(kind="auto", **axes):
    """A mesh over as many of the devices as it needs."""
    first, others = KINDS[kind]
    types = [first, *[others] * (len(axes) - 1)]
    devices = jax.devices()[: math.prod(axes.values())]
    return fax.sharding.make_mesh(devices=devices, axis_types=types, **axes)


def put(x, *spec):
    """An array laid out over the mesh in scope."""
    return jax.device_put(x, NamedSharding(jax.sharding.get_mesh(), PartitionSpec(*spec)))
