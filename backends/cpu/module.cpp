// The door to Python: reads arrays and options, runs the kernels, makes the results.
//
// Nothing is taken on trust: each array is read anew in every call, and a call that is not plainly
// right gets None, so that Python can find the words for the error or another kernel.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "dlpack.h"
#include "job.h"
#include "operators.h"

using namespace mml;

namespace {

// Arrays of one library: how they are read, and how new ones are made.
struct Family {
    const DLPackExchangeAPI *exchange = nullptr;  // reads and makes tensors
    PyObject *capsule = nullptr;                  // callable: a tensor's DLPack capsule
    PyObject *empty = nullptr;                    // callable: shape, dtype
    PyObject *scalars[3] = {};                    // types of a float64, float32, float16 scalar
};
struct Accepted {
    PyTypeObject *type;
    const Family *family;
};
std::vector<Accepted> accepted;  // written when a library's module is imported, never shortened

const Family *family_of(PyObject *x) {
    for (const Accepted &entry : accepted)
        if (Py_TYPE(x) == entry.type) return entry.family;
    return nullptr;
}

// Methods of tensors, by name.
struct Names {
    PyObject *is_neg, *untyped_storage, *nbytes, *data_ptr, *dtype;
} names;

// An owned reference.
struct Object {
    PyObject *p;
    explicit Object(PyObject *p = nullptr) : p(p) {}
    Object(const Object &) = delete;
    Object &operator=(const Object &) = delete;
    ~Object() { Py_XDECREF(p); }
    void set(PyObject *other) {
        PyObject *before = p;
        p = other;
        Py_XDECREF(before);
    }
    PyObject *release() {
        PyObject *result = p;
        p = nullptr;
        return result;
    }
};

// Forget the error of a call that is declined; but an interrupt is none.
void forget() {
    if (PyErr_Occurred() && PyErr_ExceptionMatches(PyExc_Exception)) PyErr_Clear();
}
bool is_string(PyObject *x, const char *text) {
    return PyUnicode_CompareWithASCIIString(x, text) == 0;
}

// The memory behind an array, for as long as this lives.
class Array : public Memory {
  public:
    Array() = default;
    Array(const Array &) = delete;
    Array &operator=(const Array &) = delete;
    ~Array() {
        if (has_view) PyBuffer_Release(&view);
    }

    // False where x can't be served. No Python error is left but an interrupt, which called() sees.
    bool read(PyObject *x, const Family *family) {
        if (!open(x, family)) return false;
        const bool done = !family->exchange || !size() || is_memory(x);
        if (!done) forget();
        return done;
    }
    // The same for an array of our own, and where no element will be read.
    bool open(PyObject *x, const Family *family) {
        if (family_of(x) != family) return false;
        bool done = family->exchange  ? read_exchange(x, *family)
                    : family->capsule ? read_capsule(x, *family)
                                      : read_buffer(x);
        if (!done) forget();
        return done && type != Type::none && (data || size() == 0);
    }

  private:
    Py_buffer view;
    bool has_view = false;
    Object owner;

    bool read_buffer(PyObject *x) {
        if (PyObject_GetBuffer(x, &view, PyBUF_FULL_RO)) {
            PyErr_Clear();
            return read_bfloat(x);
        }
        has_view = true;
        type = type_of_format(view.format, view.itemsize);
        return take_view();
    }
    // NumPy exports no bfloat16; its bits it does.
    bool read_bfloat(PyObject *x) {
        Object dtype(PyObject_GetAttrString(x, "dtype"));
        if (!dtype.p) return false;
        Object name(PyObject_GetAttrString(dtype.p, "name"));
        if (!name.p || !PyUnicode_Check(name.p) || PyUnicode_CompareWithASCIIString(name.p, "bfloat16"))
            return false;
        Object native(PyObject_GetAttrString(dtype.p, "isnative"));
        if (native.p != Py_True) return false;
        owner.set(PyObject_CallMethod(x, "view", "s", "uint16"));
        if (!owner.p || PyObject_GetBuffer(owner.p, &view, PyBUF_FULL_RO)) return false;
        has_view = true;
        if (type_of_format(view.format, view.itemsize) == Type::u16) type = Type::bf16;
        return take_view();
    }
    bool take_view() {
        if (view.ndim > MAX_DIMS || view.suboffsets) return false;
        data = static_cast<char *>(view.buf);
        writable = !view.readonly;
        ndim = view.ndim;
        for (int d = 0; d < ndim; d++) shape[d] = view.shape[d], strides[d] = view.strides[d];
        return true;
    }
    static Type type_of_format(const char *format, Py_ssize_t size) {
        if (!format) return Type::none;
        const uint16_t one = 1;
        bool little = *reinterpret_cast<const char *>(&one) == 1;
        if (*format == '@' || *format == '=' || *format == '^' || *format == (little ? '<' : '>'))
            format++;
        if (!*format || format[1]) return Type::none;
        int log = size == 1 ? 0 : size == 2 ? 1 : size == 4 ? 2 : size == 8 ? 3 : 4;
        if (log == 4) return Type::none;
        if (std::strchr("bhilq", *format)) return Type(int(Type::i8) + log);
        if (std::strchr("BHILQ", *format)) return Type(int(Type::u8) + log);
        if (*format == 'd' && log == 3) return Type::f64;
        if (*format == 'f' && log == 2) return Type::f32;
        if (*format == 'e' && log == 1) return Type::f16;
        return Type::none;
    }

