"""The multi-class hinge loss (PyTorch's ``multi_margin_loss``) for every Python array library.

Written once against the Python array API standard, with fused kernels where they exist.
Importing this package imports no array library.
"""

from typing import TYPE_CHECKING

from mml_arrayapi import _checkout  # noqa: F401 - before anything in those folders
from mml_arrayapi._version import __version__
from mml_arrayapi.accumulator import LossAccumulator
from mml_arrayapi.kernel import Kernel, Problem
from mml_arrayapi.loss import explain, multi_margin_loss, multi_margin_loss_and_grad
from mml_arrayapi.registry import list_backends, register_kernel, unregister_kernel, use_backend
from mml_arrayapi.validation import InvalidTargetError

if TYPE_CHECKING:
    from mml_arrayapi.evaluation import Evaluation, InputError, WorkerError, evaluate
else:

    def __getattr__(name):
        # Importing it takes longer than all the rest, and few programs evaluate files.
        if name in ("Evaluation", "InputError", "WorkerError", "evaluate"):
            from mml_arrayapi import evaluation

            return getattr(evaluation, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Evaluation",
    "InputError",
    "InvalidTargetError",
    "Kernel",
    "LossAccumulator",
    "Problem",
    "WorkerError",
    "__version__",
    "evaluate",
    "explain",
    "list_backends",
    "multi_margin_loss",
    "multi_margin_loss_and_grad",
    "register_kernel",
    "unregister_kernel",
    "use_backend",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
