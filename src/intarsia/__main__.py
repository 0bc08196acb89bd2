"""`python -m intarsia` is the command `intarsia`."""

import sys

from intarsia.cli import main

sys.exit(main())
