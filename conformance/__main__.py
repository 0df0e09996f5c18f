"""``python -m mml_arrayapi.conformance`` is ``mml-arrayapi conformance``."""

import argparse
import sys

from mml_arrayapi.conformance.command import add_arguments

parser = argparse.ArgumentParser(prog="python -m mml_arrayapi.conformance")
add_arguments(parser)
arguments = parser.parse_args()
sys.exit(arguments.run(arguments))
