"""A library that can be imported by name, and is wrong: its ``arange`` starts at 1."""

import sys

from tests.conformance.broken.arrays import Namespace
from tests.conformance.broken.libraries import arange_from_1

sys.modules[__name__] = Namespace(__name__, arange=arange_from_1)
