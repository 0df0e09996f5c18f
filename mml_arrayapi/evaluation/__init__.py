"""Evaluation of files of any size: inputs, exact figures, journal, workers, report, command."""

from mml_arrayapi.evaluation.inputs import InputError, WorkerError
from mml_arrayapi.evaluation.metrics import Evaluation
from mml_arrayapi.evaluation.run import evaluate

__all__ = ["Evaluation", "InputError", "WorkerError", "evaluate"]
