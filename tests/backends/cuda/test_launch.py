"""The host's side of the GPU kernels: geometry, packed arguments, module cache, devices, streams."""

import ctypes
import math
import re
import struct
import subprocess
import sys
import threading
import types
import zipfile
from pathlib import Path

import pytest

from mml_arrayapi import list_backends
from mml_arrayapi.backends.cuda import plan as cuda_plan
from mml_arrayapi.backends.cuda.loaded import Loaded
from mml_arrayapi.backends.cuda.plan import ADDRESSES, NUMBERS, Call, geometry, make_plan, pack
from mml_arrayapi.kernel import Unusable


def call(scalar=32, rows=100, classes=10, **changes):
    values = {
        "row_stride": classes, "target_stride": 1, "target_kind": 8, "weight_wide": False,
        "upstream_stride": 0, "upstream_wide": False, "aligned": True, "p": 1.0, "margin": 1.0,
        "reduction": "mean", "ignore_index": None, "multiprocessors": 10,
    }  # fmt: skip
    return Call(scalar=scalar, rows=rows, classes=classes, **{**values, **changes})


def names(planned):
    return [step.name for step in planned.launches]


def number(planned, name):
    """Read one field from what a plan packs."""
    scalar = planned.variant.scalar
    values = dict(
        zip(NUMBERS, cuda_plan.PACKED_NUMBERS[scalar].unpack(planned.packed), strict=True)
    )
    return values[name]


def test_fields_are_those_of_the_source():
    listed = re.findall(r"^    FIELD\(([^,]+), (\w+)\)", cuda_plan.source(), re.MULTILINE)
    assert [name for _, name in listed] == [*ADDRESSES, *NUMBERS]
    kinds = {"i64": "integer", "double": "double", "Real": "real"}
    found = [kinds.get(kind, "address") for kind, _ in listed]
    numbers = (
        cuda_plan.INTEGER_FIELDS, cuda_plan.DOUBLE_FIELDS, cuda_plan.REAL_FIELDS,
    )  # fmt: skip
    expected = ["address"] * len(ADDRESSES)
    for kind, names in zip(kinds.values(), numbers, strict=True):
        expected += [kind] * len(names)
    assert found == expected


def test_constants_are_those_of_the_source():
    constants = dict(re.findall(r"(\w+) = ([\w()*]+(?: / [\w()]+)?)[,\s]", cuda_plan.source()))
    assert int(constants["BLOCK"]) == cuda_plan.BLOCK
    assert int(constants["TILE_BLOCK"]) == cuda_plan.TILE_BLOCK
    assert int(constants["SUM_BLOCK"]) == cuda_plan.SUM_BLOCK
    assert int(constants["SCRATCH"]) * 8 == cuda_plan.SCRATCH
    assert constants["UNIT"] == "8"
    assert f"UP = {1 / cuda_plan.DOWN}" in cuda_plan.source()
    assert cuda_plan.COUNTING_BLOCKS <= cuda_plan.TILE_BLOCK  # a thread reads one block's count


def test_the_source_is_read_from_a_zip_file_too(tmp_path):
    folder = Path(cuda_plan.__file__).parent
    with zipfile.ZipFile(tmp_path / "zipped.zip", "w") as archive:
        archive.writestr("zipped/__init__.py", "")
        for name in ("plan.py", "margin_loss.cu"):
            archive.write(folder / name, f"zipped/{name}")
    program = "import sys; sys.path.insert(0, sys.argv[1])\nfrom zipped import plan\n"
    program += "print(len(plan.source()), plan.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "zipped.zip")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith(f"{len(cuda_plan.source())} {tmp_path}")


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
    assert (get("weight_wide"), get("vector"), get("blocks"), get("summed")) == (1, 1, 1, 1)
    real = "<d" if scalar == 64 else "<f"
    assert get("divisor", "<d") == 7 / 8 / 2**32
    assert get("loss_factor", "<d") == 1 / 8 / 100
    assert get("grad_factor", "<d") == pytest.approx(3 / 700)
    assert get("margin", real) == 0.25
    assert get("exponent", real) == 2