    bool read_exchange(PyObject *x, const Family &family) {
        DLTensor tensor;
        if (family.exchange->dltensor_from_py_object_no_sync(x, &tensor)) return false;
        return take_tensor(tensor);
    }
    // The exchange tells neither of tensors that stand for the negative of what is in memory, nor of
    // a storage that shrank beneath a tensor or is none (of zeros), nor of packed integers.
    bool is_memory(PyObject *x) const {
        Object negated(PyObject_CallMethodObjArgs(x, names.is_neg, nullptr));
        if (negated.p != Py_False) return false;
        Object storage(PyObject_CallMethodObjArgs(x, names.untyped_storage, nullptr));
        if (!storage.p) return false;
        Object start(PyObject_CallMethodObjArgs(storage.p, names.data_ptr, nullptr));
        if (!start.p) return false;
        Object bytes(PyObject_CallMethodObjArgs(storage.p, names.nbytes, nullptr));
        if (!bytes.p) return false;
        const char *begin = static_cast<char *>(PyLong_AsVoidPtr(start.p));
        int64_t room = PyLong_AsLongLong(bytes.p) - size_of(type);  // before the last element
        for (int d = 0; d < ndim; d++) room -= (shape[d] - 1) * strides[d];  // steps are >= 0
        if (PyErr_Occurred() || !begin || data < begin || data - begin > room) return false;
        return size_of(type) > 1 || is_whole(x);
    }
    bool is_whole(PyObject *x) const {
        Object dtype(PyObject_GetAttr(x, names.dtype));
        Object text(dtype.p ? PyObject_Str(dtype.p) : nullptr);
        if (!text.p) return false;
        return is_string(text.p, type == Type::i8 ? "torch.int8" : "torch.uint8");
    }
    bool read_capsule(PyObject *x, const Family &family) {
        owner.set(PyObject_CallFunctionObjArgs(family.capsule, x, nullptr));
        if (!owner.p) return false;
        void *managed = PyCapsule_GetPointer(owner.p, "dltensor");
        return managed && take_tensor(*static_cast<DLTensor *>(managed));
    }
    bool take_tensor(const DLTensor &t) {
        if (t.device.device_type != kDLCPU || t.dtype.lanes != 1 || t.ndim > MAX_DIMS) return false;
        if (t.ndim && !t.strides) return false;
        type = type_of_code(t.dtype.code, t.dtype.bits);
        if (type == Type::none) return false;
        data = static_cast<char *>(t.data);
        if (data) data += t.byte_offset;
        writable = true;
        ndim = t.ndim;
        for (int d = 0; d < ndim; d++) shape[d] = t.shape[d], strides[d] = t.strides[d] * size_of(type);
        return true;
    }
    static Type type_of_code(int code, int bits) {
        int log = bits == 8 ? 0 : bits == 16 ? 1 : bits == 32 ? 2 : bits == 64 ? 3 : 4;
        if (log == 4) return Type::none;
        if (code == kDLInt) return Type(int(Type::i8) + log);
        if (code == kDLUInt) return Type(int(Type::u8) + log);
        if (code == kDLBfloat && log == 1) return Type::bf16;
        if (code != kDLFloat || !log) return Type::none;
        return log == 3 ? Type::f64 : log == 2 ? Type::f32 : Type::f16;
    }
};

bool read_real(PyObject *x, double &value) {
    if (PyFloat_CheckExact(x)) {
        value = PyFloat_AsDouble(x);
    } else if (PyLong_CheckExact(x)) {
        value = PyLong_AsDouble(x);
        if (value == -1 && PyErr_Occurred()) return PyErr_Clear(), false;
    } else {
        return false;
    }
    return std::isfinite(value);
}
bool read_ignore(PyObject *x, Options &options) {
    if (x == Py_None) return true;
    if (!PyLong_CheckExact(x)) return false;
    int overflow;
    options.ignore = PyLong_AsLongLongAndOverflow(x, &overflow);
    options.ignores = true;
    if (!overflow) return true;
    unsigned long long large = overflow > 0 ? PyLong_AsUnsignedLongLong(x) : 0;
    if (overflow < 0 || PyErr_Occurred()) {  // no dtype holds it
        PyErr_Clear();
        options.ignores = false;
    }
    options.ignore = int64_t(large);
    options.ignore_is_large = true;
    return true;
}
// (p, margin, reduction, ignore_index, axis, check_target)
bool read_options(PyObject *tuple, Options &options) {
    if (!PyTuple_CheckExact(tuple) || PyTuple_Size(tuple) != 6) return false;
    PyObject *reduction = PyTuple_GetItem(tuple, 2), *check = PyTuple_GetItem(tuple, 5);
    PyObject *axis = PyTuple_GetItem(tuple, 4);
    if (!read_real(PyTuple_GetItem(tuple, 0), options.p) || options.p < 1) return false;
    if (!read_real(PyTuple_GetItem(tuple, 1), options.margin)) return false;
    if (!read_ignore(PyTuple_GetItem(tuple, 3), options)) return false;
    if (!PyUnicode_CheckExact(reduction) || !PyUnicode_CheckExact(check)) return false;
    if (!PyLong_CheckExact(axis)) return false;
    int overflow;
    options.axis = PyLong_AsLongLongAndOverflow(axis, &overflow);
    if (overflow) return false;
    if (is_string(reduction, "mean")) options.reduction = Reduction::mean;
    else if (is_string(reduction, "sum")) options.reduction = Reduction::sum;
    else if (is_string(reduction, "none")) options.reduction = Reduction::none;
    else return false;
    options.stop_at_bad_target = !is_string(check, "nan");
    return !options.stop_at_bad_target || is_string(check, "auto") || is_string(check, "raise");
}

// The arrays of a call as it came from Python.
struct Arrays {
    const Family *family;
    Array x, y, w;
    std::unique_ptr<Array[]> arrays;  // of the scores in pieces
    std::unique_ptr<Piece[]> pieces;
};
struct PythonJob : Arrays, Job {
    PythonJob() : Job(x, y, w) {}

