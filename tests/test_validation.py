"""Every message, the order of the checks, and targets out of range, on every library."""

import itertools
import pickle
from enum import Enum
from fractions import Fraction
from functools import partial
from types import SimpleNamespace

import array_api_compat.numpy
import numpy as np
import pytest

from mml_arrayapi import (
    InvalidTargetError,
    LossAccumulator,
    explain,
    multi_margin_loss,
    multi_margin_loss_and_grad,
)
from mml_arrayapi.libraries import HOST, _masked_elements, plain

X, T = np.zeros((2, 3), np.float32), np.array([0, 1])
BAD_ARGUMENTS = [
    ({"reduction": 1}, TypeError, r"reduction must be a string, but is 1 of type int"),
    (
        {"reduction": "avg"},
        ValueError,
        r"reduction must be one of 'none', 'mean', 'sum', but is 'avg'",
    ),
    ({"p": "2"}, TypeError, r"p must be a real number, but is '2' of type str"),
    ({"p": True}, TypeError, r"p must be a real number, but is True of type bool"),
    ({"p": 2j}, TypeError, r"p must be a real number, but is 2j of type complex"),
    ({"p": 0.5}, ValueError, r"p must be a finite real number >= 1, but is 0\.5"),
    ({"p": np.nan}, ValueError, r"p must be a finite real number >= 1, but is nan"),
    ({"p": np.inf}, ValueError, r"p must be a finite real number >= 1, but is inf"),
    ({"margin": None}, TypeError, r"margin must be a real number, but is None of type NoneType"),
    ({"margin": np.nan}, ValueError, r"margin must be a finite real number, but is nan"),
    ({"margin": -np.inf}, ValueError, r"margin must be a finite real number, but is -inf"),
    ({"margin": -(10**400)}, ValueError, r"margin must be a finite real .* too large for a float"),
    ({"p": 10**400}, ValueError, r"p must be a finite real number, but is too large for a float"),
    (
        {"check_target": "no"},
        ValueError,
        r"check_target must be one of 'auto', 'raise', 'nan', but is 'no'",
    ),
    ({"check_target": None}, ValueError, r"check_target must be one of .*, but is None"),
    ({"axis": 1.0}, TypeError, r"axis must be an integer, but is 1\.0 of type float"),
    ({"axis": False}, TypeError, r"axis must be an integer, but is False of type bool"),
    (
        {"axis": 2},
        ValueError,
        r"axis must lie between -2 and 1 for input of shape \(2, 3\), but is 2",
    ),
    ({"axis": -3}, ValueError, r"axis must lie between -2 and 1 .*, but is -3"),
    *(
        ({name: np.timedelta64(2, "s")}, TypeError, rf"{name} must be .*of type timedelta64")
        for name in ("p", "margin", "axis", "ignore_index")
    ),
    ({"backend": "none"}, ValueError, r"backend: no kernel is named 'none'; known kernels are "),
]


