"""Cut a Hugging Face checkpoint into one folder a rank: python split_models.py --model
DIR_OR_HUB_ID --stages N --output OUT."""

import sys

from flowspec.commands.split import main

if __name__ == "__main__":
    sys.exit(main())
