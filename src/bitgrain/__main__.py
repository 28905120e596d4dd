"""`python -m bitgrain` is the command line."""

import sys

from bitgrain.cli.main import main

sys.exit(main())
