"""The files that a Flower app needs for its clients."""

from __future__ import annotations

import os
import pathlib
import shutil

# This folder's files, and their names in the app.
_FILES = {
    "_client.py": "_client.py",
    "_flower_worker.py": "_flower_worker.py",
    "_flower_client.py": "__init__.py",
    # For secure sums:
    "_masks.py": "_masks.py",
    "_secure_client.py": "_secure_client.py",
    "_secure_party.py": "_secure_party.py",
    "_shamir.py": "_shamir.py",
}


def write_flower_client(folder: str | os.PathLike[str]) -> None:
    """Writes the package that a Flower app needs for its clients, to a new folder of the app.

    The package has the function ``client_app(load, plan=, secure=)``, which makes the ClientApp. It
    needs Flower and JAX alone. ``load`` is ``"module:function"``, a function that is called with
    the node's configuration, a dict, and returns the data of the node's clients,
    ``{client: {name: array}}``. ``plan`` is a folder on the node that `Plan.save` wrote, if the
    node runs only its stages; ``fax-plan`` in the node's configuration takes precedence. ``secure``
    is the threshold of secure sums, if the node sends nothing else; see `SecureSums`.

    It also has ``learner_app(make)`` for nodes that are learners, which need fax; see
    `FlowerLearners`.

    Args:
      folder: where to. It may exist if it is empty.

    Raises:
      FileExistsError: if the folder is not empty.

    Example:

      >>> import pathlib, tempfile
      >>> with tempfile.TemporaryDirectory() as app:
      ...     package = pathlib.Path(app, "my_app", "fax_client")
      ...     fax.deploy.write_flower_client(package)
      ...     for path in sorted(package.iterdir()):
      ...         print(path.name)
      __init__.py
      _client.py
      _flower_worker.py
      _masks.py
      _secure_client.py
      _secure_party.py
      _shamir.py

    With this, the file ``my_app/client.py`` of the app can be::

      from my_app.fax_client import client_app

      app = client_app("my_app.data:load")
    """
    path = pathlib.Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    if any(path.iterdir()):
        raise FileExistsError(f"write_flower_client: {path} is not empty; choose a new folder.")
    own = pathlib.Path(__file__).parent
    for source, name in _FILES.items():
        shutil.copyfile(own / source, path / name)
