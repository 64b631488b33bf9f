"""``python -m bench``; see ``bench/README.md``."""

import sys

from bench.command import entry

if __name__ == "__main__":
    sys.exit(entry(sys.argv[1:]))
