"""`python -m qlora_jax.cli` is `qlora-jax`."""

import sys

from qlora_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
