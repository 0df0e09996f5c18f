"""The host's side of the GPU kernels: geometry, packed arguments, module cache, devices, streams."""

import ctypes
import re
import struct
import threading
import types

import pytest

from mml_arrayapi.backends.cuda import plan as cuda_plan
from mml_arrayapi.backends.cuda.plan import ADDRESSES, NUMBERS, Call, geometry, make_plan, pack


def call(scalar=32, rows=100, classes=10, **changes):
    values = {
        "row_stride": classes, "target_stride": 1, "target_kind": 8, "weight_wide": False,
        "upstream_stride": 0, "upstream_wide": False, "aligned": True, "p": 1.0, "margin": 1.0,
        "reduction": "mean", "multiprocessors": 10,
    }  # fmt: skip
    return Call(scalar=scalar, rows=rows, classes=classes, **{**values, **changes})


def names(planned):
    return [step.name for step in planned.launches]


def test_fields_are_those_of_the_source():
    text = cuda_plan.source()
    listed = text[text.index("#define FIELDS") : text.index("// and, after the last comma")]
    found = re.findall(r"F\([^,]+, (\w+)\)", listed)
    assert (*found, "grad_factor") == (*ADDRESSES, *NUMBERS)


def test_constants_are_those_of_the_source():
    constants = dict(re.findall(r"(\w+) = ([\w /()*]+),", cuda_plan.source()))
    assert int(constants["BLOCK"]) == cuda_plan.BLOCK
    assert int(constants["TILE_BLOCK"]) == cuda_plan.TILE_BLOCK
    assert int(constants["SCRATCH"]) * 8 == cuda_plan.SCRATCH
    assert constants["UNIT"] == "8"


@pytest.mark.parametrize("scalar", [64, 32, 16, 17])
def test_arguments_are_packed_in_order_in_8_bytes_each(scalar):
    c = call(scalar, rows=7, classes=100, p=3.0, margin=0.25, target_kind=-4, weight_wide=True)
    packed = pack(tuple(range(16, 16 + len(ADDRESSES))), make_plan(c, "loss_grad"))
    fields = (*ADDRESSES, *NUMBERS)
    assert len(packed) == 8 * len(fields) == 8 * cuda_plan.FIELDS

    def get(name, kind="<q"):
        return struct.unpack_from(kind, packed, 8 * fields.index(name))[0]

    assert [get(name) for name in ADDRESSES] == list(range(16, 16 + len(ADDRESSES)))
    assert (get("rows"), get("classes"), get("target_kind")) == (7, 100, -4)
    assert (get("weight_wide"), get("vector"), get("blocks")) == (1, 1, 1)
    real = "<d" if scalar == 64 else "<f"
    assert get("divisor", "<d") == 7
    assert get("loss_factor", "<d") == 1 / 100
    assert get("margin", real) == 0.25
    assert get("exponent", real) == 2
    assert get("grad_factor", real) == pytest.approx(3 / 700)


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
    tiny = make_plan(call(rows=160, classes=100), "loss")
    assert (names(tiny), tiny.partials) == (["rows_loss"], 0)
    larger = make_plan(call(rows=170, classes=100), "loss_mask")
    assert names(larger) == ["rows_loss_mask", "finish"]
    assert larger.partials == larger.launches[0].grid == larger.numbers[NUMBERS.index("blocks")]
    each = make_plan(call(rows=170, classes=100, reduction="none"), "loss")
    assert (names(each), each.partials) == (["rows_loss"], 0)
    for operation, kernel in (("grad", "rows_loss_grad"), ("grad_mask", "rows_grad_mask")):
        alone = make_plan(call(rows=170, classes=100), operation)
        assert (names(alone), alone.partials) == ([kernel], 0)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_an_empty_batch_launches_the_sum_alone(reduction):
    empty = call(rows=0, reduction=reduction)
    assert names(make_plan(empty, "loss")) == ([] if reduction == "none" else ["finish"])
    assert names(make_plan(empty, "grad")) == []


def test_accesses_of_16_bytes_only_where_scores_lie_like_the_gradient():
    def vector(**changes):
        return make_plan(call(**changes), "loss_grad").numbers[NUMBERS.index("vector")]

    assert vector(classes=1001)
    assert not vector(classes=1001, aligned=False)
    assert not vector(classes=1001, row_stride=1002)
    assert vector(classes=1001, row_stride=1005)
    assert vector(classes=10)
    assert not vector(classes=10, row_stride=14)  # a tile is one stretch of memory


