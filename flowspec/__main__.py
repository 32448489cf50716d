import sys

from flowspec.cli import main

sys.exit(main())
