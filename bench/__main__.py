"""``python -m bench``; see ``bench/README.md``."""

import sys

try:
    from bench.command import entry
except KeyboardInterrupt:  # importing torch takes seconds
    print("interrupted", file=sys.stderr)
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(entry(sys.argv[1:]))
