"""A library that can be imported by name, and is wrong: its ``arange`` starts at 1."""

import sys

from tests.broken.arrays import Namespace
from tests.broken.libraries import arange_from_1

sys.modules[__name__] = Namespace(__name__, arange=arange_from_1)
