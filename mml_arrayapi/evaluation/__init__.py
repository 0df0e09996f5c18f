"""Evaluation of files of any size: inputs, exact figures, journal, workers, report, command."""

from mml_arrayapi.evaluation.errors import InputError, WorkerError
from mml_arrayapi.evaluation.figures import Evaluation
from mml_arrayapi.evaluation.run import evaluate

__all__ = ["Evaluation", "InputError", "WorkerError", "evaluate"]
