"""The plain NumPy kernel again, with faults that show where several options come together only."""

import numpy as np

from mml_arrayapi import Kernel
from tests.conformance.broken import kernels

TWO = ("any two options work together", "float32")
THREE = ("any three options work together", "float32")


def kernel(fault, library):
    """Make the kernel with a fault."""
    sound = kernels.kernel("", library)
    _, when, wrong = FAULTS[fault]

    def loss_and_grad(problem, grad_output):
        if when(problem, grad_output):
            return wrong(sound.loss_and_grad, problem, grad_output)
        return sound.loss_and_grad(problem, grad_output)

    def loss(problem):
        return loss_and_grad(problem, None)[0]

    able = frozenset({"ignore_index"})
    name = kernels.name_of(fault)
    return Kernel(name, library, lambda _: None, loss, loss_and_grad, supports=able)


# When something is wrong


def another_axis(problem, _=None):
    return problem.axis != problem.input.ndim - 1


def weighted(problem, _=None):
    return problem.weight is not None


def has_nan(array):
    return array is not None and bool(np.isnan(array.a).any())


# What is wrong then: functions of the sound kernel, the problem and grad_output


def changed(array, values):
    return type(array)(np.asarray(values), array.xp, array.device)


def doubles_the_loss(sound, problem, up):
    loss, grad = sound(problem, up)
    return changed(loss, loss.a * loss.dtype.type(2)), grad


def doubles_the_gradient(sound, problem, up):
    loss, grad = sound(problem, up)
    return loss, changed(grad, grad.a * grad.dtype.type(2))


def drops_nan_of_the_loss(sound, problem, up):
    loss, grad = sound(problem, up)
    return changed(loss, np.nan_to_num(loss.a)), grad


def drops_nan_of_the_gradient(sound, problem, up):
    loss, grad = sound(problem, up)
    return loss, changed(grad, np.nan_to_num(grad.a))


def makes_the_gradient_nan(sound, problem, up):
    loss, grad = sound(problem, up)
    return loss, changed(grad, grad.a * np.nan)


def makes_the_gradient_float64(sound, problem, up):
    loss, grad = sound(problem, up)
    return loss, changed(grad, grad.a.astype(np.float64))


def forgets_ignore_index(sound, problem, up):
    return sound(problem._replace(ignore_index=None, check_target="nan"), up)


def forgets_the_weight_in_the_gradient(sound, problem, up):
    return sound(problem, up)[0], sound(problem._replace(weight=None), up)[1]


def divides_the_gradient_by_all(sound, problem, up):
    loss, grad = sound(problem, up)
    y = problem.target.a
    left = np.count_nonzero(y != problem.ignore_index)
    return loss, changed(grad, (grad.a * (left / y.size)).astype(grad.dtype))


def makes_ignored_ones_nan(sound, problem, up):
    loss, grad = sound(problem, up)
    y = problem.target.a
    wrong = (y < 0) | (y >= problem.input.shape[problem.axis])
    if problem.reduction != "none":
        wrong = wrong.any()
    return changed(loss, np.where(wrong, loss.dtype.type(np.nan), loss.a)), grad


def with_weight(change):
    def wrong(sound, problem, up):
        weight = changed(problem.weight, change(problem.weight.a))
        return sound(problem._replace(weight=weight), up)

    return wrong


def with_target(change):
    def wrong(sound, problem, up):
        target = changed(problem.target, change(problem.target.a))
        return sound(problem._replace(target=target, check_target="nan"), up)

    return wrong


def with_the_margin_in_float16(sound, problem, up):
    return sound(problem._replace(margin=float(np.float16(problem.margin))), up)


def all_ignored(problem, _=None):
    y = problem.target.a
    return (
        y.size > 0 and problem.ignore_index is not None and bool((y == problem.ignore_index).all())
    )


def in_fortran_order(problem, _=None):
    flags = problem.target.flags
    return problem.target.ndim > 1 and flags.f_contiguous and not flags.c_contiguous


