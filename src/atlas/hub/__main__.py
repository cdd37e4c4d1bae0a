"""`python -m atlas.hub` is `atlas push`."""

import sys

from atlas.hub.push import main

sys.exit(main())
