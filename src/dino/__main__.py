"""`python -m dino`, and `torchrun --nproc-per-node 2 -m dino train photos/`."""

import sys

from dino.cli import main

if __name__ == "__main__":
    sys.exit(main())
