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
    "rounds p to 16 bits": ("p is any real number from 1", "float32"),
    "takes p near 2 for 2": ("p is any real number from 1", "float32"),
    "takes small margins for 0": ("margin is any finite number", "float16"),
    "cuts margins": ("margin is any finite number", "float32"),
    "grad_output rounded to float16": ("grad output multiplies the gradient", "float16"),
    "grad_output rounded to float32": ("grad output multiplies the gradient", "float64"),
    "narrows int32 targets to int16": (
        "target may be any class that its dtype holds",
        "float32",
    ),
    "minus infinity is infinity": ("infinities follow the formula", "float32"),
    "transposes square batches": (
        "a batch as long as it is wide keeps its order",
        "float32",
    ),
    "rounds p": ("p is any real number from 1", "float32"),
    "sum not divided by C": ("float64 reference agrees", "float32"),
    "empty mean is 0": ("empty batches", "float32"),
    "forgets the target's gradient": ("gradient rows sum to 0", "float32"),
    "forgets the factor p": ("finite differences agree", "float32"),
    "ignores grad_output": ("grad output multiplies the gradient", "float32"),
    "infinite grad_output times 0 is NaN": (
        "an infinite grad output reaches active classes only",
        "float32",
    ),
    "another loss beside the gradient": ("loss with and without gradient is the same", "float32"),
    "returns float64": ("results have the dtype of input", "float32"),
    "returns another device": ("results are on the device of input", "float32"),
    "takes int64 targets only": ("target may have any integer dtype", "float32"),
    "keeps an axis in the mean": ("batch has any number of axes", "float32"),
    "takes the last axis for the classes": ("axis says where the classes are", "float32"),
    "changes the input": ("inputs are not changed", "float32"),
    "one buffer for losses of a shape": ("results keep their values", "float32"),
    "writes into the input and back": ("read only inputs are accepted", "float32"),
    "reads memory as if contiguous": ("slices with steps are accepted", "float32"),
    "takes every array for C order": ("transposed inputs are accepted", "float32"),
    "reads beyond a broadcast row": ("broadcast inputs are accepted", "float32"),
    "one buffer for all threads": ("threads do not disturb each other", "float32"),
    "one buffer in all threads for the loss alone": ("threads do not disturb each other", "float32"),
    "counts ignored samples": ("ignored samples cost nothing", "float32"),
    "NaN in ignored samples counts": ("ignored samples cost nothing", "float32"),
    "ignored samples have a gradient": ("ignored samples cost nothing", "float32"),
    "NaN weights of ignored samples count": ("ignored samples cost nothing", "float32"),
    "ignores no class": ("ignored samples cost nothing", "float32"),
    "mean of nothing is 0": ("all samples ignored", "float32"),
    "narrows ignore_index": ("ignore index is compared before anything is narrowed", "float32"),
    "widens targets to compare": (
        "ignore index is compared before anything is narrowed",
        "float32",
    ),
    "class sums overflow": ("finite answers stay finite", "float32"),
    "class sums of float64 overflow": ("finite answers stay finite", "float64"),
    "batch sums overflow": ("finite answers stay finite", "float32"),
    "batch sums of float64 overflow": ("finite answers stay finite", "float64"),
    "weighted losses of float64 overflow": (
        "weighted losses beyond the dtype may have a finite sum",
        "float64",
    ),
    "doubles the gradient of large margins with p = 2": ("margin is any finite number", "float32"),
    "large margin makes NaN": ("margin beyond the dtype acts as infinity", "float32"),
    "large margin is cut": ("margin beyond the dtype acts as infinity", "float32"),
    "adds an infinite margin last": ("margin beyond the dtype acts as infinity", "float32"),
    "large losses are cut": ("results beyond the dtype are infinite", "float32"),
    "large weights are cut": ("weights beyond the dtype act as infinity", "float32"),
    "NaN loss beside a gradient of numbers": ("losses that are nan have rows of nan", "float32"),
    "infinity minus infinity for nothing": ("ordinary scores warn of nothing", "float32"),
    "powers by rounded logarithms": ("large powers are accurate", "float32"),
    "reads reversed scores forwards": ("reversed inputs are accepted", "float32"),
    "reads reversed targets forwards": ("reversed inputs are accepted", "float32"),
    "reads reversed weights forwards": ("reversed inputs are accepted", "float32"),
    "reads grad_output as if contiguous": ("grad output may have any layout", "float32"),
    "swaps the batch's axes": ("batch axes may lie in any order", "float32"),
    "leaves out the last class beyond 128": (
        "sizes at which kernels change their way",
        "float32",
    ),
    "one sample too few of more than 64": ("sizes at which kernels change their way", "float32"),
    "NaN beyond the 32nd class is lost": (
        "special values count wherever they stand",
        "float32",
    ),
    "infinity beyond the 32nd class is cut": (
        "special values count wherever they stand",
        "float32",
    ),
    "one block of many is missing": ("large inputs agree with small ones", "float32"),
    "another kernel after twenty calls": ("the same call gives the same bits", "float32"),
    "differs from the generic code": (
        "specialised kernel agrees with the generic code",
        "float32",
    ),
}  # fmt: skip


