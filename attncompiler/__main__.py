"""`python -m attncompiler`."""

import sys

from attncompiler.cli.main import main

sys.exit(main())