@pytest.mark.parametrize(
    ("scalar", "classes", "kernels", "lanes", "mask_row"),
    [
        (32, 1, "tiles", 1, 4),
        (32, 31, "tiles", 1, 4),
        (32, 32, "rows", 4, 12),
        (32, 100, "rows", 4, 24),
        (32, 1000, "rows", 32, 136),
        (32, 1001, "rows", 32, 136),
        (32, 4095, "rows", 32, 520),
        (32, 4096, "wide", 256, 520),
        (17, 8191, "rows", 32, 1032),
        (17, 128256, "wide", 256, 16136),
        (64, 2048, "wide", 256, 264),
    ],
)
def test_geometry(scalar, classes, kernels, lanes, mask_row):
    shape = geometry(scalar, 1000, classes, 10)
    assert (shape.kernels, shape.lanes) == (kernels, lanes)
    assert cuda_plan.mask_bytes(scalar, classes) == mask_row
    assert mask_row * 8 >= classes


def test_mask_costs_little_for_long_rows():
    assert cuda_plan.mask_bytes(32, 1000) <= 0.035 * 4000
    assert cuda_plan.mask_bytes(17, 128256) <= 0.064 * 256512


def test_grid_covers_the_rows_or_strides_over_them():
    assert geometry(32, 100, 1000, 10).grid == 13
    assert geometry(32, 10**7, 10, 132).grid == 132 * 16
    assert geometry(32, 65536, 1000, 132).grid == 132 * 6
    assert geometry(32, 0, 10, 132).grid == 0


@pytest.mark.parametrize(
    ("scalar", "rows", "classes", "blocks_per_row"),
    [(32, 8, 10**6, 41), (32, 1, 10**7, 306), (17, 64, 128256, 6), (32, 131, 10**6, 3),
     (64, 3, 9000, 3)],
)  # fmt: skip
def test_few_long_rows_are_split_over_the_device(scalar, rows, classes, blocks_per_row):
    shape = geometry(scalar, rows, classes, 132)
    assert (shape.kernels, shape.splits) == ("split", blocks_per_row)
    assert shape.grid == rows * shape.splits <= 132 * 3
    vectors = classes * cuda_plan.ITEMSIZE[scalar] // 16
    assert shape.splits * shape.span >= vectors > (shape.splits - 1) * shape.span
    turn = 256 * (4 if scalar == 17 else 8)  # so a mask's byte belongs to one block
    assert shape.span % turn == 0


@pytest.mark.parametrize(("rows", "classes"), [(132, 10**6), (8, 4096), (8, 1000), (0, 10**6)])
def test_other_rows_are_not_split(rows, classes):
    assert geometry(32, rows, classes, 132).splits == 1


def test_shared_memory_stays_within_what_every_device_gives():
    for scalar in (64, 32, 16, 17):
        for classes in range(1, 32):
            assert geometry(scalar, 10, classes, 1).shared <= 48 * 1024


def test_tiny_problems_take_one_launch_and_others_a_second_for_the_sum():
    tiny = make_plan(call(rows=20, classes=100), "loss")
    assert (names(tiny), tiny.scratch) == (["rows_loss"], 0)
    larger = make_plan(call(rows=170, classes=100), "loss_mask")
    assert names(larger) == ["rows_loss_mask", "finish"]
    assert larger.scratch == larger.launches[0].grid == number(larger, "blocks")
    each = make_plan(call(rows=170, classes=100, reduction="none"), "loss")
    assert (names(each), each.scratch) == (["rows_loss"], 0)
    for operation, kernel in (("grad", "rows_loss_grad"), ("grad_mask", "rows_grad_mask")):
        alone = make_plan(call(rows=170, classes=100), operation)
        assert (names(alone), alone.scratch) == ([kernel], 0)


