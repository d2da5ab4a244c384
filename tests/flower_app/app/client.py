"""The ClientApp of the tests, in a process for each message."""

import os

from app.data import note, refuse
from app.fax_client import client_app

note("message")
refuse("message", ["fax", "jax", "flax", "optax", "app.programs"])
app = client_app("app.data:load", secure=0.5 if "FAX_TESTS_SECURE" in os.environ else None)
