"""Start a run, or (under torchrun) be one rank of it: see `python launch/run.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flowspec.cli import main

sys.exit(main(["run", *sys.argv[1:]]))