def test_what_split_rows_launch():
    def launched(operation, **changes):
        return make_plan(call(rows=2, classes=10**5, **changes), operation)

    loss = launched("loss")
    assert names(loss) == ["split_loss", "split_loss_end"]
    assert loss.scratch == 2 * loss.launches[0].grid == 4 * number(loss, "splits")
    assert loss.launches[1].grid == 1
    each = launched("loss_mask", reduction="none")
    assert names(each) == ["split_loss_mask", "split_loss_mask_end"]
    assert names(launched("grad", p=2.0)) == ["split_loss_grad", "split_loss_grad_end"]
    assert names(launched("grad_mask")) == ["split_grad_mask"]
    assert launched("grad_mask").scratch == 0


def test_the_kept_rows_of_a_mean_are_counted_first():
    def launched(operation, **changes):
        return make_plan(call(rows=10**6, classes=100, **changes), operation)

    mean = launched("loss", ignore_index=-100)
    assert names(mean) == ["count", "rows_loss", "finish"]
    assert mean.launches[0].grid == number(mean, "counted") == 128
    assert mean.scratch == 128 + mean.launches[1].grid
    assert number(mean, "divisor") == 2.0**-52
    assert number(mean, "loss_factor") == 2.0**-20 / 100
    assert number(mean, "grad_factor") == 1 / 100
    assert names(launched("grad_mask", ignore_index=-100)) == ["count", "rows_grad_mask"]
    for reduction in ("none", "sum"):
        assert "count" not in names(launched("loss", ignore_index=-100, reduction=reduction))


@pytest.mark.parametrize(
    ("kind", "index", "held"),
    [(8, -100, -100), (8, 2**63 - 1, 2**63 - 1), (8, 2**63, None), (8, 2**100, None),
     (-8, 2**64 - 1, -1), (-8, -1, None), (4, -(2**31), -(2**31)), (4, 2**31, None),
     (-1, 255, 255), (-1, 256, None), (-1, -1, None), (1, -128, -128), (1, 128, None)],
)  # fmt: skip
def test_an_ignore_index_that_no_target_can_hold_matches_nothing(kind, index, held):
    planned = make_plan(call(target_kind=kind, ignore_index=index), "loss")
    assert number(planned, "ignoring") == (held is not None)
    assert number(planned, "ignore_index") == (held or 0)


@pytest.mark.parametrize("scalar", [32, 16, 17])
def test_numbers_beyond_float32_are_infinite(scalar):
    planned = make_plan(call(scalar, margin=-1e39, p=1e300), "loss_grad")
    assert number(planned, "margin") == -math.inf
    assert number(planned, "exponent") == math.inf
    assert number(planned, "grad_factor") == cuda_plan.FLOAT32_MAX
    wide = make_plan(call(64, margin=1e300, p=1e300), "loss_grad")
    assert (number(wide, "margin"), number(wide, "exponent")) == (1e300, 1e300)


@pytest.mark.parametrize(
    ("device", "target"),
    [(75, "sm_75"), (90, "sm_90"), (121, "sm_121"), (130, "compute_121"), (89, "compute_80")],
)
def test_what_is_compiled_for_a_device(device, target):
    assert cuda_plan.target_for(device, (75, 80, 90, 100, 121)) == target


def test_a_device_older_than_the_compiler_knows_is_an_error():
    with pytest.raises(
        RuntimeError, match="NVRTC compiles for sm_75 and newer, the device is sm_70"
    ):
        cuda_plan.target_for(70, (75, 80))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_an_empty_batch_launches_the_sum_alone(reduction):
    empty = call(rows=0, reduction=reduction)
    assert names(make_plan(empty, "loss")) == ([] if reduction == "none" else ["finish"])
    assert names(make_plan(empty, "grad")) == []


def test_accesses_of_16_bytes_only_where_scores_lie_like_the_gradient():
    def vector(**changes):
        return number(make_plan(call(**changes), "loss_grad"), "vector")

    assert vector(classes=1001)
    assert not vector(classes=1001, aligned=False)
    assert not vector(classes=1001, row_stride=1002)
    assert vector(classes=1001, row_stride=1005)
    assert vector(classes=10)
    assert not vector(classes=10, row_stride=14)  # a tile is one stretch of memory


