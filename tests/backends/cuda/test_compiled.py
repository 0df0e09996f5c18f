"""The CUDA source compiled for real devices: wide accesses, no stack, no spills."""

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import which

import pytest

cuda_driver = pytest.importorskip(
    "mml_arrayapi.backends.cuda.driver", reason="compiling for a GPU needs cuda-bindings"
)
LAYOUTS = ("tiles", "rows", "wide")
VARIANTS = [
    (32, 1, "sm_90"), (17, 1, "sm_90"), (32, 1, "sm_80"), (17, 1, "sm_100"),
]  # fmt: skip


def disassembler():
    """Find cuobjdump, which needs nvdisasm beside it: on the path, or in NVIDIA's wheels."""
    if (found := which("cuobjdump")) and which("nvdisasm"):
        return found
    missing = "reading machine code needs cuobjdump and nvdisasm"
    nvidia = pytest.importorskip("nvidia", reason=missing)
    for folder in nvidia.__path__:
        for found in Path(folder).glob("*/bin/cuobjdump"):
            if found.with_name("nvdisasm").exists():
                return str(found)
    return pytest.skip(missing)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """Per kernel of each variant: registers, stack, local memory, and its instructions."""
    tool = disassembler()
    folder = tmp_path_factory.mktemp("cubin")

    def one(variant, kernels):
        scalar, power, architecture = variant
        path = folder / f"{scalar}_{power}_{architecture}_{kernels}.cubin"
        path.write_bytes(cuda_driver.compile_variant(scalar, power, kernels, architecture))
        usage, code = (
            subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
        found = {}
        pattern = r"Function (\w+):\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
        for name, registers, stack, local in re.findall(pattern, usage):
            body = code.split(f"Function : {name}\n")[1].split("Function :")[0]
            found[name] = int(registers), int(stack), int(local), body
        return found

    try:
        cuda_driver.compile_variant(32, 1, "tiles", "sm_90")
    except RuntimeError as error:
        if "error" in str(error):
            raise
        pytest.skip(f"compiling for a GPU needs NVRTC: {error}")
    pool = ThreadPoolExecutor(2)
    return {
        variant: [pool.submit(one, variant, kernels) for kernels in LAYOUTS] for variant in VARIANTS
    }


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v[2]}-{v[0]}-{v[1]}")
def test_machine_code(compiled, variant):
    scalar, power, _ = variant
    loads = 4 if scalar in (16, 17) else 8
    kernels = {}
    for future in compiled[variant]:
        kernels |= future.result()
    assert len(kernels) == (13 if power == 1 else 7)
    for name, (registers, stack, local, body) in kernels.items():
        assert (stack, local) == (0, 0), f"{name} uses {stack} bytes of stack, {local} of local"
        assert not re.search(r"\b(LDL|STL)\b", body), f"{name} spills"
        assert registers <= 128, name
        if name == "finish":
            continue
        wide_loads = len(re.findall(r"\bLDG\.E\.128", body))
        wide_stores = len(re.findall(r"\bSTG\.E\.128", body))
        assert wide_loads == 0 if name.endswith("grad_mask") else wide_loads >= 1, name
        assert wide_stores >= 1 if "grad" in name else wide_stores == 0, name
        if name.startswith("tiles"):
            continue
        if not name.endswith("grad_mask"):
            assert _in_a_row(body) >= loads, f"{name} waits between its loads"
        if "grad" in name:
            assert wide_stores >= loads, name


def _in_a_row(body):
    """Count the 16-byte loads of scores that are issued before a first result is waited for."""
    best = count = 0
    destinations = set()
    for line in body.splitlines():
        instruction = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?(\S+)\s+([^;]*);", line)
        if instruction is None:
            continue
        name, operands = instruction.groups()
        if name.startswith("LDG.E.128"):
            count += 1
            first = int(re.match(r"R(\d+)", operands).group(1))
            destinations |= set(range(first, first + 4))
            best = max(best, count)
        elif destinations & set(map(int, re.findall(r"\bR(\d+)", operands))):
            count, destinations = 0, set()
    return best


def test_the_check_of_loads_sees_a_wait_between_them():
    line = "        /*0010*/ {} ;"
    body = "\n".join(
        line.format(text)
        for text in (
            "LDG.E.128.CONSTANT R4, desc[UR4][R2.64]",
            "@!P0 LDG.E.128.CONSTANT R8, desc[UR4][R2.64+0x10]",
            "FADD R0, R9, R1",
            "LDG.E.128.CONSTANT R4, desc[UR4][R2.64+0x20]",
        )
    )
    assert _in_a_row(body) == 2
