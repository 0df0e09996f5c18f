"""The host's side of the GPU kernels: geometry, packed arguments, module cache, devices, streams."""

import ctypes
import re
import struct
import types

import pytest
from mml_arrayapi.backends import cuda_launch
from mml_arrayapi.backends.cuda_launch import Call, geometry, launches, pack, partials


def call(scalar=32, rows=100, classes=10, **changes):
    values = {
        "scores": 4096, "target": 8192, "weight": 0, "row_stride": classes, "target_stride": 1,
        "target_kind": 8, "weight_wide": False, "p": 1.0, "margin": 1.0, "reduction": "mean",
        "multiprocessors": 10,
    }  # fmt: skip
    return Call(scalar=scalar, rows=rows, classes=classes, **{**values, **changes})


def planned(c):
    return geometry(c.scalar, c.rows, c.classes, c.multiprocessors)


def test_fields_are_those_of_the_source():
    text = cuda_launch.source()
    listed = text[text.index("#define FIELDS") : text.index("// and, after the last comma")]
    names = re.findall(r"F\([^,]+, (\w+)\)", listed)
    assert (*names, "grad_factor") == cuda_launch.FIELDS


def test_constants_are_those_of_the_source():
    constants = dict(re.findall(r"(\w+) = ([\w /()*]+),", cuda_launch.source()))
    assert int(constants["BLOCK"]) == cuda_launch.BLOCK
    assert int(constants["TILE_BLOCK"]) == cuda_launch.TILE_BLOCK
    assert int(constants["SCRATCH"]) * 8 == cuda_launch.SCRATCH
    assert constants["UNIT"] == "8"


@pytest.mark.parametrize("scalar", [64, 32, 16, 17])
def test_arguments_are_packed_in_order_in_8_bytes_each(scalar):
    c = call(scalar, rows=7, classes=100, p=3.0, margin=0.25, weight=16, target_kind=-4)
    (step,) = launches(c, planned(c), "loss_grad", result=32, grad=48)
    packed = pack(scalar, step)
    assert len(packed) == 8 * len(cuda_launch.FIELDS)
    place = {name: 8 * i for i, name in enumerate(cuda_launch.FIELDS)}
    integer = {n: struct.unpack_from("<q", packed, place[n])[0] for n in cuda_launch.FIELDS[:23]}
    assert integer["scores"] == 4096
    assert integer["weight"] == 16
    assert integer["result"] == 32
    assert integer["grad"] == 48
    assert integer["flag"] == integer["loss"] == 0
    assert integer["target_kind"] == -4
    assert (integer["rows"], integer["classes"]) == (7, 100)
    real = "<d" if scalar == 64 else "<f"
    assert struct.unpack_from("<d", packed, place["divisor"]) == (7.0,)
    assert struct.unpack_from("<d", packed, place["loss_factor"]) == (1 / 100,)
    assert struct.unpack_from(real, packed, place["margin"]) == (0.25,)
    assert struct.unpack_from(real, packed, place["exponent"]) == (2.0,)
    assert struct.unpack_from(real, packed, place["grad_factor"])[0] == pytest.approx(3 / 700)


@pytest.mark.parametrize(
    ("scalar", "classes", "kernels", "lanes", "mask_row"),
    [
        (32, 1, "tiles", 1, 4),
        (32, 31, "tiles", 1, 4),
        (32, 32, "rows", 4, 4),
        (32, 100, "rows", 4, 16),
        (32, 1000, "rows", 32, 128),
        (32, 1001, "rows", 32, 160),
        (32, 4095, "rows", 32, 544),
        (32, 4096, "wide", 256, 512),
        (17, 8191, "rows", 32, 1056),
        (17, 128256, "wide", 256, 16128),
        (64, 2048, "wide", 256, 256),
    ],
)
def test_geometry(scalar, classes, kernels, lanes, mask_row):
    shape = geometry(scalar, 1000, classes, 10)
    assert (shape.kernels, shape.lanes, shape.mask_row) == (kernels, lanes, mask_row)
    assert shape.mask_row * 8 >= classes


def test_mask_costs_little_for_long_rows():
    assert geometry(32, 65536, 1000, 132).mask_row <= 0.033 * 4000
    assert geometry(17, 4096, 128256, 132).mask_row <= 0.064 * 256512


def test_grid_covers_the_rows_or_strides_over_them():
    assert geometry(32, 100, 1000, 10).grid == 13
    assert geometry(32, 10**7, 10, 132).grid == 132 * 32
    assert geometry(32, 0, 10, 132).grid == 0


def test_shared_memory_stays_within_what_every_device_gives():
    for scalar in (64, 32, 16, 17):
        for classes in range(1, 32):
            assert geometry(scalar, 10, classes, 1).shared <= 48 * 1024


def test_tiny_problems_take_one_launch_and_others_a_second_for_the_sum():
    tiny, larger = call(rows=160, classes=100), call(rows=170, classes=100)
    assert [step.name for step in launches(tiny, planned(tiny), "loss", result=8)] == ["rows_loss"]
    assert partials(tiny, planned(tiny)) == 0
    steps = launches(larger, planned(larger), "loss", result=8, partials=16)
    assert [step.name for step in steps] == ["rows_loss", "finish"]
    assert partials(larger, planned(larger)) == steps[0].grid == steps[0].values[22]
    each = call(rows=170, classes=100, reduction="none")
    assert [step.name for step in launches(each, planned(each), "loss", loss=8)] == ["rows_loss"]
    assert partials(each, planned(each)) == 0


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_an_empty_batch_launches_the_sum_alone(reduction):
    c = call(rows=0, reduction=reduction)
    buffers = {} if reduction == "none" else {"result": 8}
    steps = launches(c, planned(c), "loss", **buffers)
    assert [step.name for step in steps] == ([] if reduction == "none" else ["finish"])


