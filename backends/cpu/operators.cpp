// The operators of PyTorch's compiled graphs, as PyTorch's dispatcher calls them: a step through Python
// takes longer than a small loss. What an operator cannot serve, its twin in Python does.
//
// Nothing of PyTorch is needed to build this. Its functions are those of its stable C interface, from
// 2.10 on: torch/csrc/stable/c/shim.h and torch/csrc/inductor/aoti_torch/c/shim.h.
#include "operators.h"

#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "job.h"

namespace mml {
namespace {

using Tensor = struct TensorOpaque *;
using Text = struct TextOpaque *;
using Value = uint64_t;  // an argument or a result: its bits, or a pointer to what is owned with it
using Kernel = void (*)(Value *stack, uint64_t arguments, uint64_t results);

constexpr uint64_t VERSION = (uint64_t(2) << 56) | (uint64_t(10) << 48);  // of the interface

// In the order of Type.
#define TYPES(F)                     \
    F(aoti_torch_dtype_float64, ())  \
    F(aoti_torch_dtype_float32, ())  \
    F(aoti_torch_dtype_float16, ())  \
    F(aoti_torch_dtype_bfloat16, ()) \
    F(aoti_torch_dtype_int8, ())     \
    F(aoti_torch_dtype_int16, ())    \
    F(aoti_torch_dtype_int32, ())    \
    F(aoti_torch_dtype_int64, ())    \
    F(aoti_torch_dtype_uint8, ())    \
    F(aoti_torch_dtype_uint16, ())   \
    F(aoti_torch_dtype_uint32, ())   \
    F(aoti_torch_dtype_uint64, ())

// Return 0, but for those of types and devices.
#define FUNCTIONS(F)                                                                                   \
    F(torch_get_num_threads, (uint32_t *))                                                             \
    F(torch_library_impl, (void *library, const char *name, Kernel, uint64_t version))                 \
    F(torch_call_dispatcher, (const char *name, const char *overload, Value *stack, uint64_t version)) \
    F(torch_string_c_str, (Text, const char **))                                                       \
    F(torch_delete_string, (Text))                                                                     \
    F(aoti_torch_library_init_impl, (const char *space, const char *key, const char *file, uint32_t line, void **)) \
    F(aoti_torch_get_data_ptr, (Tensor, void **))                                                      \
    F(aoti_torch_get_storage_size, (Tensor, int64_t *))                                                \
    F(aoti_torch_get_storage_offset, (Tensor, int64_t *))                                              \
    F(aoti_torch_get_dim, (Tensor, int64_t *))                                                         \
    F(aoti_torch_get_sizes, (Tensor, int64_t **))                                                      \
    F(aoti_torch_get_strides, (Tensor, int64_t **))                                                    \
    F(aoti_torch_get_dtype, (Tensor, int32_t *))                                                       \
    F(aoti_torch_get_device_type, (Tensor, int32_t *))                                                 \
    F(aoti_torch_empty_strided, (int64_t ndim, const int64_t *sizes, const int64_t *strides, int32_t dtype, int32_t device, int32_t index, Tensor *)) \
    F(aoti_torch_delete_tensor_object, (Tensor))                                                       \
    F(aoti_torch_device_type_cpu, ())                                                                  \
    TYPES(F)

#define POINTER(name, arguments) int32_t (*name) arguments = nullptr;
struct Api {
    FUNCTIONS(POINTER)
} api;
int32_t cpu_device, codes[int(Type::none)];  // PyTorch's numbers

Type type_of(int32_t code) {
    for (int k = 0; k < int(Type::none); k++)
        if (codes[k] == code) return Type(k);
    return Type::none;
}

// False where a tensor does not lie in the CPU's memory as its sizes and strides say.
bool read(Tensor tensor, Memory &out) {
    int32_t device, dtype;
    int64_t ndim, *sizes, *strides, offset, bytes;
    void *data;
    if (api.aoti_torch_get_device_type(tensor, &device) || device != cpu_device) return false;
    if (api.aoti_torch_get_dim(tensor, &ndim) || ndim > MAX_DIMS) return false;
    if (api.aoti_torch_get_sizes(tensor, &sizes) || api.aoti_torch_get_strides(tensor, &strides)) return false;
    if (api.aoti_torch_get_dtype(tensor, &dtype) || (out.type = type_of(dtype)) == Type::none) return false;
    if (api.aoti_torch_get_storage_offset(tensor, &offset) || api.aoti_torch_get_storage_size(tensor, &bytes)) return false;
    if (api.aoti_torch_get_data_ptr(tensor, &data)) return false;
    const int64_t size = size_of(out.type);
    out.data = static_cast<char *>(data);
    out.writable = true;
    out.ndim = int(ndim);
    int64_t last = offset;
    for (int d = 0; d < out.ndim; d++) {
        out.shape[d] = sizes[d], out.strides[d] = strides[d] * size;
        last += (sizes[d] - 1) * strides[d];
    }
    return !out.size() || (out.data && (last + 1) * size <= bytes);
}

// A tensor that this owns until it is released.
class Made {
    Tensor tensor = nullptr;

