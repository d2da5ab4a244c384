"""A small transformer, split over devices, and the text to train it on: Python's standard library.

Its participants, which are clients or replicas, have two axes of the mesh for themselves:

    data      every batch of a participant is split over it
    model     attention heads and hidden units are split over it
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

import fax

HEADS = 2


def use_eight_devices(placement):
    """Sets a mesh of 2 x 2 x 2 devices, made of one CPU."""
    jax.config.update("jax_platforms", "cpu")  # remove these two lines to use eight accelerators
    fax.sharding.use_cpu_devices(8)
    mesh = fax.sharding.make_mesh(**{placement: 2}, data=2, model=2)
    jax.set_mesh(mesh)
    return mesh


class Block(nnx.Module):
    """Causal attention, then a hidden layer.

    A device has half of the heads and of the hidden units. The matrices before them are split by
    columns, so each device computes its own part from the whole of `x`. The matrices after them are
    split by rows, so each device computes one term of a sum. Only this sum over `model` has to be
    sent: twice in the forward pass and twice in the backward pass.
    """

    def __init__(self, width, rngs):
        def linear(inputs, outputs, spec, axis=-1):
            init = nnx.with_partitioning(nnx.initializers.lecun_normal(), spec)
            return nnx.LinearGeneral(
                inputs, outputs, axis=axis, use_bias=False, kernel_init=init, rngs=rngs
            )

        head = (HEADS, width // HEADS)
        self.norm_1 = nnx.LayerNorm(width, rngs=rngs)
        self.attend = linear(width, (3, *head), (None, None, "model", None))
        self.mix = linear(head, width, ("model", None, None), axis=(-2, -1))
        self.norm_2 = nnx.LayerNorm(width, rngs=rngs)
        self.hide = linear(width, 4 * width, (None, "model"))
        self.show = linear(4 * width, width, ("model", None))

    def __call__(self, x):
        qkv = shard(self.attend(self.norm_1(x)), "data", None, None, "model")
        query, key, value = jnp.moveaxis(qkv, 2, 0)
        heads = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = shard(x + self.mix(heads), "data")
        hidden = shard(nnx.relu(self.hide(self.norm_2(x))), "data", None, "model")
        return shard(x + self.show(hidden), "data")


class Transformer(nnx.Module):
    def __init__(self, characters, length, width, blocks, rngs):
        self.embed = nnx.Linear(characters, width, use_bias=False, rngs=rngs)
        self.positions = nnx.Param(0.1 * jax.random.normal(rngs.params(), (length, width)))
        self.blocks = nnx.List(Block(width, rngs) for _ in range(blocks))
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.out = nnx.Linear(width, characters, rngs=rngs)
        self.characters = characters

    def __call__(self, text):
        # A matrix product, because the gradient of a lookup would gather the batch over `data`.
        x = self.embed(jax.nn.one_hot(shard(text, "data"), self.characters)) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x))


def shard(x, *axes):
    """Shards the dimensions of `x` over mesh axes, the first over the first axis, and so on."""
    return lax.with_sharding_constraint(x, P(*axes))


def load(length):
    """Returns the task, with sequences of this length, and the number of characters."""
    task = fax.tasks.load("pystdlib", length=length)
    params = jax.eval_shape(task.model.init, jax.random.key(0))
    text = {"x": jax.ShapeDtypeStruct((1, length), jnp.int32)}
    return task, jax.eval_shape(task.model.apply, params, text).shape[-1]


def make_model(*sizes):
    """Returns the transformer as pure functions, and how its parameters are sharded."""

    def build(rngs):
        return Transformer(*sizes, rngs)

    shapes = nnx.state(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param)
    specs = nnx.to_pure_dict(nnx.get_partition_spec(shapes))
    return fax.models.functional(build, fax.models.sequence_cross_entropy), specs
