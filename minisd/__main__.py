"""python -m minisd is the `minisd` command."""

import sys

from .cli import main

sys.exit(main())
