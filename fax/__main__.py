"""``python -m fax`` is the command ``fax``."""

import sys

from fax.command import main

sys.exit(main())
