"""`python -m kv_trainer` and `accelerate launch -m kv_trainer`: the same as `kv-trainer`."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
