"""The share of readings above a threshold, computed at the sensors, averaged at the server."""

import jax
import jax.numpy as jnp

import fax


@fax.program(sensors=3)
def share_above(threshold, readings):
    shares = fax.map(lambda t, r: jnp.mean(r > t), fax.broadcast(threshold), readings)
    return fax.mean(shares)


readings = jnp.array([[18.0, 21.5, 26.0, 30.5], [17.5, 19.0, 22.0, 24.5], [25.5, 28.0, 31.0, 25.5]])
print("share of readings above 25 degrees:", share_above(25.0, readings))
print(jax.make_jaxpr(share_above)(25.0, readings))  # one round of communication: federated_map