@pytest.mark.parametrize("function", [multi_margin_loss, multi_margin_loss_and_grad])
@pytest.mark.parametrize(("given", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments(lib, function, given, error, message):
    with pytest.raises(error, match=message):
        function(lib.array(X), lib.array(T), **given)


@pytest.mark.parametrize("p", [2, 2.0, np.float32(2), np.int64(2), Fraction(2)])
def test_any_real_number_will_do(p):
    x = np.array([[0.0, 1.0]])
    assert multi_margin_loss(x, np.array([0]), p=p, margin=p) == 4.5


def array_cases(lib):
    x, t = lib.array(X), lib.array(T)
    w = lib.array(np.ones(3, np.float32))
    yield (
        (x, lib.array([0, 1, 2])), {}, ValueError,
        r"target must have input's shape without the classes' axis, \(2,\), but has shape \(3,\) "
        r"\(input has shape \(2, 3\), the classes are at axis 1\)",
    )  # fmt: skip
    yield (x, lib.array([[0], [1]])), {}, ValueError, r"target must have .* has shape \(2, 1\)"
    yield (x, lib.array(0)), {}, ValueError, r"target must have .* has shape \(\)"
    yield (
        (lib.array(np.zeros((2, 0), np.float32)), t), {}, ValueError,
        r"input must have at least one class, but has shape \(2, 0\)",
    )  # fmt: skip
    yield (
        (x, t),
        {"weight": lib.array(X)},
        ValueError,
        r"weight must have shape \(C,\), but has shape \(2, 3\)",
    )
    yield (
        (x, t), {"weight": lib.array(np.ones(2, np.float32))}, ValueError,
        r"weight must have one element per class, shape \(3,\), but has shape \(2,\)",
    )  # fmt: skip
    yield (
        (lib.array(np.zeros((2, 3), np.int32)), t), {}, TypeError,
        r"input must have a real floating dtype \(float16, bfloat16, float32 or float64\), but has "
        r"dtype .*int32",
    )  # fmt: skip
    yield (lib.array(np.zeros((2, 3), bool)), t), {}, TypeError, r"input must have a real .*bool"
    yield (
        (lib.array(np.zeros((2, 3), np.complex64)), t),
        {},
        TypeError,
        r"input must have .*complex64",
    )
    yield (
        (x, lib.array(np.zeros(2, np.float32))),
        {},
        TypeError,
        r"target must have an integer dtype, but has dtype .*float32",
    )
    yield (x, lib.array(np.zeros(2, bool))), {}, TypeError, r"target must have an integer .*bool"
    yield (
        (x, t),
        {"weight": lib.array(np.ones(3, np.int32))},
        TypeError,
        r"weight must have a real .*int32",
    )
    yield (x, t), {"weight": 1.0}, TypeError, r"weight must be an array, but is 1\.0 of type float"
    yield (x, [0, 1]), {}, TypeError, r"target must be an array, but is \[0, 1\] of type list"
    yield ([[0.0]], t), {}, TypeError, r"input must be an array, but is \[\[0\.0\]\] of type list"
    # The order: each of these breaks several rules, and the first one is reported.
    yield (x, [0]), {"reduction": "x", "p": 0}, ValueError, "reduction must"
    yield (x, [0]), {"p": 0, "margin": np.nan}, ValueError, "p must"
    yield (x, [0]), {"margin": np.nan, "weight": lib.array(X)}, ValueError, "margin must"
    yield (
        (lib.array(np.zeros((2, 0))), t),
        {"weight": lib.array(X)},
        ValueError,
        "weight must have shape",
    )
    yield (lib.array(np.zeros((2, 0))), lib.array([1])), {}, ValueError, "input must"
    yield (x, lib.array([1])), {"weight": lib.array(np.ones(2))}, ValueError, "target must"
    yield (
        (lib.array(np.zeros((2, 3), np.int32)), t),
        {"weight": lib.array(np.ones(2))},
        ValueError,
        "weight must",
    )
    yield (
        (lib.array(np.zeros((2, 3), np.int32)), lib.array(np.zeros(2, bool))),
        {},
        TypeError,
        "input must",
    )
    yield (
        (x, lib.array(np.zeros(2, bool))),
        {"weight": lib.array(np.ones(3, bool))},
        TypeError,
        "target must",
    )
    yield (x, lib.array([0, 9])), {"weight": lib.array(np.ones(3, bool))}, TypeError, "weight must"
    yield (x, lib.array([0, 9])), {"weight": w, "p": 0}, ValueError, "p must"


@pytest.mark.parametrize(
    "case", range(len(list(array_cases(type("L", (), {"array": lambda _, v, d=None: v})()))))
)
def test_bad_arrays(lib, case):
    arguments, options, error, message = list(array_cases(lib))[case]
    with pytest.raises(error, match=message):
        multi_margin_loss(*arguments, **options)


def test_a_mix_of_libraries_names_both(lib):
    if lib.name in ("numpy", "dask"):
        pytest.skip(f"{lib.name}: tested against the others")
    x, t, w = lib.array(X), lib.array(T), lib.array(np.ones(3, np.float32))
    with pytest.raises(
        TypeError,
        match=f"target must come from the same library as input, but target is of numpy and "
        f"input is of {lib.name}",
    ):
        multi_margin_loss(x, T)
    with pytest.raises(TypeError, match=f"weight is of numpy and input is of {lib.name}"):
        multi_margin_loss(x, t, weight=np.ones(3, np.float32))
    with pytest.raises(TypeError, match=f"target is of {lib.name} and input is of numpy"):
        multi_margin_loss(X, t)
    with pytest.raises(TypeError, match=f"weight is of {lib.name} and input is of numpy"):
        multi_margin_loss(X, T, weight=w)
    with pytest.raises(TypeError, match=f"grad_output is of {lib.name} and input is of numpy"):
        multi_margin_loss_and_grad(X, T, grad_output=lib.array(np.float32(1)))


def test_numpy_beside_dask():
    da = pytest.importorskip("dask.array")
    x = da.from_array(X, chunks=1)
    weight = np.ones(3, np.float32)
    loss, grad = multi_margin_loss_and_grad(x, T, weight=weight, reduction="none")
    expected, expected_grad = multi_margin_loss_and_grad(X, T, weight=weight, reduction="none")
    np.testing.assert_allclose(loss, expected)
    np.testing.assert_allclose(grad, expected_grad)


def test_a_mix_of_devices_names_both():
    xp = pytest.importorskip("array_api_strict")
    there = xp.Device("device1")
    x, t = xp.asarray(X), xp.asarray(T)
    message = "target must be on the same device as input, but target is on .*device1.* and input is on .*CPU"
    with pytest.raises(TypeError, match=message):
        multi_margin_loss(x, xp.asarray(T, device=there))
    with pytest.raises(TypeError, match="weight must be on the same device"):
        multi_margin_loss(x, t, weight=xp.asarray(np.ones(3, np.float32), device=there))
    assert (
        multi_margin_loss(xp.asarray(X, device=there), xp.asarray(T, device=there)).device == there
    )


def test_no_array_at_all():
    class Strange:
        shape = (2, 3)

    with pytest.raises(
        TypeError,
        match=r"input must be an array of a library that follows the Python array API standard "
        r"\(NumPy, PyTorch, CuPy, Dask, JAX \.\.\.\), but is of type .*Strange",
    ):
        multi_margin_loss(Strange(), T)


@pytest.mark.parametrize(
    ("grad_output", "reduction", "error", "message"),
    [
        (np.ones(3, np.float32), "none", ValueError,
         r"grad_output must have the loss's shape, \(2,\), but has shape \(3,\) \(reduction is 'none'\)"),
        (np.ones(2, np.float32), "mean", ValueError, r"grad_output must .*, \(\), but has shape \(2,\)"),
        (np.ones((), np.int32), "sum", TypeError, r"grad_output must have a real floating dtype .*int32"),
    ],
)  # fmt: skip
def test_bad_grad_output(lib, grad_output, reduction, error, message):
    with pytest.raises(error, match=message):
        multi_margin_loss_and_grad(
            lib.array(X), lib.array(T), reduction=reduction, grad_output=lib.array(grad_output)
        )
    with pytest.raises(TypeError, match=r"grad_output must be an array, but is 1\.0 of type float"):
        multi_margin_loss_and_grad(lib.array(X), lib.array(T), grad_output=1.0)


@pytest.mark.parametrize("bad", [-1, 3, 127])
def test_target_out_of_range_raises(lib, bad):
    x, t = lib.array(np.zeros((4, 3), np.float32)), lib.array(np.array([0, 2, bad, bad], np.int8))
    message = rf"target\[2\] is {bad}, but input has 3 classes: accepted are 0 to 2"
    for mode in ("raise",) if lib.on_gpu else ("auto", "raise"):
        for reduction in ("none", "mean"):
            with pytest.raises(InvalidTargetError, match=message) as info:
                lib.numpy(multi_margin_loss(x, t, check_target=mode, reduction=reduction))
            assert (info.value.position, info.value.value, info.value.n_classes) == ((2,), bad, 3)
        with pytest.raises(InvalidTargetError, match=message):
            lib.numpy(multi_margin_loss_and_grad(x, t, check_target=mode)[1])


@pytest.mark.parametrize("bad", [-1, 3, -128])
def test_target_out_of_range_gives_nan(lib, bad):
    scores = np.zeros((3, 3), np.float32)
    x, t = lib.array(scores), lib.array(np.array([0, bad, 2], np.int8))
    loss, grad = multi_margin_loss_and_grad(x, t, check_target="nan", reduction="none")
    assert np.isnan(lib.numpy(loss)).tolist() == [False, True, False]
    assert np.isnan(lib.numpy(grad)).tolist() == [[False] * 3, [True] * 3, [False] * 3]
    assert np.isnan(lib.numpy(multi_margin_loss(x, t, check_target="nan")))


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("int64", 2**32), ("int64", 2**32 + 1), ("uint64", 2**63), ("uint64", 2**64 - 1), ("uint32", 2**32 - 1),
     ("uint32", 2**31), ("uint8", 255), ("int64", -(2**63)), ("int16", -(2**15)), ("uint16", 2**16 - 1)],
)  # fmt: skip
def test_no_target_is_narrowed_into_range(lib, dtype, value):
    if not lib.has(dtype):
        pytest.skip(f"{lib.name} has no {dtype}")
    x, t = (
        lib.array(np.zeros((2, 3), np.float32)),
        lib.array(np.array([0, value], dtype=dtype), dtype),
    )
    with pytest.raises(InvalidTargetError, match=rf"target\[1\] is {value},"):
        lib.numpy(multi_margin_loss(x, t, **lib.raising))
    loss = multi_margin_loss(x, t, check_target="nan", reduction="none")
    assert np.isnan(lib.numpy(loss)).tolist() == [False, True]


