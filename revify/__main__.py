"""``python -m revify``: the command ``revify``."""

import sys

from revify.cli import main

if __name__ == "__main__":
    sys.exit(main())
