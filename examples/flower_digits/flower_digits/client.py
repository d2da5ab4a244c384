"""The ClientApp. The package `fax_client` is written by `fax.deploy.write_flower_client`."""

from flower_digits.fax_client import client_app

app = client_app("flower_digits.data:load")
