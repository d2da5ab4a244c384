"""The command ``fax``: experiments from the shell. ``fax --help`` says what it can do."""

from fax.command._main import main as main
