"""``python -m fax`` is the command ``fax``."""

import sys

from fax.command import main

if __name__ == "__main__":
    sys.exit(main())
