"""`python -m saferlhf_fast`: the command line, where its script is not on the path (torchrun -m …)."""

import sys

from saferlhf_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
