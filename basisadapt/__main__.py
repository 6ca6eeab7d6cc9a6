"""`python -m basisadapt NAME`: the command line of studies, as `python -m basisadapt.study NAME`."""

from __future__ import annotations

import sys

from basisadapt.study.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
