"""`python -m unloaf`, and so `torchrun -m unloaf` and `accelerate launch -m unloaf`."""

import sys

from unloaf.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
