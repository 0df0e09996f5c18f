"""``python -m mml_arrayapi``: the same as the command ``mml-arrayapi``."""

import sys

from mml_arrayapi.cli import main

sys.exit(main())