def test_power_kinds_and_operations():
    assert [cuda_plan.power_kind(p) for p in (1, 1.0, 2.0, 1.5, 3.0)] == [1, 1, 2, 0, 0]
    assert "grad_mask" in cuda_plan.operations(1)
    assert "grad_mask" not in cuda_plan.operations(2)


# --------------------------------------------------------------------------------------------------
# The driver, recorded.


class Recorder:
    """Stands for cuda.bindings.driver: modules and functions are numbers, launches are kept."""

    def __init__(self):
        self.loaded, self.launched, self.status = [], [], 0
        self.contexts = threading.local()

    def cuCtxGetCurrent(self):
        return 0, getattr(self.contexts, "current", 0)

    def cuDeviceGet(self, number):
        return 0, ("device", number)

    def cuDevicePrimaryCtxRetain(self, device):
        return 0, 100 + device[1]

    def cuCtxSetCurrent(self, context):
        self.contexts.current = context
        return (0,)

    def cuModuleLoadData(self, code):
        self.loaded.append(code)
        return self.status, len(self.loaded)

    def cuModuleGetFunction(self, module, name):
        return 0, (module, name.decode())

    def cuLaunchKernel(self, function, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra):
        assert self.contexts.current
        addresses = (ctypes.c_void_p * cuda_plan.FIELDS).from_address(parameters)
        packed = b"".join(ctypes.string_at(address, 8) for address in addresses)
        assert (gy, gz, by, bz, extra) == (1, 1, 1, 1, 0)
        self.launched.append((function, gx, bx, shared, stream, packed))
        return (self.status,)


@pytest.fixture
def driver(monkeypatch):
    cuda_driver = pytest.importorskip("mml_arrayapi.backends.cuda.driver")
    recorder = Recorder()
    monkeypatch.setattr(cuda_driver, "driver", recorder)
    monkeypatch.setattr(cuda_driver, "_functions", {})
    monkeypatch.setattr(cuda_driver, "_block", cuda_driver._Block())
    monkeypatch.setattr(cuda_driver, "compile_variant", lambda *variant: variant)
    recorder.launch = lambda planned, device=0, stream=77, addresses=tuple(range(11)): (
        cuda_driver.launch(planned, addresses, device, stream, lambda d: f"sm_9{d}")
    )
    return recorder


def test_a_launch_reaches_the_driver_with_its_arguments_and_stream(driver):
    planned = make_plan(call(rows=1000, classes=100), "loss")
    driver.launch(planned)
    driver.launch(planned, addresses=tuple(range(50, 61)))
    first, second, third, _ = driver.launched
    assert first[:5] == ((1, "rows_loss"), planned.launches[0].grid, 256, 256, 77)
    assert second[:5] == ((1, "finish"), 1, 256, 256, 77)
    assert first[5] == second[5] == pack(tuple(range(11)), planned)
    assert third[5] == pack(tuple(range(50, 61)), planned)


def test_a_module_is_loaded_once_per_device_and_variant(driver):
    planned = make_plan(call(rows=1000, classes=100), "loss")
    for device in (0, 1, 0, 1):
        driver.launch(planned, device=device)
    assert driver.loaded == [(32, 1, "rows", "sm_90"), (32, 1, "rows", "sm_91")]
    assert [launched[0][0] for launched in driver.launched] == [1, 1, 2, 2, 1, 1, 2, 2]
    other = make_plan(call(rows=1000, classes=100, p=2.0), "loss")
    driver.launch(other)
    driver.launch(other)
    assert driver.loaded[2:] == [(32, 2, "rows", "sm_90")]


def test_a_new_thread_gets_the_devices_context(driver):
    planned = make_plan(call(rows=10, classes=100), "loss")
    seen = []

    def work():
        driver.launch(planned, device=1)
        seen.append(driver.contexts.current)
        driver.contexts.current = 7  # what another device's guard would set is left alone
        driver.launch(planned, device=1)
        seen.append(driver.contexts.current)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [101, 7]
    driver.contexts.current = 5
    driver.launch(planned)
    assert driver.contexts.current == 5


def test_what_the_driver_reports_is_raised(driver):
    driver.status = 700
    with pytest.raises(RuntimeError, match="CUDA: 700"):
        driver.launch(make_plan(call(rows=1000, classes=100), "loss"))


def test_an_error_of_the_compiler_is_raised_with_its_log():
    cuda_driver = pytest.importorskip("mml_arrayapi.backends.cuda.driver")
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
    answer = cuda_plan.refusal(problem(**changes))
    assert answer is None if reason is None else answer.startswith(reason)
