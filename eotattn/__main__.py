"""``python -m eotattn`` is the command ``eotattn``."""

import sys

from eotattn.cli import main

if __name__ == "__main__":
    sys.exit(main())