# What is wrong -> the check that must find it, and the dtype with which it does; when, and how.
FAULTS = {
    "doubles the gradient of sums along another axis": (
        TWO,
        lambda p, up: p.reduction == "sum" and another_axis(p),
        doubles_the_gradient,
    ),
    "reverses the weights along another axis": (
        TWO,
        lambda p, up: weighted(p) and another_axis(p),
        with_weight(lambda weight: weight[::-1].copy()),
    ),
    "ignores no class along another axis": (
        TWO,
        lambda p, up: p.ignore_index is not None and another_axis(p),
        forgets_ignore_index,
    ),
    "grad_output without the weight": (
        TWO,
        lambda p, up: up is not None and weighted(p),
        forgets_the_weight_in_the_gradient,
    ),
    "grad_output of a mean that counts ignored samples": (
        TWO,
        lambda p, up: up is not None and p.reduction == "mean" and p.ignore_index is not None,
        divides_the_gradient_by_all,
    ),
    "ignored ones are NaN with check_target nan": (
        TWO,
        lambda p, up: p.check_target == "nan" and p.ignore_index is not None,
        makes_ignored_ones_nan,
    ),
    "weight of float64 rounded to float32": (
        (TWO[0], "float64"),
        lambda p, up: weighted(p) and p.weight.dtype == np.float64,
        with_weight(lambda weight: weight.astype(np.float32)),
    ),
    "margin rounded to float16": (
        ("margin is used in the computing precision", "float16"),
        lambda p, up: p.input.dtype == np.float16,
        with_the_margin_in_float16,
    ),
    "uint8 targets read as int8": (
        ("target may be any class that its dtype holds", "float32"),
        lambda p, up: p.target.dtype == np.uint8,
        with_target(lambda y: y.astype(np.int8)),
    ),
    "uint16 targets read as int16": (
        ("target may be any class that its dtype holds", "float32"),
        lambda p, up: p.target.dtype == np.uint16,
        with_target(lambda y: y.astype(np.int16)),
    ),
    "NaN of a single class is lost": (
        TWO,
        lambda p, up: p.input.shape[p.axis] == 1,
        drops_nan_of_the_loss,
    ),
    "doubles the loss of p = 1.5 with a negative margin": (
        TWO,
        lambda p, up: p.p == 1.5 and p.margin < 0,
        doubles_the_loss,
    ),
    "doubles the weighted loss of many samples": (
        TWO,
        lambda p, up: weighted(p) and p.target.size > 2000,
        doubles_the_loss,
    ),
    "doubles the weighted gradient of many classes": (
        TWO,
        lambda p, up: weighted(p) and p.input.shape[p.axis] > 100,
        doubles_the_gradient,
    ),
    "doubles the gradient of four axes": (
        TWO,
        lambda p, up: p.input.ndim >= 4,
        doubles_the_gradient,
    ),
    "reads targets with a stride of 0 as 0": (
        TWO,
        lambda p, up: p.target.size > 0 and 0 in p.target.a.strides,
        with_target(np.zeros_like),
    ),
    "reads targets in Fortran order as if in C order": (
        TWO,
        in_fortran_order,
        with_target(lambda y: y.ravel("K").reshape(y.shape)),
    ),
    "doubles the weighted gradient of p = 1.5 at a middle axis": (
        THREE,
        lambda p, up: weighted(p) and p.p == 1.5 and 0 < p.axis < p.input.ndim - 1,
        doubles_the_gradient,
    ),
    "doubles the loss of p = 2 without a margin and with ignored targets": (
        THREE,
        lambda p, up: p.p == 2 and p.margin == 0 and p.ignore_index is not None,
        doubles_the_loss,
    ),
    "drops a NaN of grad_output": (
        TWO,
        lambda p, up: has_nan(up),
        drops_nan_of_the_gradient,
    ),
    "grad_output of 0 times NaN is 0": (
        TWO,
        lambda p, up: up is not None and bool((up.a == 0).any()),
        drops_nan_of_the_gradient,
    ),
    "gradient of a mean of nothing is NaN": (
        ("all samples ignored", "float32"),
        lambda p, up: p.reduction == "mean" and all_ignored(p),
        makes_the_gradient_nan,
    ),
    "gradient of an empty batch is float64": (
        ("empty batches", "float32"),
        lambda p, up: p.target.size == 0,
        makes_the_gradient_float64,
    ),
}

# Every kernel that is broken on purpose -> the check that must find it, and the dtype.
CLAIMS = {**kernels.FAULTS, **{fault: claim for fault, (claim, *_) in FAULTS.items()}}
