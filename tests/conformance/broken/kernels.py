"""A plain NumPy kernel for the arrays of this folder, and what can be wrong with it."""

import time

import numpy as np

from mml_arrayapi import Kernel
from mml_arrayapi.validation import raise_invalid_target

# What is wrong -> the check that must find it, and the dtype with which it does.
FAULTS = {
    "drops NaN": ("nan score makes its loss and gradient row nan", "float32"),
    "one NaN row makes all rows NaN": ("nan score makes its loss and gradient row nan", "float32"),
    "gradient at the kink": ("gradient is 0 at the kink", "float32"),
    "computes in float16": ("intermediate results do not overflow", "float16"),
    "computes float64 in float32": ("golden vectors agree", "float64"),
    "class sums one by one in float32": ("sums over classes are accurate", "float32"),
    "batch sums one by one in float32": ("sums over the batch are accurate", "float32"),
    "target's gradient summed in float32": ("gradient at the target class is accurate", "float32"),
    "gradient scale rounded to float16": ("small gradients keep their precision", "float16"),
    "weight rounded to float16": ("weight is used in the computing precision", "float16"),
    "wraps negative targets": ("check target nan makes nan of that sample", "float32"),
    "does not check targets": ("check target raise raises", "float32"),
    "narrows targets to int32": ("check target raise raises", "float32"),
    "reports the last wrong target": (
        "error names the first position value and number of classes",
        "float32",
    ),
    "raises with check_target nan": ("check target nan makes nan of that sample", "float32"),
    "gives NaN where auto raises": ("check target auto raises or gives nan", "float32"),
    "subtracts margin ** p": ("target class is left out by masking", "float32"),
    "masks the next class": ("golden vectors agree", "float32"),
    "masks by multiplying with 0": ("class masked with minus infinity costs nothing", "float32"),
    "loses the margin": ("margin survives large scores", "float32"),
    "adds the score": ("adding a number to all scores changes nothing", "float32"),
    "clips infinite scores": ("infinities follow the formula", "float32"),
    "weight inside the power": ("weight multiplies outside the power", "float32"),
    "ignores negative weights": ("weight multiplies outside the power", "float32"),
    "NaN weight counts as 0": ("nan weight makes its class nan", "float32"),
    "rounds p": ("p is any real number from 1", "float32"),
    "sum not divided by C": ("float64 reference agrees", "float32"),
    "empty mean is 0": ("empty batches", "float32"),
    "forgets the target's gradient": ("gradient rows sum to 0", "float32"),
    "forgets the factor p": ("finite differences agree", "float32"),
    "ignores grad_output": ("grad output multiplies the gradient", "float32"),
    "another loss beside the gradient": ("loss with and without gradient is the same", "float32"),
    "returns float64": ("results have the dtype of input", "float32"),
    "returns another device": ("results are on the device of input", "float32"),
    "takes int64 targets only": ("target may have any integer dtype", "float32"),
    "keeps an axis in the mean": ("batch has any number of axes", "float32"),
    "takes the last axis for the classes": ("axis says where the classes are", "float32"),
    "changes the input": ("inputs are not changed", "float32"),
    "writes into the input and back": ("read only inputs are accepted", "float32"),
    "reads memory as if contiguous": ("slices with steps are accepted", "float32"),
    "takes every array for C order": ("transposed inputs are accepted", "float32"),
    "reads beyond a broadcast row": ("broadcast inputs are accepted", "float32"),
    "one buffer for all threads": ("threads do not disturb each other", "float32"),
    "differs from the generic code": (
        "specialised kernel agrees with the generic code",
        "float32",
    ),
}  # fmt: skip


def kernel(fault, library):
    """Make the kernel with a fault; "" for none."""

    def loss_and_grad(problem, grad_output):
        with np.errstate(all="ignore"):
            return _compute(problem, grad_output, fault)

    def loss(problem):
        value = loss_and_grad(problem, None)[0]
        if fault == "another loss beside the gradient":
            value = value + 0.25
        return value

    return Kernel(name_of(fault), library, lambda _: None, loss, loss_and_grad)


def name_of(fault):
    return f"plain: {fault or 'no fault'}"


_buffer = {}


