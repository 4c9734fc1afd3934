"""`python PATH/TO/pytorch-optimization/generator` and `python -m generator`."""

import sys
from pathlib import Path

if __package__:
    from .cli import main
else:  # started by its path: make the bundle's folder the import root
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from generator.cli import main

if __name__ == "__main__":
    sys.exit(main())
