"""`python -m minilpt` is `minilpt`."""

import sys

from .cli import main

sys.exit(main())
