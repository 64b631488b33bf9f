"""``python -m maskmoe_kernels``: the ``maskmoe`` command."""

import sys

from maskmoe_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