    // False: not a call for these kernels.
    bool read(PyObject *scores, PyObject *targets, PyObject *weights, PyObject *given) {
        return read_scores(scores, targets, given) && read_rest(weights);
    }
    // The same for scores whose classes lie in several arrays.
    bool read_pieces(PyObject *tuple, PyObject *targets, PyObject *weights, PyObject *given) {
        const Py_ssize_t n = PyTuple_Size(tuple);
        if (!n || !read_scores(PyTuple_GetItem(tuple, 0), targets, given) || axis < 0) return false;
        arrays.reset(new (std::nothrow) Array[size_t(n)]);
        pieces.reset(new (std::nothrow) Piece[size_t(n)]);
        if (!arrays || !pieces) return false;
        call.classes = 0;
        for (Py_ssize_t k = 0; k < n; k++) {
            Array &array = arrays[size_t(k)];
            if (!array.read(PyTuple_GetItem(tuple, k), family) || array.type != input.type) return false;
            if (array.ndim != input.ndim) return false;
            for (int d = 0; d < array.ndim; d++)
                if (d != axis && array.shape[d] != input.shape[d]) return false;
            Piece &piece = pieces[size_t(k)];
            scores(piece.x, array, axis);
            call.classes += piece.classes = array.shape[axis];
            if (call.classes > MOST_CLASSES) return false;
        }
        call.pieces = pieces.get();
        call.n_pieces = n;
        return read_rest(weights);
    }

