"""The multi-class hinge loss (PyTorch's ``multi_margin_loss``) for every Python array library.

Written once against the Python array API standard, with fused kernels where they exist.
Importing this package imports no array library.
"""

from mml_arrayapi._version import __version__
from mml_arrayapi.accumulate import LossAccumulator
from mml_arrayapi.arguments import InvalidTargetError
from mml_arrayapi.evaluate import evaluate
from mml_arrayapi.kernel import Kernel
from mml_arrayapi.loss import explain, multi_margin_loss, multi_margin_loss_and_grad
from mml_arrayapi.registry import backends, register_kernel, use_backend
from mml_arrayapi.sources import InputError, WorkerError
from mml_arrayapi.tally import Evaluation

__all__ = [
    "Evaluation",
    "InputError",
    "InvalidTargetError",
    "Kernel",
    "LossAccumulator",
    "WorkerError",
    "__version__",
    "backends",
    "evaluate",
    "explain",
    "multi_margin_loss",
    "multi_margin_loss_and_grad",
    "register_kernel",
    "use_backend",
]