  public:
    Memory memory;
    Made() = default;
    Made(const Made &) = delete;
    Made &operator=(const Made &) = delete;
    ~Made() {
        if (tensor) api.aoti_torch_delete_tensor_object(tensor);
    }
    // A new one, in the order of ``strides`` (in elements), or in C order.
    bool make(Type type, int ndim, const int64_t *sizes, const int64_t *strides = nullptr) {
        int64_t plain[MAX_DIMS], n = 1;
        for (int d = ndim; d--; n *= sizes[d] ? sizes[d] : 1) plain[d] = n;
        return !api.aoti_torch_empty_strided(ndim, sizes, strides ? strides : plain, codes[int(type)], cpu_device, 0, &tensor) &&
               read(tensor, memory);
    }
    Value release() {
        Value value;
        std::memcpy(&value, &tensor, sizeof value);
        tensor = nullptr;
        return value;
    }
};

template <class T> T as(Value value) {
    T made;
    std::memcpy(&made, &value, sizeof made);
    return made;
}
// What an optional argument holds, or null.
const Value *held(Value value) { return as<const Value *>(value); }

// float p, float margin, str reduction, SymInt? ignore_index, int axis; what is out of range gives NaN
constexpr int OPTIONS = 5;
bool read_options(const Value *given, Options &options) {
    const char *reduction;
    options.p = as<double>(given[0]), options.margin = as<double>(given[1]);
    if (!(options.p >= 1) || !std::isfinite(options.p) || !std::isfinite(options.margin)) return false;
    if (api.torch_string_c_str(as<Text>(given[2]), &reduction)) return false;
    if (const Value *ignored = held(given[3])) options.ignores = true, options.ignore = as<int64_t>(*ignored);
    options.axis = as<int64_t>(given[4]);
    if (!std::strcmp(reduction, "mean")) options.reduction = Reduction::mean;
    else if (!std::strcmp(reduction, "sum")) options.reduction = Reduction::sum;
    else if (!std::strcmp(reduction, "none")) options.reduction = Reduction::none;
    else return false;
    options.stop_at_bad_target = false;
    return true;
}

struct Tensors {
    Memory x, y, w;
};
struct TorchJob : Tensors, Job {
    TorchJob() : Job(x, y, w) {}

