"""``python -m trainers.commands``: same as ``unihyperlora``, if the command is not on the path."""

import sys

from . import main

sys.exit(main())
