"""The CUDA source compiled for real devices: what the design says of the machine code holds there.

No device is needed. NVRTC compiles, ``cuobjdump`` shows the machine code, and each claim of
docs/gpu.md about it is looked up there.
"""

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import which

import pytest

from mml_arrayapi.backends.cuda.plan import ITEMSIZE, TILE_BLOCK, Variant

cuda_driver = pytest.importorskip(
    "mml_arrayapi.backends.cuda.driver", reason="compiling for a GPU needs cuda-bindings"
)
VARIANTS = [
    (Variant(32, 1, "tiles", 10), "sm_90"), (Variant(17, 1, "tiles", 10), "sm_90"),
    (Variant(32, 2, "tiles", 31), "sm_120"), (Variant(64, 1, "tiles", 31), "sm_80"),
    (Variant(32, 1, "rows", 0), "sm_90"), (Variant(17, 1, "rows", 0), "sm_90"),
    (Variant(64, 0, "rows", 0), "sm_90"), (Variant(32, 2, "wide", 0), "sm_80"),
    (Variant(17, 1, "wide", 0), "sm_100"), (Variant(17, 1, "split", 0), "sm_90"),
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

    def one(variant, architecture):
        path = folder / f"{'_'.join(map(str, variant))}_{architecture}.cubin"
        path.write_bytes(cuda_driver.compile_variant(variant, architecture))
        usage, code = (
            subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
        found = {}
        pattern = r"Function (\w+):\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
        for name, registers, stack, local in re.findall(pattern, usage):
            body = code.split(f"Function : {name}\n")[1].split("Function :")[0]
            found[name] = int(registers), int(stack), int(local), instructions(body)
        return found

    try:
        cuda_driver.nvrtc.nvrtcVersion()
    except RuntimeError as error:
        pytest.skip(f"compiling for a GPU needs NVRTC: {error}")
    pool = ThreadPoolExecutor(2)
    return {key: pool.submit(one, *key) for key in VARIANTS}


def instructions(body):
    """Split machine code into instructions: name and operands."""
    pattern = r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(\S+)\s*([^;]*);"
    return re.findall(pattern, body, re.MULTILINE)


def count(code, name):
    return sum(found.startswith(name) for found, _ in code)


@pytest.mark.parametrize("key", VARIANTS, ids=lambda k: "-".join(map(str, (*k[0], k[1]))))
def test_machine_code(compiled, key):
    variant, _ = key
    kernels = compiled[key].result()
    assert set(kernels) == set(variant.names())
    for name, (registers, stack, local, code) in kernels.items():
        assert (stack, local) == (0, 0), f"{name} uses {stack} bytes of stack, {local} of local"
        assert not count(code, ("LDL", "STL")), f"{name} spills"
        # Generic addresses would mean that the compiler lost sight of what a pointer points to.
        assert not count(code, ("LD.", "ST.")), f"{name} accesses memory of an unknown kind"
        if name == "finish":
            assert in_a_row(code, "LDG.E.64") >= 4, "finish adds one partial sum at a time"
        elif name != "count" and not name.endswith("_end"):
            check = check_tiles if variant.kernels == "tiles" else check_rows
            check(variant, name, registers, code)


def check_rows(variant, name, registers, code):
    loads = 4 if variant.scalar in (16, 17) else 8
    assert registers <= 128, name
    if name.endswith("grad_mask"):
        # The mask's bytes are asked for before anything is made of the target or the count.
        assert in_a_row(code, "LDG.E.U8") >= loads * 16 // ITEMSIZE[variant.scalar] // 8, name
        assert count(code, "LDG.E.128") == 0, name
    else:
        # All of a lane's scores are under way before it waits for one of them, for the target that
        # is loaded a turn ahead, for the score at the target or for the weight.
        assert in_a_row(code, "LDG.E.128") >= loads, f"{name} waits between its loads"
    assert count(code, "STG.E.128") >= loads if "grad" in name else True, name


def check_tiles(variant, name, registers, code):
    blocks = 8
    if variant.power == 0:
        blocks = 4
    elif variant.classes > 24:
        blocks = 5 if variant.scalar == 64 else 7
    assert registers * TILE_BLOCK * blocks <= 65536, name
    size = ITEMSIZE[variant.scalar]
    access = "E.64" if size == 2 else "E.128"
    pieces = -(-variant.classes * max(size, 4) // 16)
    if not name.endswith("grad_mask"):
        # The same for a tile's scores, beside its targets.
        loads = in_a_row(code, f"LDG.{access}.CONSTANT")
        assert loads >= min(pieces, 4), f"{name} waits between its loads"
        assert variant.classes % 2 or count(code, ("LDS.128", "LDS.64")), name
    if "grad" in name:
        assert count(code, f"STG.{access}") >= pieces, name


def in_a_row(code, load):
    """Count the loads of a kind that are issued before the result of any load is waited for."""
    best = number = 0
    pending = set()
    for name, operands in code:
        registers = {int(r) for r in re.findall(r"\bR(\d+)", operands)}
        if name.startswith("LDG"):
            first = int(re.match(r"R(\d+)", operands).group(1))
            width = 4 if ".128" in name else 2 if ".64" in name else 1
            if pending & (registers - {first}):
                number, pending = 0, set()
            pending |= set(range(first, first + width))
            number += name.startswith(load)
            best = max(best, number)
        elif pending & registers:
            number, pending = 0, set()
    return best


@pytest.mark.parametrize(
    ("third", "expected"),
    [
        ("FADD R0, R9, R1", 2),  # a score is used
        ("IADD3 R0, R12, R1", 2),  # the target is used
        ("FADD R0, R2, R1", 3),  # only the addresses are
    ],
    ids=["a score", "the target", "nothing"],
)
def test_the_check_of_loads_sees_a_wait_between_them(third, expected):
    line = "        /*0010*/ {} ;"
    body = "\n".join(
        line.format(text)
        for text in (
            "LDG.E.64 R12, desc[UR4][R2.64]",
            "LDG.E.128.CONSTANT R4, desc[UR4][R2.64]",
            "@!P0 LDG.E.128.CONSTANT R8, desc[UR4][R2.64+0x10]",
            third,
            "LDG.E.128.CONSTANT R4, desc[UR4][R2.64+0x20]",
        )
    )
    assert in_a_row(instructions(body), "LDG.E.128") == expected
