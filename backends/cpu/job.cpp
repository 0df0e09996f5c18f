#include "job.h"

#include "pool.h"

#include <cmath>
#include <cstring>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace mml {
namespace {

// Scores: of a block (16 microseconds of work); from which Python's lock is released.
constexpr int64_t BLOCK = 1 << 16, ROUND = 64, ALONE = 1 << 14;  // ROUND: a group of the kernels
// Work from which other threads help, a row counting as much as 32 scores: 40 microseconds. With half
// as much, a thread that still looks for work saves 5, one that sleeps costs 40.
constexpr int64_t SERIAL = 1 << 18, ROW = 32;
constexpr int64_t FEW = 1 << 20;  // scores: reading so few again takes less time than keeping bits

// Ask Linux to back fresh memory by large pages. Filling 262 MB took 95 ms with small ones, 15 ms
// with large ones.
void use_large_pages(const Memory &array) {
#ifdef MADV_HUGEPAGE
    constexpr int64_t LARGE = 1 << 22;  // bytes
    int64_t size = array.size() * size_of(array.type), page = sysconf(_SC_PAGESIZE);
    if (size < LARGE) return;
    uintptr_t first = reinterpret_cast<uintptr_t>(array.data), end = first + uintptr_t(size);
    first = (first + uintptr_t(page) - 1) / uintptr_t(page) * uintptr_t(page);
    madvise(reinterpret_cast<void *>(first), end - first, MADV_HUGEPAGE);  // may be refused
#else
    (void)array;
#endif
}

}  // namespace

void walk(Walk &out, const Memory &array, int axis) {
    out.data = array.data;
    out.type = array.type;
    out.ndim = 0;
    for (int d = 0; d < array.ndim; d++) {
        int64_t n = array.shape[d], stride = array.strides[d];
        if (d == axis || n == 1) continue;
        int last = out.ndim - 1;
        if (last >= 0 && out.stride[last] == n * stride) {
            out.shape[last] *= n;
            out.stride[last] = stride;
        } else {
            out.shape[out.ndim] = n;
            out.stride[out.ndim++] = stride;
        }
    }
}
void scores(Scores &out, const Memory &array, int axis) {
    walk(out, array, axis);
    out.step = axis < 0 ? size_of(array.type) : array.strides[axis];
}

bool Job::check_scores() {
    if (!input.is_float() || !target.is_integer()) return false;
    int64_t ndim = input.ndim ? input.ndim : 1, wanted = options.axis;
    if (wanted < -ndim || wanted >= ndim) return false;
    axis = input.ndim ? int(wanted < 0 ? wanted + ndim : wanted) : -1;
    call.classes = axis < 0 ? 1 : input.shape[axis];
    if (call.classes < 1 || call.classes > MOST_CLASSES) return false;
    call.rows = 1;
    for (int d = 0; d < input.ndim; d++)
        if (d != axis) call.rows *= input.shape[d];
    if (!same_batch(target)) return false;
    scores(call.x, input, axis);
    walk(call.y, target, -1);
    return true;
}
bool Job::check_rest(bool weighted) {
    if (weighted) {
        if (!weight.is_float() || weight.ndim != 1 || weight.shape[0] != call.classes) return false;
        walk(call.weight, weight, -1);
    }
    call.p = options.p;
    call.margin = options.margin;
    call.ignores = options.ignores;
    call.ignore_is_large = options.ignore_is_large;
    call.ignore = options.ignore;
    call.stop_at_bad_target = options.stop_at_bad_target;
    return true;
}
bool Job::same_batch(const Memory &rows) const {
    int batch = input.ndim - (axis >= 0);
    if (rows.ndim != batch) return batch < 2 && rows.ndim < 2 && call.rows == 1 && rows.size() == 1;
    for (int d = 0, from = 0; d < batch; d++, from++) {
        if (from == axis) from++;
        if (rows.shape[d] != input.shape[from]) return false;
    }
    return true;
}
bool Job::set_losses(const Memory &out) {
    if (out.type != input.type || !out.writable || out.ndim != target.ndim) return false;
    for (int d = 0; d < out.ndim; d++)
        if (out.shape[d] != target.shape[d]) return false;
    walk(call.losses, out, -1);
    return true;
}
bool Job::set_grad(const Memory &grad) {
    if (grad.type != input.type || !grad.writable || grad.ndim != input.ndim) return false;
    if (std::memcmp(grad.shape, input.shape, size_t(input.ndim) * sizeof *input.shape)) return false;
    scores(call.grad, grad, axis);
    use_large_pages(grad);
    return true;
}
bool Job::set_upstream(const Memory &given) {
    if (!given.is_float()) return false;
    if (options.reduction == Reduction::none) {
        if (!same_batch(given)) return false;
        walk(call.upstream, given, -1);
        return true;
    }
    if (given.ndim) return false;
    call.scale *= load_float(given.data, given.type);
    return true;
}
bool Job::set_bits(const Memory &given) {
    if (given.type != Type::u8 || given.ndim != 1 || !given.writable || call.p != 1) return false;
    if (given.strides[0] != 1 || given.shape[0] != call.rows * row_bytes(call.x.type, call.classes)) return false;
    call.bits = reinterpret_cast<uint8_t *>(given.data);
    return true;
}
void Job::set_scale() {
    if (options.reduction != Reduction::mean) return;
    int64_t count = call.ignores ? count_not_ignored(call) : call.rows;
    if (count) call.scale /= double(count);
}
int64_t Job::bits_size() const {
    const bool pays = options.p == 1 && call.classes > 1 && call.rows * call.classes >= FEW;
    return pays ? call.rows * row_bytes(call.x.type, call.classes) : 0;
}
double Job::value(const Result &result) const {
    double value = result.sum / double(call.classes);
    if (options.reduction == Reduction::mean)
        value = result.count ? value / double(result.count) : std::nan("");
    return value / call.shrink;
}
bool Job::overflowed(const Result &result) {
    // NaN: parts that overflowed to infinities of both signs, or a row that has no value.
    if (call.shrink != 1 || std::isfinite(result.sum) || call.x.type != Type::f64) return false;
    call.shrink = 0x1p-64;
    return true;
}

bool is_small(const Call &call) { return call.rows * call.classes < ALONE; }
bool wants_threads(const Call &call) { return call.rows * (call.classes + ROW) >= SERIAL; }

bool run_blocks(const Call &call, Block block, int threads, const std::function<bool()> &interrupted, Result &total) {
    total = Result{};
    if (is_small(call)) {
        block(call, 0, call.rows, total);
        return true;
    }
    int64_t size = call.classes < BLOCK ? BLOCK / call.classes : 1;
    if (size > ROUND) size -= size % ROUND;
    const int64_t count = (call.rows + size - 1) / size;
    std::vector<Result> results(static_cast<size_t>(count));
    const auto run = [&](int64_t k) {
        int64_t start = k * size, stop = start + size < call.rows ? start + size : call.rows;
        block(call, start, stop, results[size_t(k)]);
    };
    const bool whole = in_parallel(count, threads, run, interrupted);
    for (const Result &result : results) {
        total.sum += result.sum;
        total.count += result.count;
        total.bad |= result.bad;
    }
    return whole;
}

}  // namespace mml