    // Tensor input, Tensor target, Tensor? weight
    bool read_all(const Value *tensors, const Value *given) {
        const Value *weights = held(tensors[2]);
        return read_options(given, options) && read(as<Tensor>(tensors[0]), x) && read(as<Tensor>(tensors[1]), y) &&
               check_scores() && (!weights || read(as<Tensor>(*weights), w)) && check_rest(weights);
    }
    bool run(Block block, Result &result) const {
        uint32_t setting;
        int threads = 1;
        if (wants_threads(call)) threads = api.torch_get_num_threads(&setting) ? -1 : threads_with(long(setting));
        if (threads < 1) return false;
        try {
            return run_blocks(call, block, threads, [] { return false; }, result);
        } catch (const std::bad_alloc &) {
            return false;
        }
    }
};

// The mask of pytorch/cpu.py: the bits, and at its end MARK.
int64_t mask_size(const Job &job) {
    const int64_t lanes = job.input.type == Type::f64 ? 2 : 4;
    return job.call.rows * ((job.call.classes + lanes - 1) / lanes) + 1;
}

// (Tensor input, Tensor target, Tensor? weight, options, bool keep_mask) -> (Tensor, Tensor)
bool compute_loss(const Value *stack, Made &loss, Made &mask) {
    TorchJob job;
    if (!job.read_all(stack, stack + 3)) return false;
    const bool keep = as<uint8_t>(stack[3 + OPTIONS]), none = job.options.reduction == Reduction::none;
    const int64_t bits = keep ? job.bits_size() : 0, room = keep ? mask_size(job) : 0;
    if (!loss.make(job.x.type, none ? job.y.ndim : 0, job.y.shape) || !mask.make(Type::u8, 1, &room)) return false;
    if (none && !job.set_losses(loss.memory)) return false;
    if (bits) {
        job.call.bits = reinterpret_cast<uint8_t *>(mask.memory.data);
        mask.memory.data[room - 1] = char(MARK);
    } else {
        std::memset(mask.memory.data, 0, size_t(room));  // none was written
    }
    Result result;
    const Block block = loss_block(job.call);
    do {
        if (!job.run(block, result)) return false;
    } while (job.overflowed(result));
    if (!none) store_float(loss.memory.data, job.x.type, job.value(result));
    return true;
}

// Whether a tensor's elements lie without gaps and overlaps, in whatever order of the axes.
bool is_dense(const Memory &x, const int64_t *strides) {
    int64_t next = 1;
    for (bool found = true; found && next < x.size();) {
        found = false;
        for (int d = 0; d < x.ndim; d++)
            if (x.shape[d] > 1 && strides[d] == next) next *= x.shape[d], found = true;
    }
    return next == x.size();
}

// (Tensor grad_output, Tensor input, Tensor target, Tensor? weight, Tensor? mask, options) -> Tensor
bool compute_gradient(const Value *stack, Made &grad) {
    TorchJob job;
    Memory upstream, mask;
    if (!job.read_all(stack + 1, stack + 5)) return false;
    if (!read(as<Tensor>(stack[0]), upstream) || !job.set_upstream(upstream)) return false;
    int64_t strides[MAX_DIMS];
    for (int d = 0; d < job.x.ndim; d++) strides[d] = job.x.strides[d] / size_of(job.x.type);
    // As torch.empty_like() has it.
    if (!is_dense(job.x, strides) || !grad.make(job.x.type, job.x.ndim, job.x.shape, strides)) return false;
    if (!job.set_grad(grad.memory)) return false;
    job.set_scale();
    const Value *given = held(stack[4]);
    const int64_t bits = given ? job.bits_size() : 0;
    if (bits && read(as<Tensor>(*given), mask) && mask.type == Type::u8 && mask.ndim == 1 && mask.strides[0] == 1 &&
        mask.shape[0] == mask_size(job) && uint8_t(mask.data[mask.shape[0] - 1]) == MARK)
        job.call.bits = reinterpret_cast<uint8_t *>(mask.data);
    Result result;
    return job.run(job.call.bits ? bits_block(job.call) : grad_block(job.call), result);
}

// What the dispatcher handed over with the arguments.
void drop(Value tensor) { api.aoti_torch_delete_tensor_object(as<Tensor>(tensor)); }
void drop_optional(Value value, bool tensor) {
    if (const Value *inner = held(value)) {
        if (tensor) drop(*inner);
        delete inner;
    }
}
void drop_options(const Value *given) {
    api.torch_delete_string(as<Text>(given[2]));
    drop_optional(given[3], false);
}
void decline(const char *twin, Value *stack) {
    if (api.torch_call_dispatcher(twin, "", stack, VERSION))
        throw std::runtime_error(std::string(twin) + " failed, as told above");
}

void loss_operator(Value *stack, uint64_t, uint64_t) {
    Made loss, mask;
    if (!compute_loss(stack, loss, mask)) return decline("mml_arrayapi::graph_multi_margin_loss_in_python", stack);
    drop(stack[0]), drop(stack[1]), drop_optional(stack[2], true), drop_options(stack + 3);
    stack[0] = loss.release(), stack[1] = mask.release();
}
void gradient_operator(Value *stack, uint64_t, uint64_t) {
    Made grad;
    if (!compute_gradient(stack, grad)) return decline("mml_arrayapi::graph_multi_margin_loss_backward_in_python", stack);
    drop(stack[0]), drop(stack[1]), drop(stack[2]), drop_optional(stack[3], true), drop_optional(stack[4], true);
    drop_options(stack + 5);
    stack[0] = grad.release();
}

}  // namespace

bool connect_pytorch(const std::function<void *(const char *)> &find) {
    Api made;
#define FIND(name, arguments)                                                      \
    if (void *found = find(#name)) std::memcpy(&made.name, &found, sizeof found); \
    else return false;
    FUNCTIONS(FIND)
    api = made;
    cpu_device = api.aoti_torch_device_type_cpu();
#define CODE(name, arguments) api.name(),
    const int32_t found[] = {TYPES(CODE)};
    static_assert(sizeof found == sizeof codes, "one of each");
    std::memcpy(codes, found, sizeof codes);
    void *library;  // kept as long as the process
    return !api.aoti_torch_library_init_impl("mml_arrayapi", "CPU", __FILE__, __LINE__, &library) &&
           !api.torch_library_impl(library, "graph_multi_margin_loss", loss_operator, VERSION) &&
           !api.torch_library_impl(library, "graph_multi_margin_loss_backward", gradient_operator, VERSION);
}

}  // namespace mml
