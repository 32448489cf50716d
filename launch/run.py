"""Start a run, or (under torchrun) be one rank of it: see `python launch/run.py --help`.

Behind the word `serve` it is the server: `python launch/run.py serve --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flowspec.cli import main

words = sys.argv[1:]
sys.exit(main(words if words[:1] == ["serve"] else ["run", *words]))
