"""`python -m unloaf`, and so `torchrun -m unloaf` and `accelerate launch -m unloaf`."""

import sys

from unloaf.cli import main

if __name__ == "__main__":
    sys.exit(main())
