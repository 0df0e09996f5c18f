"""Memory of the recipe docs/recipes/many-classes.md: the last layer in chunks, and as a whole.

``python benchmarks/many_classes.py`` prints the extra memory at its peak, beyond the arguments, as
NumPy asked for it (tracemalloc).
"""

import platform
import re
import tracemalloc
from pathlib import Path

import numpy as np

from mml_arrayapi import multi_margin_loss_and_grad

PAGE = Path(__file__).parent.parent / "docs" / "recipes" / "many-classes.md"
SAMPLES, CLASSES, FEATURES = 8192, 16000, 256


def recipe():
    """Return the function that the page prints."""
    code = re.search(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)[1]
    names = {}
    exec(code, names)
    return names["linear_multi_margin_loss"]


def whole(features, weights, target):
    """Compute the loss and its gradients by way of the whole matrix of scores."""
    loss, grad = multi_margin_loss_and_grad(features @ weights.T, target)
    return loss, grad @ weights, grad.T @ features


def extra_memory(function, *arguments):
    """Return the bytes that a call takes at its peak, its results included."""
    tracemalloc.start()
    function(*arguments)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def main():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((SAMPLES, FEATURES), dtype=np.float32)
    weights = rng.standard_normal((CLASSES, FEATURES), dtype=np.float32)
    target = rng.integers(0, CLASSES, SAMPLES)
    print(
        f"{SAMPLES} samples, {CLASSES} classes, {FEATURES} features, float32; {platform.machine()}"
    )
    for name, function in (("in chunks", recipe()), ("as a whole", whole)):
        print(f"{name}: {extra_memory(function, features, weights, target) / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
