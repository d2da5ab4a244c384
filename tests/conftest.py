"""What has to be settled before JAX initialises: float64, and several devices on one machine."""

import os

# Tests compile much and compute little. XLA's own passes stay on, and with them what tests assert
# on; only the machine code is less polished.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
)

import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 8)
