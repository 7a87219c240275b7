"""`python -m experiments`: the darkroom command."""

import sys

from experiments.main import main

sys.exit(main())
