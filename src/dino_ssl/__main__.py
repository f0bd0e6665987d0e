"""`python -m dino_ssl`, and `torchrun --nproc-per-node 2 -m dino_ssl train photos/`."""

import sys

from dino_ssl.cli import main

if __name__ == "__main__":
    sys.exit(main())