  private:
    bool read_scores(PyObject *scores, PyObject *targets, PyObject *given) {
        family = family_of(scores);
        if (!family || !read_options(given, options)) return false;
        return x.read(scores, family) && y.read(targets, family) && check_scores();
    }
    bool read_rest(PyObject *weights) {
        const bool weighted = weights != Py_None;
        return (!weighted || w.read(weights, family)) && check_rest(weighted);
    }
};

// What the gradient is multiplied with: None, a number, or an array of the loss's shape.
bool read_upstream(PythonJob &job, PyObject *given, Array &array) {
    if (given == Py_None) return true;
    if (!PyFloat_CheckExact(given) && !PyLong_CheckExact(given))
        return array.read(given, job.family) && job.set_upstream(array);
    if (job.options.reduction == Reduction::none) return false;
    job.call.scale *= PyFloat_AsDouble(given);
    return !PyErr_Occurred() || (PyErr_Clear(), false);
}

PyObject *limit = nullptr;  // callable: the library's setting or None -> number of threads

// How many threads a large call may use; -1 with a Python error.
int number_of_threads(PyObject *setting) {
    Object asked;
    if (PyCallable_Check(setting)) {
        asked.set(PyObject_CallObject(setting, nullptr));
        if (!asked.p) return -1;
        setting = asked.p;
    }
    if (!limit) return 1;
    Object number(PyObject_CallFunctionObjArgs(limit, setting, nullptr));
    long value = number.p ? PyLong_AsLong(number.p) : -1;
    if (value == -1 && PyErr_Occurred()) return -1;
    return int(value < 1 ? 1 : value > 1024 ? 1024 : value);
}

// Run a job's blocks. False: a Python error (an interrupt) is set.
bool run(const PythonJob &job, Block block, PyObject *setting, Result &total) {
    const int threads = wants_threads(job.call) ? number_of_threads(setting) : 1;
    if (threads < 0) return false;
    if (is_small(job.call)) return run_blocks(job.call, block, threads, {}, total);
    bool whole = false, interrupted = false, memory = true;
    PyThreadState *state = PyEval_SaveThread();
    const auto ask = [&] {
        PyEval_RestoreThread(state);
        interrupted = PyErr_CheckSignals() != 0;
        state = PyEval_SaveThread();
        return interrupted;
    };
    try {
        whole = run_blocks(job.call, block, threads, ask, total);
    } catch (const std::bad_alloc &) {
        memory = false;
    }
    PyEval_RestoreThread(state);
    if (!memory) PyErr_NoMemory();
    else if (!whole && !interrupted)
        PyErr_SetString(PyExc_RuntimeError, "the process was forked while a loss was computed");
    return whole;
}

void set_error(void *, const char *, const char *message) {
    PyErr_SetString(PyExc_RuntimeError, message);
}

// A new array of the target's shape; 0-d where target is null. Its memory is open in ``out``.
PyObject *make_array(const PythonJob &job, PyObject *input, const Memory *like, Array &out) {
    int ndim = like ? like->ndim : 0;
    if (job.family->exchange) {
        DLTensor wanted = {};
        int64_t shape[MAX_DIMS];
        for (int d = 0; d < ndim; d++) shape[d] = like->shape[d];
        wanted.device = {kDLCPU, 0};
        wanted.ndim = ndim;
        wanted.shape = shape;
        bool brain = job.input.type == Type::bf16;
        wanted.dtype = {uint8_t(brain ? kDLBfloat : kDLFloat), uint8_t(8 * size_of(job.input.type)), 1};
        DLManagedTensorVersioned *managed;
        void *tensor;
        if (job.family->exchange->managed_tensor_allocator(&wanted, &managed, nullptr, set_error))
            return nullptr;
        if (job.family->exchange->managed_tensor_to_py_object_no_sync(managed, &tensor)) return nullptr;
        Object made(static_cast<PyObject *>(tensor));
        if (out.open(made.p, job.family)) return made.release();
        PyErr_SetString(PyExc_RuntimeError, "a new tensor cannot be read");
        return nullptr;
    }
    Object dtype(PyObject_GetAttrString(input, "dtype")), shape(PyTuple_New(ndim));
    if (!dtype.p || !shape.p) return nullptr;
    for (int d = 0; d < ndim; d++) {
        PyObject *n = PyLong_FromLongLong(like->shape[d]);
        if (!n || PyTuple_SetItem(shape.p, d, n)) return nullptr;
    }
    Object made(PyObject_CallFunctionObjArgs(job.family->empty, shape.p, dtype.p, nullptr));
    if (!made.p) return nullptr;
    if (out.open(made.p, job.family)) return made.release();
    PyErr_SetString(PyExc_RuntimeError, "a new array cannot be read");
    return nullptr;
}

bool can_make(const Family &family) { return family.exchange || family.empty; }

// The mean or the sum as the library's own number.
PyObject *make_scalar(const PythonJob &job, PyObject *input, double value, PyObject *given) {
    Type type = job.input.type;
    if (given != Py_None || job.family->exchange) {
        Array out;
        Object made;
        if (given != Py_None) {
            Py_INCREF(given);
            made.set(given);
            if (!out.read(given, job.family) || out.ndim || out.type != type || !out.writable)
                Py_RETURN_NONE;
        } else {
            made.set(make_array(job, input, nullptr, out));
            if (!made.p) return nullptr;
        }
        store_float(out.data, type, value);
        return made.release();
    }
    char bytes[8];
    store_float(bytes, type, value);
    Object number(PyFloat_FromDouble(load_float(bytes, type)));
    if (!number.p) return nullptr;
    if (type != Type::bf16)
        return PyObject_CallFunctionObjArgs(job.family->scalars[int(type)], number.p, nullptr);
    Object dtype(PyObject_GetAttrString(input, "dtype"));
    if (!dtype.p) return nullptr;
    Object scalar(PyObject_GetAttrString(dtype.p, "type"));
    return scalar.p ? PyObject_CallFunctionObjArgs(scalar.p, number.p, nullptr) : nullptr;
}

// Run the loss's (or gradient's) blocks, make the result. None: declined.
PyObject *compute(PythonJob &job, PyObject *input, PyObject *given, PyObject *threads, Block block) {
    Call &call = job.call;
    bool none = job.options.reduction == Reduction::none;
    if (given == Py_None && !can_make(*job.family)) Py_RETURN_NONE;
    Array out;
    Object losses;
    if (none) {
        if (given == Py_None) {
            losses.set(make_array(job, input, &job.target, out));
            if (!losses.p) return nullptr;
        } else {
            Py_INCREF(given);
            losses.set(given);
            if (!out.read(given, job.family)) Py_RETURN_NONE;
        }
        if (!job.set_losses(out)) Py_RETURN_NONE;
    }
    Result result;
    do {
        if (!run(job, block, threads, result)) return nullptr;
        if (result.bad && call.stop_at_bad_target) Py_RETURN_NONE;
    } while (job.overflowed(result));
    return none ? losses.release() : make_scalar(job, input, job.value(result), given);
}

bool read_bits(PythonJob &job, PyObject *given, Array &array) {
    return given == Py_None || (array.read(given, job.family) && job.set_bits(array));
}

PyObject *argument(PyObject *const *args, Py_ssize_t n, Py_ssize_t i) {
    return i < n ? args[i] : Py_None;
}
// The level x86-64-v3: AVX2 and what came with it.
bool has_v3() {
#ifdef __x86_64__
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
           __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
           __builtin_cpu_supports("lzcnt") && __builtin_cpu_supports("movbe");
#else
    return false;
#endif
}
// The level x86-64-v4: AVX-512 as servers have had it since 2017.
bool has_v4() {
#ifdef __x86_64__
    return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
    return false;
#endif
}
bool wrong_count(Py_ssize_t n, Py_ssize_t least, Py_ssize_t most) {
    if (least <= n && n <= most) return false;
    PyErr_Format(PyExc_TypeError, "takes %zd to %zd positional arguments, but got %zd", least, most, n);
    return true;
}

// loss(input, target, weight, options, out=None, bits=None, threads=None)
PyObject *loss(PyObject *, PyObject *const *args, Py_ssize_t n) {
    if (wrong_count(n, 4, 7)) return nullptr;
    PythonJob job;
    PyObject *input = args[0], *given = argument(args, n, 5);
    if (PyTuple_CheckExact(input)) {
        if (given != Py_None || !job.read_pieces(input, args[1], args[2], args[3])) Py_RETURN_NONE;
        input = PyTuple_GetItem(input, 0);
    } else if (!job.read(input, args[1], args[2], args[3])) {
        Py_RETURN_NONE;
    }
    Array bits;
    if (!read_bits(job, given, bits)) Py_RETURN_NONE;
    Block block = loss_block(job.call);
    if (!block) Py_RETURN_NONE;
    return compute(job, input, argument(args, n, 4), argument(args, n, 6), block);
}

// loss_and_grad(input, target, weight, options, grad, grad_output=None, out=None, threads=None)
PyObject *loss_and_grad(PyObject *, PyObject *const *args, Py_ssize_t n) {
    if (wrong_count(n, 5, 8)) return nullptr;
    PythonJob job;
    Array grad, upstream;
    if (!job.read(args[0], args[1], args[2], args[3])) Py_RETURN_NONE;
    if (!grad.read(args[4], job.family) || !job.set_grad(grad)) Py_RETURN_NONE;
    if (!read_upstream(job, argument(args, n, 5), upstream)) Py_RETURN_NONE;
    job.set_scale();
    return compute(job, args[0], argument(args, n, 6), argument(args, n, 7), grad_block(job.call));
}

// grad(input, target, weight, options, grad, grad_output=None, bits=None, threads=None)
PyObject *grad(PyObject *, PyObject *const *args, Py_ssize_t n) {
    if (wrong_count(n, 5, 8)) return nullptr;
    PythonJob job;
    Array grad, upstream, bits;
    if (!job.read(args[0], args[1], args[2], args[3])) Py_RETURN_NONE;
    if (!grad.read(args[4], job.family) || !job.set_grad(grad)) Py_RETURN_NONE;
    if (!read_upstream(job, argument(args, n, 5), upstream)) Py_RETURN_NONE;
    job.set_scale();
    if (!read_bits(job, argument(args, n, 6), bits)) Py_RETURN_NONE;
    Result result;
    Block block = job.call.bits ? bits_block(job.call) : grad_block(job.call);
    if (!run(job, block, argument(args, n, 7), result)) return nullptr;
    if (result.bad && job.call.stop_at_bad_target) Py_RETURN_NONE;
    Py_INCREF(args[4]);
    return args[4];
}

// The bytes that keep the bits of p = 1; 0 where input or options don't go with them.
int64_t bytes_of_rows(PythonJob &job, PyObject *input, PyObject *given) {
    const Family *family = family_of(input);
    if (!family || !read_options(given, job.options) || !job.x.open(input, family)) return 0;
    const Array &x = job.x;
    int64_t axis = job.options.axis < 0 ? job.options.axis + x.ndim : job.options.axis;
    if (!x.is_float() || job.options.p != 1 || axis < 0 || axis >= x.ndim || !x.shape[axis]) return 0;
    scores(job.call.x, x, int(axis));
    job.call.classes = x.shape[axis];
    job.call.rows = x.size() / job.call.classes;
    return row_bytes(x.type, job.call.classes);
}

// row_bytes(input, options) -> int
PyObject *row_bytes(PyObject *, PyObject *const *args, Py_ssize_t n) {
    if (wrong_count(n, 2, 2)) return nullptr;
    PythonJob job;
    return PyLong_FromLongLong(bytes_of_rows(job, args[0], args[1]));
}

// bits_size(input, options) -> int
PyObject *bits_size(PyObject *, PyObject *const *args, Py_ssize_t n) {
    if (wrong_count(n, 2, 2)) return nullptr;
    PythonJob job;
    return PyLong_FromLongLong(bytes_of_rows(job, args[0], args[1]) ? job.bits_size() : 0);
}

// The three below serve class axes in parts; the part's first class comes after the options.

bool read_part(PythonJob &job, PyObject *const *args) {
    int overflow;
    if (!PyLong_CheckExact(args[3])) return false;
    job.call.first = PyLong_AsLongLongAndOverflow(args[3], &overflow);
    job.call.part = true;
    return !overflow && job.call.first >= 0 && job.read(args[0], args[1], Py_None, args[2]);
}
// An array of one number for each row.
bool read_rows(const PythonJob &job, PyObject *given, Array &array, Walk &out, Type type, bool written) {
    if (!array.read(given, job.family) || array.type != type || (written && !array.writable))
        return false;
    if (!job.same_batch(array)) return false;
    walk(out, array, -1);
    return true;
}
Type computing(Type type) { return type == Type::f64 ? Type::f64 : Type::f32; }

// own_scores(input, target, options, first, own, threads=None)
PyObject *own_scores(PyObject *, PyObject *const *args, Py_ssize_t n) {
    if (wrong_count(n, 5, 6)) return nullptr;
    PythonJob job;
    Array own;
    Result result;
    if (!read_part(job, args)) Py_RETURN_NONE;
    if (!read_rows(job, args[4], own, job.call.own, computing(job.input.type), true)) Py_RETURN_NONE;
    if (!run(job, own_block(job.call), argument(args, n, 5), result)) return nullptr;
    Py_INCREF(args[4]);
    return args[4];
}

// part_sums(input, target, options, first, own, sums, slopes or None, threads=None)
PyObject *part_sums(PyObject *, PyObject *const *args, Py_ssize_t n) {
    if (wrong_count(n, 7, 8)) return nullptr;
    PythonJob job;
    Array own, sums, slopes;
    Call &call = job.call;
    if (!read_part(job, args)) Py_RETURN_NONE;
    if (!read_rows(job, args[4], own, call.own, computing(job.input.type), false)) Py_RETURN_NONE;
    if (!read_rows(job, args[5], sums, call.sums, Type::f64, true)) Py_RETURN_NONE;
    bool wanted = args[6] != Py_None;
    if (wanted && !read_rows(job, args[6], slopes, call.slopes, Type::f64, true)) Py_RETURN_NONE;
    Result result;
    if (!run(job, loss_block(call), argument(args, n, 7), result)) return nullptr;
    Py_INCREF(args[5]);
    return args[5];
}

// part_grad(input, target, options, first, (own, slopes, scale), grad, threads=None)
PyObject *part_grad(PyObject *, PyObject *const *args, Py_ssize_t n) {
    if (wrong_count(n, 6, 7)) return nullptr;
    PythonJob job;
    Array own, slopes, scale, grad;
    Call &call = job.call;
    PyObject *rows = args[4];
    if (!PyTuple_CheckExact(rows) || PyTuple_Size(rows) != 3 || !read_part(job, args)) Py_RETURN_NONE;
    Type type = computing(job.input.type);
    if (!read_rows(job, PyTuple_GetItem(rows, 0), own, call.own, type, false)) Py_RETURN_NONE;
    if (!read_rows(job, PyTuple_GetItem(rows, 1), slopes, call.slopes, Type::f64, false)) Py_RETURN_NONE;
    if (!read_rows(job, PyTuple_GetItem(rows, 2), scale, call.upstream, Type::f64, false)) Py_RETURN_NONE;
    if (!grad.read(args[5], job.family) || !job.set_grad(grad)) Py_RETURN_NONE;
    Result result;
    if (!run(job, grad_block(call), argument(args, n, 6), result)) return nullptr;
    Py_INCREF(args[5]);
    return args[5];
}

// An array without gaps, to be written.
template <class T> bool read_contiguous(const Family *family, PyObject *given, Array &array, Type type, int ndim, T *&out) {
    if (!array.read(given, family) || array.type != type || !array.writable || array.ndim != ndim) return false;
    int64_t stride = sizeof(T);
    for (int d = array.ndim; d--; stride *= array.shape[d])
        if (array.strides[d] != stride) return false;
    out = reinterpret_cast<T *>(array.data);
    return reinterpret_cast<uintptr_t>(array.data) % sizeof(T) == 0;
}

// standings(input, target, weight, options, losses or None, (classes, kinds, bins, confused), unit, threads=None)
PyObject *standings(PyObject *, PyObject *const *args, Py_ssize_t n) {
    if (wrong_count(n, 7, 8)) return nullptr;
    PythonJob job;
    Array losses, classes, kinds, bins, confused;
    Call &call = job.call;
    PyObject *rows = args[5];
    if (!PyTuple_CheckExact(rows) || PyTuple_Size(rows) != 4 || !read_real(args[6], call.unit)) Py_RETURN_NONE;
    if (!job.read(args[0], args[1], args[2], args[3]) || job.options.ignores) Py_RETURN_NONE;
    if (job.input.ndim != 2 || job.axis != 1) Py_RETURN_NONE;
    if (call.classes > 1 && call.x.step != size_of(job.input.type)) Py_RETURN_NONE;
    if (args[4] != Py_None && (!losses.read(args[4], job.family) || !job.set_losses(losses))) Py_RETURN_NONE;
    if (!read_contiguous(job.family, PyTuple_GetItem(rows, 0), classes, Type::i64, 2, call.highest)) Py_RETURN_NONE;
    if (!read_contiguous(job.family, PyTuple_GetItem(rows, 1), kinds, Type::u8, 1, call.kinds)) Py_RETURN_NONE;
    if (!read_contiguous(job.family, PyTuple_GetItem(rows, 2), bins, Type::i32, 1, call.bins)) Py_RETURN_NONE;
    if (!read_contiguous(job.family, PyTuple_GetItem(rows, 3), confused, Type::i64, 1, call.confused)) Py_RETURN_NONE;
    for (const Array *array : {&classes, &kinds, &bins, &confused})
        if (array->shape[0] != call.rows) Py_RETURN_NONE;
    if (classes.shape[1] > MAX_HIGHEST || classes.shape[1] > call.classes) Py_RETURN_NONE;
    call.wanted = int(classes.shape[1]);
    if (call.wanted < 1 || (call.wanted < 2 && call.classes > 1)) Py_RETURN_NONE;  // the best may be the target
    Result result;
    if (!run(job, standings_block(call), argument(args, n, 7), result)) return nullptr;
    return Py_NewRef(result.bad ? Py_None : rows);
}

// exact_sums(values, groups, sums)
PyObject *exact_sums(PyObject *, PyObject *const *args, Py_ssize_t n) {
    if (wrong_count(n, 3, 3)) return nullptr;
    const Family *family = family_of(args[0]);
    Array values, groups, sums;
    if (!family || !values.read(args[0], family) || !groups.read(args[1], family)) Py_RETURN_NONE;
    if (values.ndim != 1 || groups.ndim != 1 || values.shape[0] != groups.shape[0]) Py_RETURN_NONE;
    if ((values.type != Type::f64 && values.type != Type::f32) || groups.type != Type::i64) Py_RETURN_NONE;
    uint32_t *digits;
    if (!read_contiguous(family, args[2], sums, Type::u32, 2, digits)) Py_RETURN_NONE;
    if (sums.shape[1] != SUM_DIGITS || values.shape[0] > MOST_SUMMED) Py_RETURN_NONE;
    Walk value, group;
    walk(value, values, -1);
    walk(group, groups, -1);
    bool done = false, memory = true;
    PyThreadState *state = PyEval_SaveThread();
    try {
        done = mml::exact_sums(value, group, values.shape[0], sums.shape[0], digits);
    } catch (const std::bad_alloc &) {
        memory = false;
    }
    PyEval_RestoreThread(state);
    if (!memory) return PyErr_NoMemory();
    return Py_NewRef(done ? args[2] : Py_None);
}

// accept(types, source, empty=None, scalars=None)
PyObject *accept(PyObject *, PyObject *const *args, Py_ssize_t n) {
    if (wrong_count(n, 2, 4)) return nullptr;
    PyObject *types = args[0], *source = args[1], *scalars = argument(args, n, 3);
    if (!PyTuple_Check(types) || (scalars != Py_None && PyTuple_Size(scalars) != 3)) {
        PyErr_SetString(PyExc_TypeError, "types must be a tuple, scalars a tuple of three types");
        return nullptr;
    }
    Family *family = new Family;
    if (PyCapsule_CheckExact(source)) {
        void *pointer = PyCapsule_GetPointer(source, "dlpack_exchange_api");
        if (!pointer) return delete family, nullptr;
        family->exchange = find_exchange(pointer);
        if (!family->exchange) {
            delete family;
            PyErr_SetString(PyExc_ValueError, "the exchange API has no version 1 that reads tensors");
            return nullptr;
        }
    } else if (source != Py_None) {
        family->capsule = Py_NewRef(source);
    }
    if (argument(args, n, 2) != Py_None) family->empty = Py_NewRef(args[2]);
    for (int k = 0; scalars != Py_None && k < 3; k++)
        family->scalars[k] = Py_NewRef(PyTuple_GetItem(scalars, k));
    for (Py_ssize_t k = 0; k < PyTuple_Size(types); k++) {
        PyObject *type = Py_NewRef(PyTuple_GetItem(types, k));
        accepted.push_back({reinterpret_cast<PyTypeObject *>(type), family});
    }
    Py_RETURN_NONE;
}

// connect_pytorch(find) -> bool
PyObject *connect_pytorch(PyObject *, PyObject *const *args, Py_ssize_t n) {
    if (wrong_count(n, 1, 1)) return nullptr;
    const bool done = mml::connect_pytorch([&](const char *name) -> void * {
        Object address(PyObject_CallFunction(args[0], "s", name));
        return address.p && address.p != Py_None ? PyLong_AsVoidPtr(address.p) : nullptr;
    });
    return PyErr_Occurred() ? nullptr : PyBool_FromLong(done);
}

PyObject *supports(PyObject *, PyObject *const *args, Py_ssize_t n) {
    if (wrong_count(n, 1, 1)) return nullptr;
    bool known = PyUnicode_Check(args[0]);
    return PyBool_FromLong(known && (is_string(args[0], "baseline") ||
                                     (is_string(args[0], "x86_64_v3") && has_v3()) ||
                                     (is_string(args[0], "x86_64_v4") && has_v4())));
}
PyObject *source_hash(PyObject *, PyObject *const *, Py_ssize_t) {
    return PyUnicode_FromString(SOURCE_HASH);
}

PyObject *set_limit(PyObject *, PyObject *const *args, Py_ssize_t n) {
    if (wrong_count(n, 1, 1)) return nullptr;
    Object before(limit);
    limit = Py_NewRef(args[0]);
    Py_RETURN_NONE;
}

using Method = PyObject *(*)(PyObject *, PyObject *const *, Py_ssize_t);
template <Method function> PyObject *called(PyObject *self, PyObject *const *args, Py_ssize_t n) {
    Object made(function(self, args, n));
    return PyErr_Occurred() ? nullptr : made.release();
}
#define METHOD(name) \
    {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)(void)>(static_cast<Method>(called<name>))), METH_FASTCALL, nullptr}