def test_more_classes_than_the_targets_dtype_can_say(lib):
    x = lib.array(np.zeros((2, 300), np.float32))
    t = lib.array(np.array([0, 255], np.uint8))
    assert float(multi_margin_loss(x, t)) == pytest.approx(299 / 300)


def test_position_in_a_batch_of_higher_rank(lib):
    t = np.zeros((2, 3), np.int64)
    t[1, 2] = 7
    x = lib.array(np.zeros((2, 3, 1), np.float32))
    with pytest.raises(
        InvalidTargetError, match=r"target\[1, 2\] is 7, but input has 1 class: accepted are 0 to 0"
    ):
        lib.numpy(multi_margin_loss(x, lib.array(t), **lib.raising))


def test_a_single_sample_has_no_position(lib):
    x = lib.array(np.zeros(3, np.float32))
    with pytest.raises(InvalidTargetError, match=r"target is 5, but input has 3 classes"):
        lib.numpy(multi_margin_loss(x, lib.array(5), **lib.raising))


def test_invalid_target_is_an_index_and_a_value_error_and_survives_pickling():
    error = InvalidTargetError((3,), 12, 10)
    assert isinstance(error, IndexError)
    assert isinstance(error, ValueError)
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert (again.position, again.value, again.n_classes) == ((3,), 12, 10)