def test_variants():
    def variant(**changes):
        return make_plan(call(**changes), "loss").variant

    assert [variant(p=p).power for p in (1, 1.0, 2.0, 1.5, 3.0)] == [1, 1, 2, 0, 0]
    assert "rows_grad_mask" in variant(classes=100).names()
    assert "rows_grad_mask" not in variant(classes=100, p=2.0).names()
    assert variant(classes=100).defines() == ("-DSCALAR=32", "-DPOWER=1", "-DLAYOUT=2")
    assert variant(classes=10).defines()[2:] == ("-DLAYOUT=1", "-DCLASSES=10")
    split = variant(rows=1, classes=10**6)
    assert {"split_loss", "split_loss_end", "split_grad_mask", "count"} <= set(split.names())
    assert "split_grad_mask_end" not in split.names()
    assert cuda_plan.variant_for(32, 1.0, 100, 10, 10) == variant(classes=10)


# --------------------------------------------------------------------------------------------------
# The driver, recorded.


class Recorder:
    """Stands for cuda.bindings.driver: libraries and functions are tuples, launches are kept."""

    CUdevice_attribute = types.SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT="processors",
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major",
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="minor",
    )
    capabilities = ((9, 0), (9, 0), (8, 0), (7, 0), (15, 0))  # by device

    def __init__(self):
        self.compiled, self.loaded, self.launched, self.failing = [], [], [], {}
        self.contexts = threading.local()

    def answer(self, name, *values):
        return (self.failing.get(name, 0), *values)

    def compile(self, *how):
        self.compiled.append(how)
        return how

    def stack(self):
        self.contexts.__dict__.setdefault("stack", [])
        return self.contexts.stack

    def cuInit(self, flags):
        return self.answer("cuInit")

    def cuDeviceGet(self, number):
        return 0, number

    def cuDeviceGetAttribute(self, attribute, device):
        major, minor = self.capabilities[device]
        values = {"processors": 10, "major": major, "minor": minor}
        return self.answer("cuDeviceGetAttribute", values[attribute])

    def cuDevicePrimaryCtxRetain(self, device):
        return self.answer("cuDevicePrimaryCtxRetain", 100 + device)

    def cuCtxGetCurrent(self):
        return self.answer("cuCtxGetCurrent", self.stack()[-1] if self.stack() else 0)

    def cuCtxPushCurrent(self, context):
        if "cuCtxPushCurrent" not in self.failing:
            self.stack().append(context)
        return self.answer("cuCtxPushCurrent")

    def cuCtxPopCurrent(self):
        return 0, self.stack().pop()

    def cuLibraryLoadData(self, code, *options):
        self.loaded.append(code)
        return self.answer("cuLibraryLoadData", len(self.loaded))

    def cuLibraryGetKernel(self, library, name):
        return 0, (library, name.decode())

    def cuKernelGetFunction(self, kernel):
        return self.answer("cuKernelGetFunction", (self.stack()[-1], *kernel))

    def cuLaunchKernel(self, function, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra):
        assert self.stack()[-1] == function[0], "a function of another context"
        (address,) = (ctypes.c_void_p * 1).from_address(parameters)
        packed = ctypes.string_at(address, 8 * cuda_plan.FIELDS)
        assert (gy, gz, by, bz, extra) == (1, 1, 1, 1, 0)
        self.launched.append((function, gx, bx, shared, stream, packed))
        return self.answer("cuLaunchKernel")


NO_ADDRESSES = tuple(range(len(ADDRESSES)))