PyMethodDef methods[] = {METHOD(accept),    METHOD(loss),       METHOD(loss_and_grad),
                         METHOD(grad),      METHOD(bits_size), METHOD(row_bytes),  METHOD(own_scores),
                         METHOD(part_sums), METHOD(part_grad),  METHOD(standings),  METHOD(exact_sums), METHOD(set_limit),
                         METHOD(supports),  METHOD(source_hash), METHOD(connect_pytorch), {nullptr, nullptr, 0, nullptr}};

#ifndef MODULE
#define MODULE _baseline
#endif
#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

PyModuleDef definition = {PyModuleDef_HEAD_INIT, TEXT(MODULE), nullptr, -1, methods,
                          nullptr, nullptr, nullptr, nullptr};

}  // namespace

int mml::threads_with(long setting) {
    const PyGILState_STATE state = PyGILState_Ensure();
    int threads = -1;
    if (Object number(PyLong_FromLong(setting)); number.p) threads = number_of_threads(number.p);
    if (threads < 0) PyErr_Clear();
    PyGILState_Release(state);
    return threads;
}

PyMODINIT_FUNC JOIN(PyInit_, MODULE)() {
    names = {PyUnicode_InternFromString("is_neg"), PyUnicode_InternFromString("untyped_storage"),
             PyUnicode_InternFromString("nbytes"), PyUnicode_InternFromString("data_ptr"),
             PyUnicode_InternFromString("dtype")};
    for (PyObject *name : {names.is_neg, names.untyped_storage, names.nbytes, names.data_ptr, names.dtype})
        if (!name) return nullptr;
    PyObject *module = PyModule_Create(&definition);
    if (module && PyModule_AddIntConstant(module, "MARK", MARK)) {
        Py_DECREF(module);
        return nullptr;
    }
#ifdef Py_GIL_DISABLED
    if (module) PyUnstable_Module_SetGIL(module, Py_MOD_GIL_NOT_USED);
#endif
    return module;
}
