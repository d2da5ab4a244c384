"""What has to be settled before JAX initialises: float64, and several devices on one machine."""

import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 8)
