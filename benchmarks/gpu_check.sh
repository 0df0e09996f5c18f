#!/usr/bin/env bash
# Everything that only a GPU can show, in one command and under 8 minutes:
#
#     benchmarks/gpu_check.sh [--without-git NAME] [--dry-run] [FOLDER FOR RESULTS]
#     benchmarks/gpu_check.sh --profile [FOLDER]     compute-sanitizer, and ncu on two kernels
#
# for a machine with CUDA, PyTorch, CuPy, cuda-bindings, NVRTC and pytest, where `python3` is the
# one that has them. Nothing is installed into it and nothing is fetched. What is missing there
# (array-api-compat) is taken from the wheels in the folder $MML_WHEELS, or from the copy that
# scikit-learn or SciPy carry. The benchmark comes first and writes after each line, each step has a
# time limit, and the log is written as it goes: whatever ends the command, what was found stays.
#
# --without-git NAME   the commit's name, where there is no repository to ask
# --dry-run            on the CPU: tries the command itself
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
dry= profile= results= git=()
while [ $# -gt 0 ]; do
    case $1 in
        --dry-run) dry=1 ;;
        --profile) profile=1 ;;
        --without-git) git=(--without-git "${2:?--without-git needs the name of the commit}"); shift ;;
        -*) echo "unknown option $1" >&2; exit 2 ;;
        *) results=$1 ;;
    esac
    shift
done
results=$(realpath -m "${results:-$root/benchmarks/results}")
mkdir -p "$results"
log=$results/gpu_check${profile:+_profile}.log
: > "$log"
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
export PYTHONPATH=$root:$site PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false # JAX would take three quarters of the GPU's memory
unset MML_ARRAYAPI_BACKEND

failed=() running=()
begin() { # NAME SECONDS COMMAND...: start within a time limit, with a log of its own
    local name=$1 limit=$2
    shift 2
    running+=("$name")
    ( timeout "$limit" "$@" > "$log-$name" 2>&1; echo $? > "$site/$name.status" ) &
}
finish() { # wait for what was begun, add its logs to the log, note failures
    local name status
    wait
    for name in "${running[@]}"; do
        status=$(cat "$site/$name.status")
        printf '\n== %s: exit status %s (at %ss)\n' "$name" "$status" "$SECONDS" | tee -a "$log"
        cat "$log-$name" >> "$log"
        tail -n 30 "$log-$name"
        rm "$log-$name"
        [ "$dry$status" = 15 ] && status=0  # no GPU: no test is collected
        [ "$status" = 124 ] && status="124, its time was over"
        [ "$status" = 0 ] || failed+=("$name: exit status $status")
    done
    running=()
}

if [ -n "${MML_WHEELS:-}" ]; then
    python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" \
        "$MML_WHEELS"/*.whl || exit 2
fi
python3 - "$site" <<'PYTHON' || exit 2
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
cd "$root" || exit 2

if [ -z "$dry" ]; then
    python3 -c "import torch; assert torch.cuda.is_available(), 'PyTorch sees no CUDA device'" || exit 2
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee -a "$log"
fi

if [ -n "$profile" ]; then
    PATH=$PATH:/usr/local/cuda/bin:$(printf '%s:' /opt/nvidia/nsight-compute/*/ /usr/local/cuda/compute-sanitizer)
    for tool in memcheck racecheck; do
        # Without PyTorch's caching allocator, so that what lies behind an array is nobody's. Errors
        # of the API are cuda-bindings' questions for functions that the driver doesn't have.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 begin sanitizer-$tool 170 \
            compute-sanitizer --tool $tool --report-api-errors no --error-exitcode 9 python3 benchmarks/gpu_small.py
        finish
    done
    begin ncu 110 ncu --kernel-name-base function --kernel-name 'regex:(rows|tiles)_loss' \
        --launch-skip 1 --launch-count 6 --set basic --section MemoryWorkloadAnalysis \
        --section WarpStateStats python3 benchmarks/gpu_small.py --large
    finish
else
    torch_on="--device cuda:0"
    [ -n "$dry" ] && torch_on="--dtype float32"
    test="python3 -m pytest -q -p no:cacheprovider -p no:randomly -o filterwarnings=default"
    begin benchmark 200 python3 benchmarks/gpu.py --out "$results" --seconds 180 "${git[@]}" ${dry:+--dry-run}
    finish
    # The rest at once: what takes long is compiling, each process on a CPU of its own.
    begin device-tests 240 $test tests/backends/cuda/test_cuda_device.py -k "not cupy"
    begin device-tests-cupy 240 $test tests/backends/cuda/test_cuda_device.py -k cupy
    begin device-programs 240 $test tests/backends/cuda/test_device_programs.py
    begin conformance-torch 240 python3 -m mml_arrayapi.conformance --xp torch $torch_on
    if [ -z "$dry" ]; then
        begin conformance-cupy 240 python3 -m mml_arrayapi.conformance --xp cupy
    fi
    begin tests-cupy 240 $test tests/test_loss.py tests/test_validation.py -k cupy
    begin tests-jax 240 $test tests/test_loss.py tests/test_validation.py -k jax
    finish
fi

printf '\n== done in %ss, results in %s\n' "$SECONDS" "$results" | tee -a "$log"
if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED %s\n' "${failed[@]}" | tee -a "$log"
    exit 1
fi
