"""How a `federated_map` is evaluated and compiled. Importing it registers that with JAX."""

from jax.interpreters import mlir

from fax.lowering import _pipeline
from fax.primitives._round import federated_map_p

federated_map_p.def_impl(_pipeline.evaluate)
mlir.register_lowering(federated_map_p, _pipeline.lowered("cpu"), platform="cpu")
mlir.register_lowering(federated_map_p, _pipeline.lowered("tpu"), platform="tpu")
mlir.register_lowering(federated_map_p, _pipeline.lowered("gpu"))