@pytest.fixture
def driver(monkeypatch):
    cuda_driver = pytest.importorskip("mml_arrayapi.backends.cuda.driver")
    recorder = Recorder()
    nvrtc = types.SimpleNamespace(nvrtcGetSupportedArchs=lambda: (0, [75, 80, 90, 121]))
    nvrtc.nvrtcVersion = lambda: (0, 13, 0)
    monkeypatch.setattr(cuda_driver, "driver", recorder)
    monkeypatch.setattr(cuda_driver, "nvrtc", nvrtc)
    monkeypatch.setattr(cuda_driver, "loaded", Loaded(cuda_driver._load))
    monkeypatch.setattr(cuda_driver, "compile_variant", recorder.compile)
    names = ("multiprocessors", "capability", "_context", "_code", "_library")
    cached = [getattr(cuda_driver, name) for name in names]
    for function in cached:
        function.cache_clear()
    recorder.trouble = lambda device, rows=1000, classes=100, p=1.0: cuda_driver.trouble(
        device, 32, p, rows, classes
    )
    recorder.missing = cuda_driver.missing
    recorder.multiprocessors = cuda_driver.multiprocessors
    recorder.nvrtc = nvrtc
    recorder.launch = lambda planned, device=0, stream=77, addresses=NO_ADDRESSES: (
        cuda_driver.launch(planned, addresses, device, stream)
    )
    yield recorder
    for function in cached:
        function.cache_clear()


def test_a_launch_reaches_the_driver_with_its_arguments_and_stream(driver):
    planned = make_plan(call(rows=1000, classes=100), "loss")
    driver.launch(planned)
    others = tuple(range(50, 59))
    driver.launch(planned, addresses=others)
    first, second, third, _ = driver.launched
    assert first[:5] == ((100, 1, "rows_loss"), planned.launches[0].grid, 256, 256, 77)
    assert second[:5] == ((100, 1, "finish"), 1, 1024, 256, 77)
    assert first[5] == second[5] == pack(NO_ADDRESSES, planned)
    assert third[5] == pack(others, planned)


def test_a_variant_is_loaded_once_for_all_devices_of_a_capability(driver):
    planned = make_plan(call(rows=1000, classes=100), "loss")
    for device in (0, 1, 0, 1, 2):
        driver.launch(planned, device=device)
    rows = planned.variant
    assert driver.loaded == [(rows, "sm_90"), (rows, "sm_80")]
    used = [launched[0][:2] for launched in driver.launched[::2]]
    assert used == [(100, 1), (101, 1), (100, 1), (101, 1), (102, 2)]
    other = make_plan(call(rows=1000, classes=100, p=2.0), "loss")
    driver.launch(other)
    driver.launch(other)
    assert driver.loaded[2:] == [(other.variant, "sm_90")]