def kernel(fault, library):
    """Make the kernel with a fault; "" for none."""

    def loss_and_grad(problem, grad_output):
        with np.errstate(all="ignore"):
            loss, grad = _compute(problem, grad_output, fault)
        if fault == "infinity minus infinity for nothing" and np.isneginf(problem.input.a).any():
            np.asarray(np.inf) - np.asarray(np.inf)
        return loss, grad

    def loss(problem):
        value = loss_and_grad(problem, None)[0]
        if fault == "another loss beside the gradient":
            value = value + 0.25
        if fault == "one buffer for losses of a shape" and value.a.ndim:
            kept = _buffer.setdefault((value.a.shape, value.a.dtype), value)
            kept.a[...] = value.a
            value = kept
        if fault == "one buffer in all threads for the loss alone" and not value.a.ndim:
            _buffer["loss"] = value
            time.sleep(0.0005)
            value = _buffer["loss"]
        return value

    able = frozenset({"ignore_index"})
    return Kernel(name_of(fault), library, lambda _: None, loss, loss_and_grad, supports=able)


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
    if fault == "transposes square batches" and x.ndim == 3 and x.shape[0] == x.shape[1]:
        x = np.swapaxes(x, 0, 1)
    if fault == "swaps the batch's axes" and x.ndim == 3 and x.shape[0] < x.shape[1]:
        x = np.reshape(np.swapaxes(x, 0, 1), x.shape)
    ignored = _ignored(problem, fault)
    work = _working_dtype(dtype, fault)
    x = x.astype(work)
    if fault != "NaN in ignored samples counts":
        x = np.where(ignored[..., None], 0, x)
    x = _with_faulty_values(x, fault)
    n_classes = x.shape[-1]
    y, invalid = _checked_targets(problem, n_classes, ignored, fault)
    own = np.arange(n_classes) == (y + (fault == "masks the next class"))[..., None]
    x_y = np.take_along_axis(x, y[..., None], -1)
    gap = work.type(margin)
    if fault == "takes small margins for 0" and abs(margin) < 1e-3:
        gap = work.type(0)
    if fault == "cuts margins":
        gap = np.clip(gap, -10, 100)
    if fault == "large margin is cut":
        gap = np.clip(gap, -1e38, 1e38)
    z = (gap - x_y) + x if fault == "loses the margin" else (x - x_y) + gap
    if np.isinf(gap) and fault != "adds an infinite margin last":
        z = (x + gap) - x_y
    if fault == "adds the score":
        z = z + work.type(0.001) * x
    others = np.where(own, 0, z)
    lost = np.isnan(others).any(-1) | np.isnan(x_y[..., 0])
    if fault == "masks by multiplying with 0":
        lost |= np.isnan((others * (others > 0)).sum(-1))
    if fault == "large margin makes NaN":
        lost |= np.isnan((z * ~own).sum(-1))
    if fault == "one NaN row makes all rows NaN":
        lost[...] = lost.any()
    if fault == "drops NaN":
        lost[...] = False
    active = (z >= 0) if fault == "gradient at the kink" else (z > 0)
    if fault != "subtracts margin ** p":
        active &= ~own
    if fault == "leaves out the last class beyond 128" and n_classes > 128:
        active[..., -1] = False
    exponent = _exponent(p, fault)
    positive = np.where(active, z, 1)
    if fault == "powers by rounded logarithms":
        terms = np.where(active, np.exp(p * np.log(positive).astype(np.float16).astype(work)), 0)
    else:
        terms = np.where(active, positive**exponent, 0)
    slope = np.where(active, positive ** (exponent - 1), 0)
    if fault != "forgets the factor p":
        slope = slope * work.type(exponent)
    slope = np.where(own, 0, slope)

    weight = _weights(problem, y, work, fault)
    if fault == "weight inside the power":
        losses = _class_sum(
            np.where(weight[..., None] > 0, terms * weight[..., None] ** p, 0), work, fault
        )
    else:
        losses = _class_sum(terms, work, fault)
        if fault == "subtracts margin ** p":
            losses = losses - margin**p / n_classes
        losses = losses * (weight * _unit(problem, fault))
    if fault == "sum not divided by C" and problem.reduction == "sum":
        losses = losses * n_classes
    if fault == "differs from the generic code":
        losses = losses * (1 + 1e-4)
    total = slope.sum(-1, dtype=np.float64)
    if fault == "target's gradient summed in float32":
        total = np.cumsum(slope, -1, dtype=np.float32)[..., -1]
    lost = lost | invalid
    losses = np.where(lost, np.nan, losses)
    if fault == "minus infinity is infinity":
        losses = np.where(losses == -np.inf, np.inf, losses)
    if fault not in ("NaN loss beside a gradient of numbers", "drops NaN"):
        lost = lost | np.isnan(losses)
    if fault != "NaN in ignored samples counts":
        losses = np.where(ignored, 0, losses)
    if fault == "NaN weights of ignored samples count" and problem.weight is not None:
        given = problem.weight.a[np.clip(problem.target.a.astype(int), 0, n_classes - 1)]
        losses = np.where(ignored & np.isnan(given), np.nan, losses)

    count = losses.size - (0 if fault == "counts ignored samples" else ignored.sum())
    scale = weight / n_classes
    if problem.reduction == "mean" and count:
        scale = scale / count
    if fault == "gradient scale rounded to float16":
        scale = scale.astype(np.float16).astype(np.float64)
    if grad_output is not None and fault != "ignores grad_output":
        scale = scale * _upstream(grad_output.a, fault).astype(np.float64)
    scale = np.where(lost, np.nan, scale)
    if fault != "ignored samples have a gradient":
        scale = np.where(ignored, 0, scale)
    if fault != "infinite grad_output times 0 is NaN":
        finite = np.where(np.isinf(scale), 0, scale)
        own_scale = np.where(total == 0, finite, scale)
        scales = np.where(slope == 0, finite[..., None], scale[..., None])
    else:
        own_scale, scales = scale, scale[..., None]
    grad = slope * scales
    if fault == "doubles the gradient of large margins with p = 2" and p == 2 and margin > 3:
        grad, total = 2 * grad, 2 * total
    if fault == "drops NaN":
        grad = np.nan_to_num(grad)
    if fault != "forgets the target's gradient":
        grad = np.where(own, (-total * own_scale)[..., None], grad)
    if fault == "one sample too few of more than 64" and grad.ndim == 2 and len(grad) > 64:
        grad[-1] = 0
    if fault == "one block of many is missing" and grad.size > 2**20:
        grad[len(grad) // 2 :][:100] = 0
    if fault == "another kernel after twenty calls":
        _calls.append(1)
        grad = grad * (1 + 2**-20 * (len(_calls) > 20))
    if fault != "takes the last axis for the classes":
        grad = np.moveaxis(grad, -1, axis)
    return _finished(problem, losses, grad, count, fault)


_calls = []


def _ignored(problem, fault):
    y, index = problem.target.a, problem.ignore_index
    if index is None or fault == "ignores no class":
        return np.zeros(y.shape, bool)
    if fault == "narrows ignore_index":
        return y == np.asarray([index % 2**64], np.uint64).astype(y.dtype)
    if fault == "widens targets to compare":
        return y.astype(np.int64) == index
    return np.asarray(y.astype(object) == index, dtype=bool)


def _with_faulty_values(x, fault):
    x = np.array(x)
    beyond = x[..., 32:]
    if fault == "clips infinite scores":
        x = np.clip(x, -1e30, 1e30)
    if fault == "NaN beyond the 32nd class is lost":
        beyond[np.isnan(beyond)] = -1e30
    if fault == "infinity beyond the 32nd class is cut":
        beyond[np.isposinf(beyond)] = 1e30
    return x


def _exponent(p, fault):
    if fault == "rounds p":
        return round(p)
    if fault == "rounds p to 16 bits":
        return float(np.float16(p))
    return 2 if fault == "takes p near 2 for 2" and abs(p - 2) < 1e-3 else p


def _upstream(given, fault):
    if fault.startswith("grad_output rounded to "):
        return given.astype(fault.rpartition(" ")[2])
    if fault == "reads grad_output as if contiguous" and given.base is not None:
        memory = given.base.ravel()
        if memory.size >= given.size and given.ndim == 1:
            return memory[: given.size]
    return given


def _laid_out(given, fault):
    """Return the scores as the kernel finds them in memory."""
    if fault == "one buffer for all threads":
        _buffer["x"] = given.copy()
        time.sleep(0.0005)  # another thread takes its turn
        return _buffer["x"]
    if fault == "reads reversed scores forwards" and given.strides[0] < 0:
        return given[::-1]
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


def _checked_targets(problem, n_classes, ignored, fault):
    y = problem.target.a
    if fault == "reads reversed targets forwards" and y.strides and y.strides[0] < 0:
        y = y[::-1]
    y = np.where(ignored, np.asarray(0, y.dtype), y)
    if fault == "takes int64 targets only" and y.dtype != np.int64:
        raise TypeError("targets must be int64")
    if fault == "narrows targets to int32":
        y = y.astype(np.int32)
    if fault == "narrows int32 targets to int16" and y.dtype == np.int32:
        y = y.astype(np.int16)
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
    if fault == "reads reversed weights forwards" and weight.strides[0] < 0:
        weight = weight[::-1]
    weight = weight.astype(work).astype(np.float64)
    if fault == "large weights are cut":
        weight = np.clip(weight, -3e38, 3e38)
    if fault == "ignores negative weights":
        weight = np.maximum(weight, 0)
    if fault == "NaN weight counts as 0":
        weight = np.nan_to_num(weight)
    return weight[y]


def _unit(problem, fault):
    """Return what weighted losses are multiplied by until they are added."""
    added = problem.weight is not None and problem.reduction != "none"
    return 2.0**-64 if added and fault != "weighted losses of float64 overflow" else 1.0


def _class_sum(terms, work, fault):
    """The sum over the classes, divided by their number."""
    n_classes = terms.shape[-1]
    if fault == "class sums one by one in float32":
        return np.cumsum(terms, -1, dtype=np.float32)[..., -1].astype(np.float64) / n_classes
    if fault == "class sums overflow":
        return terms.sum(-1, dtype=work) / n_classes
    if fault == "class sums of float64 overflow":
        return terms.sum(-1, dtype=np.float64) / n_classes
    wide = work if fault == "computes in float16" else np.float64
    return (terms / wide(n_classes) if wide is np.float64 else terms / n_classes).sum(
        -1, dtype=wide
    )


def _finished(problem, losses, grad, count, fault):
    dtype = problem.input.a.dtype
    if problem.reduction == "none":
        loss = losses
    elif problem.reduction == "sum":
        loss = _batch_sum(losses, dtype, fault)
    elif not count:
        alone = fault == "empty mean is 0" and not losses.size
        loss = np.float64(0 if alone or fault == "mean of nothing is 0" else np.nan)
    else:
        whole = fault in ("batch sums overflow", "batch sums of float64 overflow")
        parts = losses if whole else losses / count
        loss = _batch_sum(parts, dtype, fault) / (count if whole else 1)
    loss = loss / _unit(problem, fault)
    if fault == "keeps an axis in the mean" and problem.reduction == "mean":
        loss = np.asarray(loss)[None]
    if fault == "large losses are cut":
        loss = np.clip(loss, -3e38, 3e38)
    if fault != "returns float64":
        loss, grad = np.asarray(loss).astype(dtype), grad.astype(dtype)
    device = "gpu" if fault == "returns another device" else problem.input.device
    kind = type(problem.input)
    return kind(np.asarray(loss), problem.xp, device), kind(grad, problem.xp, device)


def _batch_sum(losses, dtype, fault):
    if fault == "batch sums one by one in float32" and losses.size:
        return np.cumsum(losses, dtype=np.float32)[-1]
    if fault == "batch sums overflow" and dtype == np.float32:
        return losses.sum(dtype=np.float32)
    return losses.sum()
