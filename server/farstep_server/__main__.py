"""``python -m farstep_server`` is the command ``farstep-server``."""

import sys

from farstep_server.cli import main

if __name__ == "__main__":
    sys.exit(main())
