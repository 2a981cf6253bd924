"""`python -m weft.server.cli`, where the script is not on the path."""

import sys

from weft.server.cli import main

sys.exit(main())
