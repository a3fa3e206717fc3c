"""``python -m signbit``."""

import sys

from signbit.cli import main

sys.exit(main())