def test_accesses_of_16_bytes_only_where_scores_lie_like_the_gradient():
    def vector(**changes):
        c = call(**changes)
        (step, *_) = launches(c, planned(c), "loss_grad", grad=8)
        return bool(step.values[cuda_launch.FIELDS.index("vector")])

    assert vector(classes=1001)
    assert not vector(classes=1001, scores=4100)
    assert not vector(classes=1001, row_stride=1002)
    assert vector(classes=1001, row_stride=1005)
    assert vector(classes=10)
    assert not vector(classes=10, row_stride=14)  # a tile is one stretch of memory


def test_power_kinds_and_operations():
    assert [cuda_launch.power_kind(p) for p in (1, 1.0, 2.0, 1.5, 3.0)] == [1, 1, 2, 0, 0]
    assert "grad_mask" in cuda_launch.operations(1)
    assert "grad_mask" not in cuda_launch.operations(2)


# --------------------------------------------------------------------------------------------------
# The driver, recorded.


class Recorder:
    """Stands for cuda.bindings.driver: modules and functions are numbers, launches are kept."""

    def __init__(self):
        self.loaded, self.launched, self.status = [], [], 0

    def cuModuleLoadData(self, code):
        self.loaded.append(code)
        return self.status, len(self.loaded)

    def cuModuleGetFunction(self, module, name):
        return 0, (module, name.decode())

    def cuLaunchKernel(self, function, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra):
        count = len(cuda_launch.FIELDS)
        addresses = (ctypes.c_void_p * count).from_address(parameters)
        values = [ctypes.c_int64.from_address(address).value for address in addresses]
        assert (gy, gz, by, bz, extra) == (1, 1, 1, 1, 0)
        self.launched.append((function, gx, bx, shared, stream, values))
        return (self.status,)


@pytest.fixture
def driver(monkeypatch):
    cuda_driver = pytest.importorskip("mml_arrayapi.backends.cuda_driver")
    recorder = Recorder()
    monkeypatch.setattr(cuda_driver, "driver", recorder)
    monkeypatch.setattr(cuda_driver, "_functions", {})
    monkeypatch.setattr(cuda_driver, "compile_variant", lambda *variant: variant)
    recorder.launch = lambda steps, power=1, kernels="rows", device=0, stream=77: (
        cuda_driver.launch(steps, 32, power, kernels, device, stream, lambda d: f"sm_9{d}")
    )
    return recorder


def test_a_launch_reaches_the_driver_with_its_arguments_and_stream(driver):
    c = call(rows=1000, classes=100)
    steps = launches(c, planned(c), "loss", result=8, partials=16)
    driver.launch(steps)
    (first, second) = driver.launched
    assert first[0] == (1, "rows_loss")
    assert second[0] == (1, "finish")
    assert first[1:5] == (steps[0].grid, 256, 256, 77)
    assert tuple(first[5][:23]) == steps[0].values[:23]


def test_a_module_is_loaded_once_per_device_and_variant(driver):
    c = call(rows=1000, classes=100)
    steps = launches(c, planned(c), "loss", result=8, partials=16)
    for device in (0, 1, 0, 1):
        driver.launch(steps, device=device)
    assert driver.loaded == [(32, 1, "rows", "sm_90"), (32, 1, "rows", "sm_91")]
    assert [launched[0][0] for launched in driver.launched] == [1, 1, 2, 2, 1, 1, 2, 2]
    driver.launch(steps, power=2)
    driver.launch(steps, power=2)
    assert driver.loaded[2:] == [(32, 2, "rows", "sm_90")]


def test_what_the_driver_reports_is_raised(driver):
    driver.status = 700
    c = call(rows=1000, classes=100)
    with pytest.raises(RuntimeError, match="CUDA: 700"):
        driver.launch(launches(c, planned(c), "loss", result=8, partials=16))


def test_an_error_of_the_compiler_is_raised_with_its_log():
    cuda_driver = pytest.importorskip("mml_arrayapi.backends.cuda_driver")
    with pytest.raises(RuntimeError) as caught:
        cuda_driver.compile_variant(32, 1, "rows", "sm_90", ("-Dunpack=(",))
    if not str(caught.value).startswith("NVRTC"):
        pytest.skip(f"NVRTC is not there: {caught.value}")
    assert re.search(r"margin_loss.cu\(\d+\): error", str(caught.value))


def problem(**changes):
    dtype = types.SimpleNamespace
    values = {
        "input": types.SimpleNamespace(dtype="torch.float32", ndim=2, shape=(3, 4)),
        "target": dtype(dtype="torch.int64"),
        "axis": 1,
    }
    return types.SimpleNamespace(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"axis": 0}, "the classes are at axis 0, the GPU kernels take the last axis only"),
        (
            {"input": types.SimpleNamespace(dtype="torch.float8_e5m2", ndim=2, shape=(3, 4))},
            "input has dtype float8_e5m2, the GPU kernels take float64, float32, float16, bfloat16",
        ),
        (
            {"target": types.SimpleNamespace(dtype="torch.int4")},
            "target has dtype int4, the GPU kernels take int8, int16",
        ),
        (
            {"input": types.SimpleNamespace(dtype="float32", ndim=2, shape=(3, 2**31))},
            "input has 2147483648 classes, the GPU kernels take 2147483647",
        ),
    ],
)
def test_refusals(changes, reason):
    answer = cuda_launch.refusal(problem(**changes))
    assert answer is None if reason is None else answer.startswith(reason)
