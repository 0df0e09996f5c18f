#!/usr/bin/env bash
# Everything that only a GPU can show, in one command and under 8 minutes:
#
#     benchmarks/gpu_check.sh [FOLDER FOR RESULTS]
#
# for a machine with CUDA, PyTorch and CuPy, where `python3` is the one that has them. Nothing is
# installed into it and nothing fetched: the packages are laid out in a temporary folder, which
# PYTHONPATH names. What is missing there (array-api-compat, pytest) is taken from the wheels in
# the folder $MML_WHEELS, or for array-api-compat from the copy that scikit-learn or SciPy carry.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
results=$(realpath -m "${1:-${OUT:-$root/benchmarks/results}}")
mkdir -p "$results"
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT

cp -r "$root"/{mml_arrayapi,tests,benchmarks,pyproject.toml} "$stage"
cp -r "$root/backends" "$root/conformance" "$stage/mml_arrayapi"
mkdir "$stage/site"
export PYTHONPATH=$stage:$stage/site PYTHONUNBUFFERED=1
if [ -n "${MML_WHEELS:-}" ]; then
    python3 -m pip install -q --no-index --no-deps --no-compile --target "$stage/site" \
        "$MML_WHEELS"/*.whl || exit 2
fi
python3 - "$stage/site" <<'PYTHON' || exit 2
import importlib.util, pathlib, shutil, sys

if importlib.util.find_spec("array_api_compat") is None:
    for package, inner in (
        ("sklearn", "externals/array_api_compat"),
        ("scipy", "_external/array_api_compat"),
        ("scipy", "_lib/array_api_compat"),
    ):
        spec = importlib.util.find_spec(package)
        folder = pathlib.Path(spec.origin).parent / inner if spec else pathlib.Path("/nowhere")
        if folder.is_dir():
            shutil.copytree(folder, pathlib.Path(sys.argv[1]) / "array_api_compat")
            print(f"array_api_compat: the copy in {package}")
            break
    else:
        sys.exit("array_api_compat is not installed: put its wheel into a folder, MML_WHEELS=FOLDER")
PYTHON
cd "$stage" || exit 2

failed=()
log=$results/gpu_check.log
: > "$log"
step() { # NAME SECONDS COMMAND...: run within a time, keep the log, note a failure
    local name=$1 limit=$2 status
    shift 2
    printf '\n== %s (at %ss)\n' "$name" "$SECONDS" | tee -a "$log"
    timeout "$limit" "$@" 2>&1 | tee -a "$log" | tail -n 40
    status=${PIPESTATUS[0]}
    [ "$status" -eq 0 ] || failed+=("$name: exit status $status")
}

python3 -c "import torch; assert torch.cuda.is_available(), 'PyTorch sees no CUDA device'" || exit 2
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv || exit 2
test="python3 -m pytest -q -p no:cacheprovider -o filterwarnings=default"
step device-tests 150 $test tests/backends/cuda/test_cuda_device.py tests/backends/cuda/test_launch.py
GIT_DIR=$root/.git step benchmark 180 python3 benchmarks/gpu.py --out "$results"
for library in cupy torch; do
    device=()
    [ $library = torch ] && device=(--device cuda:0)
    step conformance-$library 40 python3 -m mml_arrayapi.conformance --xp $library "${device[@]}"
done
step tests-cupy 40 $test tests -k "cupy and not host" --ignore tests/backends/cuda
if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
        # Without PyTorch's caching allocator, so that what lies behind an array is nobody's.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 step sanitizer-$tool 40 \
            compute-sanitizer --tool $tool --error-exitcode 9 python3 benchmarks/gpu_small.py
    done
else
    echo "compute-sanitizer is not there"
fi

printf '\n== done in %ss, results in %s\n' "$SECONDS" "$results"
if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED %s\n' "${failed[@]}" | tee -a "$log"
    exit 1
fi