def test_unknown_number_of_classes():
    da = pytest.importorskip("dask.array")
    x = da.from_array(np.zeros((4, 3)), chunks=2)
    x = x[:, da.from_array(np.array([True, True, False]))]
    with pytest.raises(
        ValueError,
        match=r"input must have a known number of classes, but its shape \(4, nan\) is unknown at axis 1",
    ):
        multi_margin_loss(x, np.zeros(4, np.int64))


# Whatever comes in, the message names the argument


class _Hostile:
    """An object whose attributes fail in ways of their own."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)

    def __getattr__(self, name):
        raise RuntimeError(f"no {name} here")


class _NoRepr:
    def __repr__(self):
        raise ValueError("no repr")


class _Namespace:
    shape, dtype = (2, 3), "float32"

    def __array_namespace__(self, **_):
        raise RuntimeError("no namespace")


def _torch(make):
    return lambda: make(pytest.importorskip("torch"))


class _Quantity(np.ndarray):
    unit = "m"


def _jax(make):
    return lambda: make(pytest.importorskip("jax"))


def _of(module, make):
    return lambda: make(pytest.importorskip(module))


ODD = {
    "None": lambda: None,
    "int": lambda: 3,
    "float": lambda: 1.5,
    "complex": lambda: 1j,
    "str": lambda: "scores.npy",
    "bytes": lambda: b"ab",
    "list": lambda: [[0.0, 1.0, 2.0]] * 2,
    "tuple": lambda: (0, 1),
    "dict": dict,
    "set": lambda: {1},
    "range": lambda: range(2),
    "generator": lambda: (i for i in range(2)),
    "memoryview": lambda: memoryview(b"abc"),
    "array.array": lambda: __import__("array").array("f", [1, 2]),
    "a class": lambda: np.ndarray,
    "a module": lambda: np,
    "a function": lambda: np.zeros,
    "no attributes": object,
    "hostile": _Hostile,
    "hostile shape": lambda: _Hostile(shape=3),
    "hostile dtype": lambda: _Hostile(shape=(2, 3)),
    "no repr": _NoRepr,
    "hostile namespace": _Namespace,
    "numpy int": lambda: np.int64(1),
    "numpy void": lambda: np.void(b"abc"),
    "numpy dtype": lambda: np.dtype("f4"),
    "numpy objects": lambda: np.array([[object()] * 3] * 2),
    "numpy structured": lambda: np.zeros((2, 3), [("a", "f4")]),
    "numpy datetime": lambda: np.zeros((2, 3), "M8[s]"),
    "numpy timedelta": lambda: np.zeros((2, 3), "m8[s]"),
    "numpy strings": lambda: np.array([["a"] * 3] * 2),
    "numpy masked": lambda: np.ma.masked_array(X, X > 1),
    "numpy masked targets": lambda: np.ma.masked_array(T),
    "numpy matrix": lambda: np.asmatrix(X),
    "numpy with a unit": lambda: X.view(_Quantity),
    "numpy records": lambda: np.rec.array([(1.0,)], dtype=[("a", "f4")]),
    "torch nested": _torch(lambda t: t.nested.nested_tensor([t.zeros(3), t.zeros(2)])),
    "torch jagged": _torch(
        lambda t: t.nested.nested_tensor([t.zeros(3), t.zeros(2)], layout=t.jagged)
    ),
    "torch sparse": _torch(lambda t: t.zeros(2, 3).to_sparse()),
    "torch CSR": _torch(lambda t: t.eye(3).to_sparse_csr()),
    "torch quantised": _torch(lambda t: t.quantize_per_tensor(t.zeros(2, 3), 0.1, 0, t.quint8)),
    "torch float8": _torch(lambda t: t.zeros(2, 3).to(t.float8_e4m3fn)),
    "torch size": _torch(lambda t: t.zeros(2, 3).shape),
    "torch uninitialised": _torch(lambda t: t.nn.parameter.UninitializedParameter()),
    "torch dtype": _torch(lambda t: t.float32),
    "torch module": _torch(lambda t: t.nn.Linear(2, 3)),
    "jax struct": _jax(lambda j: j.ShapeDtypeStruct((2, 3), "float32")),
    "jax key": _jax(lambda j: j.random.key(0)),
    "jax sparse": _of("jax.experimental.sparse", lambda s: s.BCOO.fromdense(np.eye(3))),
    "dask masked": _of("dask.array", lambda d: d.ma.masked_greater(d.zeros((2, 3), chunks=1), 1)),
    "dask delayed": _of("dask", lambda d: d.delayed(3)),
    "dask bag": _of("dask.bag", lambda b: b.from_sequence([1, 2])),
    "scipy sparse matrix": _of("scipy.sparse", lambda s: s.csr_matrix(X)),
    "scipy sparse array": _of("scipy.sparse", lambda s: s.coo_array(X)),
    "pyarrow array": _of("pyarrow", lambda p: p.array([1, 2])),
    "pyarrow table": _of("pyarrow", lambda p: p.table({"a": [1, 2]})),
    "pyarrow tensor": _of("pyarrow", lambda p: p.Tensor.from_numpy(X)),
    "zarr array": _of("zarr", lambda z: z.array(X)),
    "pandas frame": _of("pandas", lambda p: p.DataFrame(X)),
    "pandas series": _of("pandas", lambda p: p.Series(T)),
    "polars frame": _of("polars", lambda p: p.DataFrame(X)),
    "polars series": _of("polars", lambda p: p.Series([0, 1])),
    "xarray": _of("xarray", lambda x: x.DataArray(X)),
    "awkward": _of("awkward", lambda a: a.Array([[0.0, 1.0], [2.0]])),
    "sparse": _of("sparse", lambda s: s.COO.from_numpy(X)),
}


@pytest.mark.filterwarnings("ignore")  # what libraries say of their own prototypes
@pytest.mark.parametrize("argument", ["input", "target", "weight", "grad_output", "sample_weight"])
@pytest.mark.parametrize("name", ODD)
def test_odd_objects(name, argument):
    odd = ODD[name]()
    if odd is None and argument not in ("input", "target"):
        pytest.skip("None is the default")
    arguments = {"input": X, "target": T, argument: odd}
    function = partial(multi_margin_loss_and_grad, backend="generic")
    if argument == "sample_weight":
        function = LossAccumulator().update
    message = message_of(function, arguments)
    # A 0-d array in place of scores is one sample: then the targets don't fit.
    assert message.startswith((f"{argument} must", "target must have input's shape"))
    assert len(message) < 300
    assert "\n" not in message


def message_of(function, arguments):
    with pytest.raises((TypeError, ValueError)) as info:
        function(**arguments)
    return str(info.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("argument", ["input", "target", "weight"])
@pytest.mark.parametrize("name", [name for name in ODD if name.startswith("torch")])
@pytest.mark.parametrize("followed", [False, True])
def test_odd_objects_after_a_good_call(name, argument, followed):
    """The good call loads the kernel, which then looks at the arguments before the checks do."""
    torch = pytest.importorskip("torch")
    arguments = {"input": torch.zeros(2, 3, requires_grad=followed), "target": torch.tensor([0, 1])}
    multi_margin_loss(**arguments)
    odd = ODD[name]()
    if followed and argument == "input" and isinstance(odd, torch.Tensor):
        if not odd.is_floating_point() or odd.is_quantized or "Uninit" in type(odd).__name__:
            pytest.skip("it can't require a gradient")
        odd.requires_grad_()
    message = message_of(multi_margin_loss, arguments | {argument: odd})
    assert message.startswith((f"{argument} must", "target must have input's shape"))


@pytest.mark.parametrize("argument", ["input", "target", "weight", "grad_output"])
def test_masked_arrays(argument):
    arrays = {
        "input": X,
        "target": T,
        "weight": np.ones(3, np.float32),
        "grad_output": np.ones((), np.float32),
    }
    arrays[argument] = np.ma.masked_array(arrays[argument])
    with pytest.raises(
        TypeError, match=f"{argument} must be a dense array, but is a masked array, whose mask"
    ):
        multi_margin_loss_and_grad(**arrays)


@pytest.mark.parametrize("argument", ["input", "target", "weight", "grad_output"])
def test_masked_elements_of_strangers(argument):
    marray = pytest.importorskip("marray")
    xp = marray.masked_namespace(np)
    plain = {"input": X, "target": T, "weight": np.ones(3, X.dtype), "grad_output": np.ones(())}
    arrays = {name: xp.asarray(array) for name, array in plain.items()}
    wanted = multi_margin_loss_and_grad(**plain)
    for ours, value in zip(multi_margin_loss_and_grad(**arrays), wanted, strict=True):
        assert np.allclose(ours.data, value)
        assert not ours.mask.any()
    masked = np.ones(plain[argument].shape, bool)
    arrays[argument] = xp.asarray(plain[argument], mask=masked)
    with pytest.raises(
        TypeError, match=rf"{argument} must be a dense array, but is a marray\..* masked elements"
    ):
        multi_margin_loss_and_grad(**arrays)


def test_a_mask_that_is_no_array_is_taken_for_one():
    class Odd(np.ndarray):
        mask = object()

    assert _masked_elements(X) is None
    assert _masked_elements(X.view(Odd)).endswith("Odd with masked elements")


def test_one_hot_targets_and_columns_say_what_to_do(lib):
    x = lib.array(X)
    one_hot = lib.array(np.eye(3, dtype=np.int64)[T])
    with pytest.raises(
        ValueError, match=r"has shape \(2, 3\).*; of one-hot targets take the argmax"
    ):
        multi_margin_loss(x, one_hot)
    with pytest.raises(ValueError, match=r"has shape \(2, 1\).*; call target\.reshape\(\(2,\)\)$"):
        multi_margin_loss(x, lib.array(T[:, None]))


def test_labels_that_begin_at_1(lib):
    x, t = lib.array(np.zeros((3, 3), np.float32)), lib.array(np.array([1, 3, 2]))
    with pytest.raises(InvalidTargetError, match=r"are 0 to 2; subtract 1 if labels begin at 1$"):
        lib.numpy(multi_margin_loss(x, t, **lib.raising))
    again = pickle.loads(pickle.dumps(InvalidTargetError((1,), 3, 3)))
    assert str(again).endswith("subtract 1 if labels begin at 1")


def test_a_value_in_a_message_is_short():
    with pytest.raises(
        TypeError, match=r"target must be an array, but is \[0, 0, .*\.\.\. of type"
    ):
        multi_margin_loss(X, [0] * 10_000)


@pytest.mark.parametrize("value", [True, 1.0, "1", np.array(1), [1]])
def test_bad_ignore_index(value):
    with pytest.raises(TypeError, match="ignore_index must be None or an integer, but is"):
        multi_margin_loss(X, T, ignore_index=value)


def test_ignored_targets_are_not_out_of_range(lib):
    x, t = lib.array(np.zeros((3, 3), np.float32)), lib.array(np.array([0, -100, 2]))
    assert float(multi_margin_loss(x, t, ignore_index=-100)) == pytest.approx(2 / 3)
    with pytest.raises(InvalidTargetError, match=r"target\[1\] is -100"):
        lib.numpy(multi_margin_loss(x, t, ignore_index=-1, **lib.raising))


@pytest.mark.parametrize("name", ["torch", "jax.numpy", "array_api_strict"])
def test_arrays_of_numpy_beside_another_library_say_how_they_are_converted(name):
    xp = pytest.importorskip(name)
    scores, target, ones = xp.zeros((2, 3)), xp.asarray([0, 1]), np.ones(3)
    library = name.partition(".")[0]
    with pytest.raises(TypeError) as caught:
        multi_margin_loss(scores, np.asarray([0, 1]))
    assert str(caught.value) == (
        "target must come from the same library as input, but target is of numpy and input is of "
        f"{library}; convert it by {name}.asarray(target)"
    )
    with pytest.raises(TypeError, match=rf"; convert it by {name}\.asarray\(weight\)$"):
        multi_margin_loss(scores, target, weight=ones)
    with pytest.raises(TypeError, match=f"target is of {library} and input is of numpy$"):
        multi_margin_loss(np.zeros((2, 3)), target)


class Words(str, Enum):  # noqa: UP042 - str() of these is no value, unlike a StrEnum's
    SUM = "sum"
    NAN = "nan"


@pytest.mark.parametrize("words", [Words, np.str_], ids=["Enum", "NumPy"])
def test_words_may_be_of_subclasses_of_str(lib, words):
    options = {"reduction": words("sum"), "check_target": words("nan")}
    x, t = lib.array(X), lib.array(T, "int32")
    for result in (
        multi_margin_loss(x, t, **options),
        multi_margin_loss_and_grad(x, t, **options)[0],
    ):
        assert float(result) == pytest.approx(4 / 3)


def test_bfloat16_of_numpy():
    """The same call is served the first time and every other, by every kernel."""
    dtype = np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    rng = np.random.default_rng(0)
    x, t = rng.normal(size=(20, 7)).astype(dtype), rng.integers(0, 7, 20)
    for options in ({}, {"p": 2, "weight": rng.random(7).astype(dtype)}, {"ignore_index": 3}):
        exact = {k: v.astype(float) if k == "weight" else v for k, v in options.items()}
        wanted = multi_margin_loss(x.astype(float), t, **exact)
        for backend in (None, "generic"):
            loss, grad = multi_margin_loss_and_grad(x, t, backend=backend, **options)
            assert loss.dtype == grad.dtype == dtype
            assert float(loss) == pytest.approx(wanted, rel=4e-3)
            assert loss == multi_margin_loss(x, t, backend=backend, **options)
    accumulator = LossAccumulator()
    accumulator.update(x, t)
    assert accumulator.compute() == pytest.approx(multi_margin_loss(x.astype(float), t), rel=1e-6)


@pytest.mark.parametrize("dtype", ["uint1", "int2", "uint2", "int4", "uint4"])
@pytest.mark.parametrize("chunked", [False, True], ids=["NumPy", "Dask"])
def test_small_integers_of_numpy_as_targets(dtype, chunked):
    dtype = np.dtype(getattr(pytest.importorskip("ml_dtypes"), dtype))
    array = np.asarray
    if chunked:
        array = partial(pytest.importorskip("dask.array").from_array, chunks=2)
    x, t = np.random.default_rng(0).normal(size=(4, 3)), np.array([0, 1, 0, 1])
    scores, target = array(x), array(t.astype(dtype))
    for reduction, ignore_index in itertools.product(("none", "mean", "sum"), (None, 1, -100, 300)):
        options = {"p": 2, "ignore_index": ignore_index, "reduction": reduction}
        wanted, wanted_grad = multi_margin_loss_and_grad(x, t, **options)
        for backend in (None, "generic"):
            assert explain(scores, target, **options, backend=backend).kernel
            loss, grad = multi_margin_loss_and_grad(scores, target, **options, backend=backend)
            np.testing.assert_allclose(loss, wanted)
            np.testing.assert_allclose(grad, wanted_grad)
            loss = multi_margin_loss(scores, target, **options, backend=backend)
            np.testing.assert_allclose(loss, wanted)
    for ignore_index in (None, 1, -100, 300):
        results = []
        for labels in (array(t), target):
            accumulator = LossAccumulator(ignore_index=ignore_index)
            accumulator.update(scores, labels)
            results.append((accumulator.compute(), accumulator.count))
        assert results[0] == results[1]
    one_class = scores[:, :1]
    for backend in (None, "generic"):
        with pytest.raises(InvalidTargetError, match=r"target\[[13]\] is 1"):
            np.asarray(multi_margin_loss(one_class, target, backend=backend))
        losses = multi_margin_loss(
            one_class, target, backend=backend, check_target="nan", reduction="none"
        )
        np.testing.assert_array_equal(losses, [0, np.nan, 0, np.nan])
    with pytest.raises(TypeError, match=f"weight must have a real .*, but has dtype {dtype}"):
        multi_margin_loss(scores, target, weight=np.ones(3, dtype))


def test_chunks_that_are_no_small_integers_as_dask_was_told():
    """They are not cut off to integers."""
    dtype = pytest.importorskip("ml_dtypes").int4
    array = partial(pytest.importorskip("dask.array").from_array, chunks=2)
    target = array(np.array([0.5, 1.5])).map_blocks(
        lambda block: block, dtype=dtype, meta=np.empty(0, dtype)
    )
    with pytest.raises(TypeError, match="Cannot cast"):
        multi_margin_loss(array(np.zeros((2, 3))), target).compute()


def test_a_library_whose_largest_unsigned_number_is_wrong():
    """Targets are compared as signed numbers: in ndonnx 0.23 the largest uint64 counts as none."""

    def largest(array):
        return np.int64(0) if array.dtype.kind == "u" else np.max(array)

    library = plain(
        "odd", SimpleNamespace(**vars(array_api_compat.numpy) | {"max": largest}), lambda _: HOST
    )
    assert library.in_range(np.asarray([0, 4], np.uint64), 5)
    assert not library.in_range(np.asarray([0, 2**64 - 1], np.uint64), 5)