def test_a_launch_takes_place_in_its_devices_context(driver):
    planned = make_plan(call(rows=10, classes=100), "loss")
    left = []

    def work():
        driver.launch(planned, device=1)  # the thread has no context
        left.append(list(driver.stack()))
        driver.stack().append(100)  # another device's
        driver.launch(planned, device=1)
        left.append(list(driver.stack()))
        driver.failing["cuLaunchKernel"] = 1
        with pytest.raises(Unusable):
            driver.launch(planned, device=1)
        left.append(list(driver.stack()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert left == [[], [100], [100]]
    assert {launched[0][0] for launched in driver.launched} == {101}


@pytest.mark.parametrize("status", [200, 209, 218, 701, 719])
def test_a_launch_that_the_driver_does_not_take_is_kept_as_the_reason(driver, status):
    planned = make_plan(call(rows=1000, classes=100), "loss")
    assert driver.trouble(0) is None
    driver.failing["cuLaunchKernel"] = status
    with pytest.raises(Unusable, match=f"CudaError: {status} from rows_loss"):
        driver.launch(planned)
    driver.failing.clear()
    assert driver.trouble(0) == f"not usable on cuda:0: CudaError: {status} from rows_loss"
    with pytest.raises(Unusable, match=f"CudaError: {status} from rows_loss"):
        driver.launch(planned)
    assert len(driver.launched) == 1
    assert driver.trouble(1) is None


# No memory, a capture that forbids it, a capture that is spoilt.
@pytest.mark.parametrize("status", [2, 900, 901])
@pytest.mark.parametrize("step", ["cuLibraryLoadData", "cuKernelGetFunction", "cuLaunchKernel"])
def test_what_may_soon_be_over_is_tried_again(driver, step, status):
    planned = make_plan(call(rows=1000, classes=100), "loss")
    driver.failing[step] = status
    with pytest.raises(Unusable, match=f"CudaError: {status}"):
        driver.launch(planned)
    driver.failing.clear()
    assert driver.trouble(0) is None
    driver.launch(planned)
    assert len(driver.compiled) == 1
    assert driver.stack() == []


@pytest.mark.parametrize(
    "step", ["cuCtxGetCurrent", "cuCtxPushCurrent", "cuDevicePrimaryCtxRetain"]
)
def test_a_context_that_fails_makes_the_kernel_unusable(driver, step):
    driver.failing[step] = 201
    with pytest.raises(Unusable, match="CudaError: 201"):
        driver.launch(make_plan(call(rows=1000, classes=100), "loss"))
    assert driver.launched == []


def test_a_device_that_does_not_say_what_it_is(driver):
    driver.failing["cuDeviceGetAttribute"] = 101
    assert driver.trouble(0) == "not usable on cuda:0: CudaError: 101"
    with pytest.raises(Unusable, match="CudaError: 101"):
        driver.multiprocessors(0)


@pytest.mark.parametrize("step", ["cuLibraryLoadData", "cuKernelGetFunction"])
def test_what_cannot_be_loaded_gives_a_reason_and_is_not_tried_again(driver, step):
    driver.failing[step] = 209
    reason = "not usable on cuda:0: CudaError: 209"
    assert driver.trouble(0) == reason
    driver.failing.clear()
    assert driver.trouble(0) == reason
    assert len(driver.loaded) == 1
    assert driver.stack() == []
    with pytest.raises(Unusable, match="CudaError: 209"):
        driver.launch(make_plan(call(rows=1000, classes=100), "loss"))
    assert driver.trouble(2) is None
    assert driver.trouble(0, p=2.0) is None


def test_a_device_that_the_compiler_does_not_know(driver):
    old = driver.trouble(3)
    assert old.endswith("NVRTC compiles for sm_75 and newer, the device is sm_70")
    assert driver.trouble(4) is None
    assert driver.loaded[0][1] == "compute_121"


def test_no_driver_and_no_compiler_are_reasons(driver, monkeypatch):
    assert driver.missing() is None
    driver.failing["cuInit"] = 100
    assert driver.missing() == "no CUDA driver: CudaError: 100"
    assert driver.trouble(0) == "not usable on cuda:0: CudaError: 100"
    driver.failing.clear()
    driver.nvrtc.nvrtcVersion = lambda: raise_(RuntimeError("libnvrtc.so.13 is not found"))
    assert re.match(
        r"no NVRTC for cuda-bindings (1\d).* \(pip install 'mml_arrayapi\[cuda\1\]'\): "
        "RuntimeError: libnvrtc.so.13 is not found",
        driver.missing(),
    )


def raise_(error):
    raise error


def test_the_list_of_backends_says_what_is_missing():
    pytest.importorskip("torch", reason="the kernels for PyTorch are listed as not installed")
    cuda_driver = pytest.importorskip("mml_arrayapi.backends.cuda.driver")
    (listed,) = (found for found in list_backends() if found.name == "torch-cuda")
    missing = cuda_driver.missing()
    assert listed.available == (missing is None)
    assert missing is None or missing in listed.reason


def test_the_driver_that_is_not_there_is_a_reason():
    cuda_driver = pytest.importorskip("mml_arrayapi.backends.cuda.driver")
    reason = cuda_driver.missing()
    if reason is None:
        pytest.skip("this machine has a CUDA driver")
    assert re.match(r"no \w.*: \w*Error: .*", reason)
    assert cuda_driver.trouble(0, 32, 1.0, 10, 10).startswith("not usable on cuda:0: ")


def test_an_error_of_the_compiler_is_raised_with_its_log():
    cuda_driver = pytest.importorskip("mml_arrayapi.backends.cuda.driver")
    with pytest.raises(RuntimeError) as caught:
        cuda_driver.compile_variant(cuda_plan.Variant(32, 1, "rows", 0), "sm_90", ("-Dunpack=(",))
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