def _compute(problem, grad_output, fault):
    given, axis, p, margin = problem.input.a, problem.axis, problem.p, problem.margin
    dtype = given.dtype
    if fault == "changes the input":
        given[np.isnan(given)] = 0
    if fault == "writes into the input and back":
        given += 0
    x = _laid_out(given, fault)
    if fault != "takes the last axis for the classes":
        x = np.moveaxis(x, axis, -1)
    work = _working_dtype(dtype, fault)
    x = x.astype(work)
    if fault == "clips infinite scores":
        x = np.clip(x, -1e30, 1e30)
    n_classes = x.shape[-1]
    y, invalid = _checked_targets(problem, n_classes, fault)
    own = np.arange(n_classes) == (y + (fault == "masks the next class"))[..., None]
    x_y = np.take_along_axis(x, y[..., None], -1)
    gap = work.type(margin)
    z = (gap - x_y) + x if fault == "loses the margin" else (x - x_y) + gap
    if fault == "adds the score":
        z = z + work.type(0.001) * x
    others = np.where(own, 0, z)
    lost = np.isnan(others).any(-1) | np.isnan(x_y[..., 0])
    if fault == "masks by multiplying with 0":
        lost |= np.isnan((others * (others > 0)).sum(-1))
    if fault == "one NaN row makes all rows NaN":
        lost[...] = lost.any()
    if fault == "drops NaN":
        lost[...] = False
    active = (z >= 0) if fault == "gradient at the kink" else (z > 0)
    if fault != "subtracts margin ** p":
        active &= ~own
    exponent = round(p) if fault == "rounds p" else p
    positive = np.where(active, z, 1)
    terms = np.where(active, positive**exponent, 0)
    slope = np.where(active, positive ** (exponent - 1), 0)
    if fault != "forgets the factor p":
        slope = slope * work.type(exponent)
    slope = np.where(own, 0, slope)

    weight = _weights(problem, y, work, fault)
    if fault == "weight inside the power":
        losses = _sum(
            np.where(weight[..., None] > 0, terms * weight[..., None] ** p, 0), work, fault
        )
    else:
        losses = _sum(terms, work, fault)
        if fault == "subtracts margin ** p":
            losses = losses - margin**p
        losses = losses * weight
    if not (fault == "sum not divided by C" and problem.reduction == "sum"):
        losses = losses / n_classes
    if fault == "differs from the generic code":
        losses = losses * (1 + 1e-4)
    total = _sum(slope, work, fault)
    if fault == "target's gradient summed in float32":
        total = np.cumsum(slope, -1, dtype=np.float32)[..., -1]
    lost = lost | invalid
    losses = np.where(lost, np.nan, losses)

    scale = weight / n_classes
    if problem.reduction == "mean" and losses.size:
        scale = scale / losses.size
    if fault == "gradient scale rounded to float16":
        scale = scale.astype(np.float16).astype(np.float64)
    if grad_output is not None and fault != "ignores grad_output":
        scale = scale * grad_output.a.astype(np.float64)
    scale = np.where(lost, np.nan, scale)
    grad = slope * scale[..., None]
    if fault == "drops NaN":
        grad = np.nan_to_num(grad)
    if fault != "forgets the target's gradient":
        grad = np.where(own, (-total * scale)[..., None], grad)
    if fault != "takes the last axis for the classes":
        grad = np.moveaxis(grad, -1, axis)
    return _finished(problem, losses, grad, dtype, fault)


def _laid_out(given, fault):
    """Return the scores as the kernel finds them in memory."""
    if fault == "one buffer for all threads":
        _buffer["x"] = given.copy()
        time.sleep(0.0005)  # another thread takes its turn
        return _buffer["x"]
    whole = given.base if given.base is not None else given
    contiguous = given.flags.c_contiguous or whole.size < given.size or whole.dtype != given.dtype
    if fault == "reads memory as if contiguous" and not contiguous:
        return whole.ravel()[: given.size].reshape(given.shape)
    if fault == "takes every array for C order" and given.flags.f_contiguous and given.ndim == 2:
        return given.ravel(order="K").reshape(given.shape)
    if fault == "reads beyond a broadcast row" and 0 in given.strides:
        padded = np.zeros(given.size, given.dtype)
        padded[: whole.size] = whole.ravel()
        return padded.reshape(given.shape)
    return given


def _working_dtype(dtype, fault):
    if dtype == np.float16 and fault != "computes in float16":
        return np.dtype(np.float32)
    if dtype == np.float64 and fault == "computes float64 in float32":
        return np.dtype(np.float32)
    return dtype


def _checked_targets(problem, n_classes, fault):
    y = problem.target.a
    if fault == "takes int64 targets only" and y.dtype != np.int64:
        raise TypeError("targets must be int64")
    if fault == "narrows targets to int32":
        y = y.astype(np.int32)
    mode = problem.check_target
    if fault == "raises with check_target nan":
        mode = "raise"
    if mode == "raise" and fault not in ("does not check targets", "gives NaN where auto raises"):
        shown = y.ravel()[::-1].reshape(y.shape) if fault == "reports the last wrong target" else y
        raise_invalid_target(type(problem.target)(shown, problem.xp), n_classes)
    invalid = (y < 0) | (y >= n_classes)
    if fault == "wraps negative targets":
        wraps = (y < 0) & (y >= -n_classes)
        y, invalid = np.where(wraps, y + n_classes, y), invalid & ~wraps
    return np.where(invalid, 0, y).astype(np.int64), invalid


def _weights(problem, y, work, fault):
    if problem.weight is None:
        return np.ones(y.shape)
    weight = problem.weight.a
    if fault == "weight rounded to float16":
        weight = weight.astype(np.float16)
    weight = weight.astype(work).astype(np.float64)
    if fault == "ignores negative weights":
        weight = np.maximum(weight, 0)
    if fault == "NaN weight counts as 0":
        weight = np.nan_to_num(weight)
    return weight[y]


def _sum(terms, work, fault):
    if fault == "class sums one by one in float32":
        return np.cumsum(terms, -1, dtype=np.float32)[..., -1].astype(np.float64)
    return terms.sum(-1, dtype=work if fault == "computes in float16" else np.float64)


def _finished(problem, losses, grad, dtype, fault):
    if problem.reduction == "none":
        loss = losses
    else:
        loss = losses.sum()
        if fault == "batch sums one by one in float32" and losses.size:
            loss = np.cumsum(losses, dtype=np.float32)[-1]
        if problem.reduction == "mean":
            loss = loss / losses.size
            if fault == "empty mean is 0" and not losses.size:
                loss = np.float64(0)
            if fault == "keeps an axis in the mean":
                loss = loss[None]
    if fault != "returns float64":
        loss, grad = loss.astype(dtype), grad.astype(dtype)
    device = "gpu" if fault == "returns another device" else problem.input.device
    kind = type(problem.input)
    return kind(np.asarray(loss), problem.xp, device), kind(grad, problem.xp, device)
