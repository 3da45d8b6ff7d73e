"""`python -m swincompress_pl` is the command `swincompress`."""

import sys

from swincompress_pl.cli import main

sys.exit(main())
