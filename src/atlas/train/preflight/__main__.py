"""`python -m atlas.train.preflight` is `atlas preflight`."""

import sys

from atlas.train.preflight import main

sys.exit(main())
