// The multi-margin loss and its gradient on NVIDIA GPUs: one source for CuPy and PyTorch.
//
// Compiled at run time by NVRTC without any header, once per element type, power and layout:
//   SCALAR   64, 32, 16 (float16) or 17 (bfloat16)
//   POWER    1, 2, or 0 for any other p
//   LAYOUT   1 tiles, 2 rows, 3 wide, 4 split; undefined: all of them
//   CLASSES  for tiles: the number of classes, known to the compiler; undefined: any number
// docs/gpu.md explains the design. The tests compile the same file with g++ under a small
// emulator, tests/backends/cuda/simt.h, which is included first and then supplies what follows
// #ifndef SIMT.

typedef long long i64;
typedef unsigned u32;

#if SCALAR == 64
typedef double Scalar;
typedef double Real;
#elif SCALAR == 32
typedef float Scalar;
typedef float Real;
#else
typedef unsigned short Scalar;
typedef float Real;
#endif

enum {
    V = 16 / sizeof(Scalar),          // elements in 16 bytes
    UNIT = 8,                         // elements whose mask bits make one byte, per lane
    UNIT_VECTORS = UNIT / V,          // 16-byte accesses for them
    UNITS = SCALAR == 64 ? 2 : 4,     // units in flight per lane
    VECTORS = UNITS * UNIT_VECTORS,   // 16-byte loads in flight per lane
    BLOCK = 256,                      // threads of a block, a lane group at most
    TILE_BLOCK = 128,                 // threads of a block that works on tiles
    SUM_BLOCK = 1024,                 // threads of a block that adds what others left
    TILE_LOADS = 8,                   // loads in flight per lane for a tile, at most
    SCRATCH = 32                      // doubles at the start of shared memory, for reductions
};

enum Operation { LOSS, LOSS_MASK, LOSS_GRAD, GRAD_MASK };
enum Kind { ROWS, WIDE, SPLIT };
enum NoClass { BAD = -1, IGNORED = -2 };  // what a target is that names no class

const u32 NO_VALUE = 0xffffffffu;     // a count that says: this row's loss is NaN
const u32 TILE_NO_VALUE = 1u << 31;   // the same in a tile's mask word, C is at most 31 there

// The sum over a row is kept multiplied by DOWN, what is added over rows by DOWN / rows (about): so a
// mean whose sum is beyond float64 is still a number, and so is a sum of weighted losses that are.
const double DOWN = 1.0 / 4294967296.0, UP = 4294967296.0;

// Every field begins a new 8 bytes: so the host packs them.
struct Arguments {
#define FIELD(type, name) alignas(8) type name;
    FIELD(const Scalar*, scores)     // (rows, classes), the classes contiguous
    FIELD(const void*, target)       // (rows,)
    FIELD(const void*, weight)       // (classes,) or null
    FIELD(const void*, upstream)     // gradient for the loss: (rows,), one number, or null for 1
    FIELD(Scalar*, loss)             // (rows,) or one number, or null
    FIELD(double*, scratch)          // counts of kept rows, then sums: see partials_of()
    FIELD(i64*, flag)                // lowered to the first row with a bad target, or null
    FIELD(unsigned char*, mask)      // tiles: a word per row; else two words per row, then bytes
    FIELD(Scalar*, grad)             // (rows, classes), contiguous
    FIELD(i64, rows)
    FIELD(i64, classes)
    FIELD(i64, row_stride)
    FIELD(i64, target_stride)
    FIELD(i64, target_kind)          // bytes per element, negative if unsigned
    FIELD(i64, upstream_stride)
    FIELD(i64, upstream_wide)        // wide: Real, else Scalar
    FIELD(i64, weight_wide)
    FIELD(i64, lanes)                // that share a row: a power of two up to 32, or BLOCK
    FIELD(i64, vector)               // whether scores lie like grad for accesses of 16 bytes
    FIELD(i64, mask_row)             // bytes of mask per row
    FIELD(i64, summed)               // whether loss is one number
    FIELD(i64, ignoring)             // whether there is an ignore_index
    FIELD(i64, ignore_index)
    FIELD(i64, counted)              // blocks that counted the kept rows; 0: nobody had to
    FIELD(i64, blocks)               // whose sums of losses are to be added
    FIELD(i64, splits)               // blocks that share a row
    FIELD(i64, span)                 // vectors of a row for each of them
    FIELD(double, loss_factor)       // UP / classes, times DOWN / rows (about) if losses are added
    FIELD(double, divisor)           // of the sum of losses: DOWN / rows, times rows for the mean
    FIELD(double, grad_factor)       // p / classes, over rows for the mean
    FIELD(Real, margin)
    FIELD(Real, exponent)            // p - 1
#undef FIELD
};

#ifndef SIMT
// `resident` blocks at once on a multiprocessor: the register budget.
#define KERNEL(name, threads, resident, call) \
    extern "C" __global__ void __launch_bounds__(threads, resident) \
        name(const __grid_constant__ Arguments a) { \
        call; \
    }
#define SHARED_MEMORY(name) extern __shared__ __align__(16) double name[]
#define DEVICE __device__ __forceinline__

DEVICE float half_to_float(unsigned short h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}

DEVICE unsigned short float_to_half(float f) {
    unsigned short h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}
#endif

DEVICE float bfloat_to_float(unsigned short b) { return __uint_as_float((u32)b << 16); }

DEVICE unsigned short float_to_bfloat(float f) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    unsigned short b;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(b) : "f"(f));
    return b;
#else
    const u32 bits = __float_as_uint(f);
    if (f != f) return 0x7fff;
    return (unsigned short)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties even
#endif
}

#if SCALAR == 16
DEVICE Real to_real(Scalar s) { return half_to_float(s); }
DEVICE Scalar to_scalar(Real r) { return float_to_half(r); }
#elif SCALAR == 17
DEVICE Real to_real(Scalar s) { return bfloat_to_float(s); }
DEVICE Scalar to_scalar(Real r) { return float_to_bfloat(r); }
#else
DEVICE Real to_real(Scalar s) { return s; }
DEVICE Scalar to_scalar(Real r) { return r; }
#endif

DEVICE Scalar round_once(double d) {
#if SCALAR == 64
    return d;
#else
    return to_scalar((float)d);
#endif
}

DEVICE Real not_a_number() { return (Real)__uint_as_float(0x7fc00000u); }

DEVICE void unpack(const uint4& q, Real (&x)[V]) {
#if SCALAR == 64
    x[0] = __hiloint2double((int)q.y, (int)q.x);
    x[1] = __hiloint2double((int)q.w, (int)q.z);
#else
    const u32 word[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if SCALAR == 32
        x[i] = __uint_as_float(word[i]);
#else
        x[2 * i] = to_real((Scalar)(word[i] & 0xffff));
        x[2 * i + 1] = to_real((Scalar)(word[i] >> 16));
#endif
    }
#endif
}

DEVICE uint4 pack(const Scalar (&s)[V]) {
#if SCALAR == 64
    return make_uint4((u32)__double2loint(s[0]), (u32)__double2hiint(s[0]),
                      (u32)__double2loint(s[1]), (u32)__double2hiint(s[1]));
#elif SCALAR == 32
    return make_uint4(__float_as_uint(s[0]), __float_as_uint(s[1]),
                      __float_as_uint(s[2]), __float_as_uint(s[3]));
#else
    return make_uint4(s[0] | (u32)s[1] << 16, s[2] | (u32)s[3] << 16,
                      s[4] | (u32)s[5] << 16, s[6] | (u32)s[7] << 16);
#endif
}

// ---------------------------------------------------------------------------------------------
// One element: the term of the loss and its slope (without the factor p), both 0 unless z > 0.

#if POWER == 1
typedef u32 Slopes;  // every slope is 1: they are counted
#else
typedef double Slopes;
#endif

struct Sums {
    double loss;
    Slopes slope;
};

// "not z <= 0" keeps NaN, which thus reaches the row's sum without another test.
DEVICE bool is_active(Real z) { return !(z <= 0); }

DEVICE Real positive_part(Real z) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800 && SCALAR != 64
    asm("max.NaN.f32 %0, %0, 0f00000000;" : "+f"(z));  // one instruction instead of two
    return z;
#else
    return is_active(z) ? z : (Real)0;
#endif
}

DEVICE void hinge(Real z, Real exponent, Real& term, Real& slope) {
#if POWER == 1
    slope = is_active(z) ? (Real)1 : (Real)0;
    term = positive_part(z);
#elif POWER == 2
    slope = positive_part(z);
    term = slope * slope;
#else
    const bool active = is_active(z);
#if SCALAR == 64
    slope = active ? pow(z, exponent) : 0;
#else
    slope = active ? powf(z, exponent) : 0;
#endif
    term = active ? z * slope : (Real)0;
#endif
}

// ---------------------------------------------------------------------------------------------
// One target.

DEVICE Real load_real(const void* data, i64 i, i64 wide) {
    return wide ? ((const Real*)data)[i] : to_real(((const Scalar*)data)[i]);
}

// A target's bytes. Nothing is asked of them here: the next loads don't wait for this one.
DEVICE i64 load_target(const Arguments& a, i64 row) {
    const i64 i = row * a.target_stride;
    const i64 bytes = a.target_kind < 0 ? -a.target_kind : a.target_kind;
    if (bytes == 8) return ((const i64*)a.target)[i];
    if (bytes == 4) return ((const u32*)a.target)[i];
    if (bytes == 2) return ((const unsigned short*)a.target)[i];
    return ((const unsigned char*)a.target)[i];
}

// The class that a target names, or why it names none: compared before any narrowing.
DEVICE int class_of(const Arguments& a, i64 y) {
    const int unused = 64 - 8 * (int)(a.target_kind < 0 ? -a.target_kind : a.target_kind);
    if (a.target_kind > 0) y = (i64)((unsigned long long)y << unused) >> unused;
    if (a.ignoring && y == a.ignore_index) return IGNORED;
    return y < 0 || y >= a.classes ? (int)BAD : (int)y;  // unsigned: what is too large is negative
}

DEVICE Real load_weight(const Arguments& a, int y) {
    return a.weight ? load_real(a.weight, y, a.weight_wide) : (Real)1;
}

// What the slopes of a row are multiplied by; `factor` is that of the whole batch. Formed in Real:
// in half precision 1 / (rows * classes) is 0 from 2**25 elements on.
DEVICE Real load_scale(const Arguments& a, i64 row, int y, Real factor) {
    Real scale = factor;
    if (a.upstream) scale *= load_real(a.upstream, row * a.upstream_stride, a.upstream_wide);
    scale *= load_weight(a, y);  // last: large, it would make the product infinite
    return scale;
}

// The loss of a row, in the unit of loss_factor. `sum` is that of its terms, times DOWN.
DEVICE double row_loss(const Arguments& a, int y, Real pivot, double sum) {
    if (y == IGNORED) return 0;
    if (y == BAD || pivot != pivot) return (double)not_a_number();
    return sum * a.loss_factor * (double)load_weight(a, y);
}

// ---------------------------------------------------------------------------------------------
// Sums over lanes, in an order that depends on nothing but the launch.

template <class T>
DEVICE T lane_sum(T value, u32 lanes) {
    for (u32 step = lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    return value;  // the same bits in every lane: addition commutes
}

template <class T>
DEVICE T block_sum(T value, double* shared) {
    value = lane_sum(value, 32);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = (double)value;
    __syncthreads();
    double total = 0;
    for (u32 w = 0; w < blockDim.x / 32; w++) total += shared[w];
    __syncthreads();  // before shared is used again
    return (T)total;
}

// How many rows are not ignored, where the mean needs to know; else 1.
DEVICE double kept_rows(const Arguments& a, double* shared) {
    if (!a.counted) return 1;
    return block_sum(threadIdx.x < a.counted ? a.scratch[threadIdx.x] : 0, shared);
}

// What every gradient is multiplied by.
DEVICE Real batch_factor(const Arguments& a, double kept) {
    return (Real)(a.counted ? a.grad_factor / kept : a.grad_factor);
}

DEVICE double* partials_of(const Arguments& a) { return a.scratch + a.counted; }

// A launch of its own, before the others.
DEVICE void count_kept(const Arguments& a) {
    SHARED_MEMORY(shared);
    const i64 stride = (i64)gridDim.x * blockDim.x;
    double kept = 0;
    for (i64 row = (i64)blockIdx.x * blockDim.x + threadIdx.x; row < a.rows; row += stride)
        kept += class_of(a, load_target(a, row)) != IGNORED;
    kept = block_sum(kept, shared);
    if (threadIdx.x == 0) a.scratch[blockIdx.x] = kept;
}

// The end of a launch that sums losses: one number per block, or the result if there is but one.
DEVICE void finish_block(const Arguments& a, double total, double kept, double* shared) {
    if (!a.summed) return;
    total = block_sum(total, shared);
    if (threadIdx.x != 0) return;
    if (gridDim.x == 1) *a.loss = round_once(total / (a.divisor * kept));
    else partials_of(a)[blockIdx.x] = total;
}

// A launch of its own, after the others. No rows: 0 / 0 is NaN.
DEVICE void sum_partials(const Arguments& a) {
    SHARED_MEMORY(shared);
    const double kept = kept_rows(a, shared);
    const double* partials = partials_of(a);
    double total = 0;
    for (u32 first = threadIdx.x; first < a.blocks; first += 4 * SUM_BLOCK) {
        double part[4];
#pragma unroll
        for (u32 q = 0; q < 4; q++) {
            const u32 i = first + q * SUM_BLOCK;
            part[q] = i < a.blocks ? partials[i] : 0;
        }
        total += (part[0] + part[1]) + (part[2] + part[3]);
    }
    total = block_sum(total, shared);
    if (threadIdx.x == 0) *a.loss = round_once(total / (a.divisor * kept));
}

// ---------------------------------------------------------------------------------------------
// A row shared by a group of lanes.

// In memory it is single elements up to a 16-byte boundary (head), whole vectors (body), and single
// elements again. The boundaries are those of the contiguous gradient, or of the scores where no
// gradient is in play: so the mask depends on nothing but shape, type and target, and a later
// launch can read it. The elements outside the body are "edges", numbered through, and so are those
// of the vector that holds the target's class: thus the body never looks for that class.
struct Row {
    i64 row;
    int y;          // the target's class, or a NoClass
    u32 lane, lanes;
    u32 head, body; // elements, vectors
    u32 own;        // the vector that holds y; not below body if there is none
    u32 edges;
    Real pivot;     // the score at y
    Real scale;     // what slopes are multiplied by, 0 until it is needed
};

DEVICE const Scalar* scores_of(const Arguments& a, const Row& r) {
    return a.scores + r.row * a.row_stride;
}

DEVICE Scalar* grad_of(const Arguments& a, const Row& r) { return a.grad + r.row * a.classes; }

// Beside an infinite margin no score's distance to the target's may be infinite too, as that of two
// finite scores is when it is more than Real can hold.
DEVICE Real pivot_of(Real score, Real margin) {
    return margin - margin == 0 ? score : score * (Real)7.888609052210118e-31;  // 2 ** -100
}

template <int OP>
DEVICE Row row_of(const Arguments& a, i64 row, int y, u32 lane, u32 lanes) {
    Row r = {};
    r.row = row;
    r.y = y;
    r.lane = lane;
    r.lanes = lanes;
    const u32 classes = (u32)a.classes;
    const size_t address = OP == LOSS ? (size_t)scores_of(a, r)
                                      : (size_t)(row * a.classes) * sizeof(Scalar);
    r.head = (u32)((16 - (address & 15)) & 15) / (u32)sizeof(Scalar);
    if (r.head > classes) r.head = classes;
    r.body = (classes - r.head) / V;
    r.own = y < 0 ? ~0u : ((u32)y - r.head) / V;  // below head: wraps, and is beyond the body
    r.edges = classes - r.body * V + (r.own < r.body ? V : 0);
    if (OP != GRAD_MASK && y >= 0) r.pivot = pivot_of(to_real(scores_of(a, r)[y]), a.margin);
    return r;
}

DEVICE u32 edge_column(const Arguments& a, const Row& r, u32 edge) {
    const u32 outside = (u32)a.classes - r.body * V;
    if (edge < r.head) return edge;
    return edge < outside ? edge + r.body * V : r.head + r.own * V + (edge - outside);
}

// The lane that has the target's class among its edges stores there what needed the row's sum.
DEVICE void store_own(const Arguments& a, const Row& r, Scalar value) {
    for (u32 edge = r.lane; edge < r.edges; edge += r.lanes)
        if ((int)edge_column(a, r, edge) == r.y) grad_of(a, r)[r.y] = value;
}

// Each lane writes the addresses that it wrote before: no other order is needed.
DEVICE void fill_row(const Arguments& a, const Row& r, Scalar value) {
    Scalar same[V];
#pragma unroll
    for (int e = 0; e < V; e++) same[e] = value;
    const uint4 q = pack(same);
    Scalar* grad = grad_of(a, r);
    uint4* body = (uint4*)(grad + r.head);
#pragma unroll 1
    for (u32 k = r.lane; k < r.body; k += r.lanes)
        if (k != r.own) body[k] = q;
#pragma unroll 1
    for (u32 e = r.lane; e < r.edges; e += r.lanes) grad[edge_column(a, r, e)] = value;
}

// ---------------------------------------------------------------------------------------------
// The loss of rows shared by 4 to 32 lanes of a warp (ROWS), by a block (WIDE), by blocks (SPLIT).

// Fetches vectors first, first + lanes, ...; those from end on are left as they are.
template <int OP>
DEVICE void load_vectors(const Arguments& a, const Row& r, u32 first, u32 end,
                         uint4 (&raw)[VECTORS]) {
    const Scalar* from = scores_of(a, r) + r.head + (size_t)first * V;
    if (OP == LOSS || a.vector) {
        const uint4* vector = (const uint4*)from;
#pragma unroll
        for (u32 v = 0; v < VECTORS; v++, vector += r.lanes)
            if (first + v * r.lanes < end) raw[v] = __ldg(vector);
        return;
    }
#pragma unroll
    for (u32 v = 0; v < VECTORS; v++, from += r.lanes * V) {
        if (first + v * r.lanes >= end) continue;
        Scalar one[V];
#pragma unroll
        for (int e = 0; e < V; e++) one[e] = from[e];
        raw[v] = pack(one);
    }
}

// Vectors begin to end of the row, of which begin is a multiple of lanes * VECTORS. The first turn's
// are in raw already.
template <int OP>
DEVICE void row_body(const Arguments& a, const Row& r, u32 begin, u32 end, uint4 (&raw)[VECTORS],
                     Sums& sums) {
    uint4* to = (uint4*)(grad_of(a, r) + r.head);
    unsigned char* mask = a.mask + 8 * a.rows + r.row * a.mask_row + r.lane;
    for (u32 start = begin; start < end; start += r.lanes * VECTORS) {
        if (start != begin) load_vectors<OP>(a, r, start + r.lane, end, raw);
        Real loss = 0, slopes = 0;
#pragma unroll
        for (u32 u = 0; u < UNITS; u++) {
            u32 bits = 0;
#pragma unroll
            for (u32 v = u * UNIT_VECTORS; v < (u + 1) * UNIT_VECTORS; v++) {
                const u32 k = start + v * r.lanes + r.lane;
                if (k >= end || k == r.own) continue;
                Real z[V], term[V], slope[V];
                Scalar out[V];
                unpack(raw[v], z);
#pragma unroll
                for (int e = 0; e < V; e++) {
                    z[e] = (z[e] - r.pivot) + a.margin;
                    hinge(z[e], a.exponent, term[e], slope[e]);
                    if (POWER == 1 && OP != LOSS)
                        bits |= (u32)is_active(z[e]) << ((v % UNIT_VECTORS) * V + e);
                    if (OP == LOSS_GRAD)
                        out[e] = to_scalar(slope[e] != 0 ? slope[e] * r.scale : (Real)0);
                }
                if (OP == LOSS_GRAD) to[k] = pack(out);
#pragma unroll
                for (int step = 1; step < V; step *= 2) {  // pairwise, for the rounding error
#pragma unroll
                    for (int e = 0; e < V; e += 2 * step) {
                        term[e] += term[e + step];
                        slope[e] += slope[e + step];
                    }
                }
                loss += term[0];
                if (POWER != 1) slopes += slope[0];
            }
#if POWER == 1
            if (OP != LOSS) sums.slope += (u32)__popc(bits);
#endif
            if (OP == LOSS_MASK && start + u * UNIT_VECTORS * r.lanes < end)
                mask[start / UNIT_VECTORS + u * r.lanes] = (unsigned char)bits;
        }
        sums.loss += (double)loss;
#if POWER != 1
        sums.slope += (double)slopes;
#endif
    }
}

// Returns the lane's bits of the mask: one per edge.
template <int OP>
DEVICE u32 row_edges(const Arguments& a, const Row& r, Sums& sums) {
    u32 bits = 0;
    for (u32 edge = r.lane; edge < r.edges; edge += r.lanes) {
        const u32 j = edge_column(a, r, edge);
        Real z = (to_real(scores_of(a, r)[j]) - r.pivot) + a.margin;
        if ((int)j == r.y) z = -1;
        Real term, slope;
        hinge(z, a.exponent, term, slope);
        sums.loss += (double)term;
        sums.slope += (Slopes)slope;
        if (OP == LOSS_GRAD) grad_of(a, r)[j] = to_scalar(slope != 0 ? slope * r.scale : (Real)0);
        if (OP == LOSS_MASK) bits |= (u32)is_active(z) << edge;
    }
    return bits;
}

// Adds one score's term; both sums are kept times DOWN (a count of slopes is not).
DEVICE void add_score(const Arguments& a, Real score, Real pivot, Sums& sums) {
    Real term, slope;
    hinge((score - pivot) + a.margin, a.exponent, term, slope);
    sums.loss += (double)term * DOWN;
#if POWER != 1
    sums.slope += (double)slope * DOWN;
#endif
}

// The sums once more, in a range that they can't leave: where those in Real overflowed, or a score
// is infinite.
DEVICE Sums sums_again(const Arguments& a, const Row& r, u32 begin, u32 end, bool edges) {
    Sums sums = {0, 0};
#pragma unroll 1
    for (u32 k = begin + r.lane; k < end; k += r.lanes) {
        if (k == r.own) continue;
#pragma unroll 1
        for (u32 j = r.head + k * V; j < r.head + (k + 1) * V; j++)
            add_score(a, to_real(scores_of(a, r)[j]), r.pivot, sums);
    }
#pragma unroll 1
    for (u32 edge = r.lane; edges && edge < r.edges; edge += r.lanes) {
        const u32 j = edge_column(a, r, edge);
        if ((int)j != r.y) add_score(a, to_real(scores_of(a, r)[j]), r.pivot, sums);
    }
    return sums;
}

template <class T>
DEVICE bool is_infinite(T sum) {
    return sum - sum != 0 && sum == sum;
}

template <int KIND, class T>
DEVICE T group_sum(T value, u32 lanes, double* shared) {
    return KIND == ROWS ? lane_sum(value, lanes) : block_sum(value, shared);
}

// The sums over the lanes of a group, times DOWN.
template <int OP, int KIND>
DEVICE Sums settled(const Arguments& a, const Row& r, u32 begin, u32 end, bool edges, Sums sums,
                    double* shared) {
    sums.loss = group_sum<KIND>(sums.loss, r.lanes, shared);
    if (OP != LOSS) sums.slope = group_sum<KIND>(sums.slope, r.lanes, shared);
    const bool infinite = is_infinite(sums.loss)
                          || (OP != LOSS && POWER != 1 && is_infinite(sums.slope));
    sums.loss *= DOWN;
#if POWER != 1
    sums.slope *= DOWN;
#endif
    // Whole warps go in, since they add by shuffles; whole blocks agree by themselves.
    if (KIND == ROWS ? __any_sync(~0u, infinite) : infinite) {
        Sums again = sums_again(a, r, begin, end, edges);
        again.loss = group_sum<KIND>(again.loss, r.lanes, shared);
        if (infinite) sums.loss = again.loss;
#if POWER != 1
        if (OP != LOSS) again.slope = group_sum<KIND>(again.slope, r.lanes, shared);
        if (infinite) sums.slope = again.slope;
#endif
    }
    return sums;
}

DEVICE double own_gradient(Slopes slope, Real scale) {
#if POWER == 1
    return slope > 0 ? -((double)slope * scale) : 0;
#else
    const double whole = slope * UP;  // whose product with a small scale keeps its digits
    return slope != 0 ? -(whole - whole == 0 ? whole * scale : slope * scale * UP) : 0;
#endif
}

// What needs the sums: the gradient at the target's class, and all of it where the loss or the factor
// is NaN.
// Returns the row's loss in the group's first lane, 0 in the others.
template <int OP>
DEVICE double finish_row(const Arguments& a, const Row& r, const Sums& sums) {
    const double loss = row_loss(a, r.y, r.pivot, sums.loss);
    const bool no_value = loss != loss || (OP == LOSS_GRAD && r.y >= 0 && r.scale != r.scale);
    if (OP == LOSS_GRAD) {
        if (no_value) fill_row(a, r, to_scalar(not_a_number()));
        else if (r.y == IGNORED) fill_row(a, r, to_scalar(0));
        else store_own(a, r, round_once(own_gradient(sums.slope, r.scale)));
    }
    if (r.lane != 0) return 0;
    if (OP == LOSS_MASK) ((u32*)a.mask)[2 * r.row] = no_value ? NO_VALUE : (u32)sums.slope;
    if (r.y == BAD && a.flag) atomicMin(a.flag, r.row);
    if (a.loss && !a.summed) a.loss[r.row] = round_once(loss);
    return loss;
}

template <int OP, int KIND>
DEVICE void rows_of_scores(const Arguments& a) {
    SHARED_MEMORY(shared);
    const u32 lanes = KIND == ROWS ? (u32)a.lanes : (u32)BLOCK;
    const u32 lane = threadIdx.x % lanes;
    const u32 per_block = BLOCK / lanes;
    const i64 splits = KIND == SPLIT ? a.splits : 1;
    const i64 parts = a.rows * splits, stride = (i64)gridDim.x * per_block;
    const double kept = kept_rows(a, shared);
    const Real factor = batch_factor(a, kept);
    double block_total = 0;
    i64 part = (i64)blockIdx.x * per_block + threadIdx.x / lanes;
    i64 next = part < parts ? load_target(a, part / splits) : 0;
    // The loop's count is the block's, so that lanes without a row still take part in the sums.
    for (i64 first = (i64)blockIdx.x * per_block; first < parts; first += stride, part += stride) {
        const int y = part < parts ? class_of(a, next) : (int)IGNORED;
        // Asked for one turn ahead, since the score at y is the first thing that a row needs.
        if (part + stride < parts) next = load_target(a, (part + stride) / splits);
        const u32 segment = KIND == SPLIT ? (u32)(part % splits) : 0;
        const i64 row = part < parts ? part / splits : 0;
        Row r = row_of<OP>(a, row, y, lane, lanes);
        // Of a row whose target names no class, nothing is read.
        const u32 begin = KIND == SPLIT ? segment * (u32)a.span : 0;
        u32 end = y < 0 ? 0 : r.body;
        if (KIND == SPLIT && end > begin + (u32)a.span) end = begin + (u32)a.span;
        const bool edges = y >= 0 && segment == 0;
        uint4 raw[VECTORS];
        load_vectors<OP>(a, r, begin + lane, end, raw);
        // Only now, since this waits for what it loads.
        if (OP == LOSS_GRAD && y >= 0) r.scale = load_scale(a, row, y, factor);
        Sums sums = {0, 0};
        row_body<OP>(a, r, begin, end, raw, sums);
        u32 bits = edges ? row_edges<OP>(a, r, sums) : 0;
        if (OP == LOSS_MASK) bits = lane_sum(bits, lanes < 32 ? lanes : 32);  // in the first warp
        sums = settled<OP, KIND>(a, r, begin, end, edges, sums, shared);
        if (part >= parts) continue;
        if (OP == LOSS_MASK && lane == 0 && segment == 0) ((u32*)a.mask)[2 * row + 1] = bits;
        if (KIND != SPLIT) {
            block_total += finish_row<OP>(a, r, sums);
        } else if (lane == 0) {
            partials_of(a)[2 * part] = sums.loss;
            partials_of(a)[2 * part + 1] = (double)sums.slope;
        }
    }
    if (KIND != SPLIT) finish_block(a, block_total, kept, shared);
}

// After rows_of_scores<OP, SPLIT>, one block: a warp adds the parts of a row.
template <int OP>
DEVICE void split_rows(const Arguments& a) {
    SHARED_MEMORY(shared);
    const double kept = kept_rows(a, shared);
    const Real factor = batch_factor(a, kept);
    double block_total = 0;
    for (i64 row = threadIdx.x / 32; row < a.rows; row += SUM_BLOCK / 32) {
        const int y = class_of(a, load_target(a, row));
        Row r = row_of<OP>(a, row, y, threadIdx.x % 32, 32);
        if (OP == LOSS_GRAD && y >= 0) r.scale = load_scale(a, row, y, factor);
        const double* parts = partials_of(a) + 2 * row * a.splits;
        double loss = 0, slope = 0;
        for (i64 i = r.lane; i < a.splits; i += 32) {
            loss += parts[2 * i];
            slope += parts[2 * i + 1];
        }
        const Sums sums = {lane_sum(loss, 32), (Slopes)lane_sum(slope, 32)};
        block_total += finish_row<OP>(a, r, sums);
    }
    finish_block(a, block_total, kept, shared);
}

// A lane's mask bytes for the vectors from start on.
DEVICE void load_bits(const unsigned char* mask, u32 start, u32 end, u32 lanes, u32 (&bits)[UNITS]) {
#pragma unroll
    for (u32 u = 0; u < UNITS; u++)
        if (start + u * UNIT_VECTORS * lanes < end) bits[u] = mask[start / UNIT_VECTORS + u * lanes];
}

// The gradient for p = 1 from the mask. It reads no scores.
template <int KIND>
DEVICE void rows_of_mask(const Arguments& a) {
    SHARED_MEMORY(shared);
    const u32 lanes = KIND == ROWS ? (u32)a.lanes : (u32)BLOCK;
    const u32 lane = threadIdx.x % lanes;
    const u32 per_block = BLOCK / lanes;
    const i64 splits = KIND == SPLIT ? a.splits : 1;
    const double kept = kept_rows(a, shared);
    const Real factor = batch_factor(a, kept);
    for (i64 part = (i64)blockIdx.x * per_block + threadIdx.x / lanes; part < a.rows * splits;
         part += (i64)gridDim.x * per_block) {
        const i64 row = part / splits;
        const u32 segment = KIND == SPLIT ? (u32)(part % splits) : 0;
        const i64 target = load_target(a, row);
        const u32 count = ((const u32*)a.mask)[2 * row], edge_bits = ((const u32*)a.mask)[2 * row + 1];
        const unsigned char* mask = a.mask + 8 * a.rows + row * a.mask_row + lane;
        // The row's bits are asked for before anything is made of its target.
        const u32 begin = KIND == SPLIT ? segment * (u32)a.span : 0;
        const u32 most = (u32)a.classes / V, last = begin + (u32)a.span;
        const u32 end_of_bits = KIND == SPLIT && most > last ? last : most;
        u32 bits[UNITS];
        load_bits(mask, begin, end_of_bits, lanes, bits);

        Row r = row_of<GRAD_MASK>(a, row, class_of(a, target), lane, lanes);
        if (r.y >= 0) r.scale = load_scale(a, row, r.y, factor);
        const u32 end = KIND == SPLIT && r.body > last ? last : r.body;
        const bool ignored = r.y == IGNORED;
        const bool no_value = count == NO_VALUE || (r.y >= 0 && r.scale != r.scale);
        const Real nan = not_a_number();
        const Scalar off = to_scalar(no_value ? nan : (Real)0);
        const Scalar on = ignored ? off : to_scalar(no_value ? nan : r.scale);
        const Scalar own = ignored || no_value ? off : round_once(own_gradient(count, r.scale));
        uint4* to = (uint4*)(grad_of(a, r) + r.head);
        for (u32 start = begin; start < end; start += lanes * VECTORS) {
#pragma unroll
            for (u32 v = 0; v < VECTORS; v++) {
                const u32 k = start + v * lanes + lane;
                Scalar out[V];
#pragma unroll
                for (int e = 0; e < V; e++)
                    out[e] = bits[v / UNIT_VECTORS] >> ((v % UNIT_VECTORS) * V + e) & 1 ? on : off;
                if (k < end && k != r.own) to[k] = pack(out);
            }
            load_bits(mask, start + lanes * VECTORS, end, lanes, bits);
        }
        for (u32 edge = lane; segment == 0 && edge < r.edges; edge += lanes) {
            const u32 j = edge_column(a, r, edge);
            grad_of(a, r)[j] = (int)j == r.y ? own : edge_bits >> edge & 1 ? on : off;
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Small C: a warp carries 32 rows through shared memory, a thread works on one row. Only so are
// both the accesses to memory whole and the lanes all busy when a row is 40 bytes long.

enum { PIECE = 16 / sizeof(Real) };  // elements in 16 bytes of shared memory

// How many of a row's elements a thread reads at once.
DEVICE constexpr int at_once(int classes) {
    return classes % PIECE == 0 ? (int)PIECE : classes % 2 == 0 ? 2 : 1;
}

enum {
#ifdef CLASSES
    AT_ONCE = at_once(CLASSES),
    PER_LANE = (CLASSES + PIECE - 1) / PIECE,  // pieces of a tile
#else
    AT_ONCE = 1,
    PER_LANE = 32 / PIECE,
#endif
    QUADS_AT_ONCE = POWER == 0 ? 1 : 8  // pow() is long enough: unrolled it only spills
};

DEVICE u32 tile_classes(const Arguments& a) {
#ifdef CLASSES
    return CLASSES;
#else
    return (u32)a.classes;
#endif
}

// Where element i of a tile stands. A row of 8 or 16 classes would put every lane of a warp on the
// same banks: pieces of 16 bytes change places within 128 bytes, differently from one such 128 bytes
// to the next. Other rows are read without conflicts as they are, AT_ONCE elements at a time.
DEVICE u32 place(u32 i, u32 classes) {
    const u32 pieces = classes / PIECE;  // of a row
    const u32 swap = classes % PIECE == 0 ? ((pieces & (0u - pieces)) - 1) & 7 : 0;
    return i ^ ((i / PIECE >> 3 & swap) * PIECE);
}

template <int N>
struct alignas(N * sizeof(Real)) Group {
    Real x[N];
};

template <int N>
DEVICE Group<N>& group_at(Real* tile, u32 i, u32 classes) {
    return *(Group<N>*)(tile + place(i, classes));
}

#if SCALAR == 16 || SCALAR == 17
typedef uint2 Raw;  // PIECE elements in memory
DEVICE void unpack(const Raw& raw, Real (&x)[PIECE]) {
    x[0] = to_real((Scalar)(raw.x & 0xffff));
    x[1] = to_real((Scalar)(raw.x >> 16));
    x[2] = to_real((Scalar)(raw.y & 0xffff));
    x[3] = to_real((Scalar)(raw.y >> 16));
}
DEVICE Raw pack_piece(const Scalar (&s)[PIECE]) {
    return make_uint2(s[0] | (u32)s[1] << 16, s[2] | (u32)s[3] << 16);
}
#else
typedef uint4 Raw;
DEVICE Raw pack_piece(const Scalar (&s)[PIECE]) { return pack(s); }
#endif

DEVICE void tile_load(const Arguments& a, i64 first, u32 n, Real* tile) {
    const Scalar* from = a.scores + first * a.row_stride;
    const u32 lane = threadIdx.x % 32, classes = tile_classes(a);
    const u32 pieces = a.vector ? n / PIECE : 0;
    const Raw* mine = (const Raw*)from + lane;
    const int left = (int)pieces - (int)lane;
#pragma unroll
    for (int v0 = 0; v0 < PER_LANE; v0 += TILE_LOADS) {
        Raw raw[TILE_LOADS];
#pragma unroll
        for (int v = 0; v < TILE_LOADS && v0 + v < PER_LANE; v++)
            if ((v0 + v) * 32 < left) raw[v] = __ldg(mine + (v0 + v) * 32);
#pragma unroll
        for (int v = 0; v < TILE_LOADS && v0 + v < PER_LANE; v++) {
            if ((v0 + v) * 32 >= left) continue;
            unpack(raw[v], group_at<PIECE>(tile, ((v0 + v) * 32 + lane) * PIECE, classes).x);
        }
    }
#pragma unroll 4
    for (u32 i = pieces * PIECE + lane; i < n; i += 32)
        tile[place(i, classes)] = to_real(from[i / classes * a.row_stride + i % classes]);
}

DEVICE void tile_store(Scalar* to, u32 n, Real* tile, u32 classes) {
    const u32 lane = threadIdx.x % 32, pieces = n / PIECE;
    const int left = (int)pieces - (int)lane;
#pragma unroll
    for (int v = 0; v < PER_LANE; v++) {
        if (v * 32 >= left) continue;
        const Group<PIECE> group = group_at<PIECE>(tile, (v * 32 + lane) * PIECE, classes);
        Scalar s[PIECE];
#pragma unroll
        for (int e = 0; e < PIECE; e++) s[e] = to_scalar(group.x[e]);
        ((Raw*)to + lane)[v * 32] = pack_piece(s);
    }
    for (u32 i = pieces * PIECE + lane; i < n; i += 32) to[i] = to_scalar(tile[place(i, classes)]);
}

DEVICE void tile_fill(Real* tile, u32 start, u32 classes, Real value) {
#pragma unroll 1
    for (u32 j = 0; j < classes; j++) tile[place(start + j, classes)] = value;
}

// The row's sums once more, from memory, where those in Real overflowed or a score is infinite.
DEVICE Sums tile_sums_again(const Arguments& a, i64 row, int y, Real pivot) {
    const Scalar* scores = a.scores + row * a.row_stride;
    Sums sums = {0, 0};
#pragma unroll 1
    for (int j = 0; j < (int)a.classes; j++)
        if (j != y) add_score(a, to_real(scores[j]), pivot, sums);
    return sums;
}

// One row of a tile; returns its loss, and leaves its gradient in the row's place.
template <int OP>
DEVICE double tile_row(const Arguments& a, i64 row, int y, Real factor, Real* tile, u32 start) {
    const u32 classes = tile_classes(a);
    const int column = y < 0 ? 0 : y;
    const Real margin = a.margin, exponent = a.exponent;
    const Real pivot = pivot_of(tile[place(start + column, classes)], margin);
    const Real scale = OP == LOSS_GRAD ? load_scale(a, row, column, factor) : (Real)0;
    Real losses[4] = {0, 0, 0, 0}, slopes[4] = {0, 0, 0, 0};  // four, for the rounding error
    u32 bits = 0;
#pragma unroll QUADS_AT_ONCE
    for (int quad = 0; quad < (int)classes; quad += 4) {
#pragma unroll
        for (int q = 0; q < 4; q += AT_ONCE) {
            if (quad + q >= (int)classes) continue;
            Group<AT_ONCE>& group = group_at<AT_ONCE>(tile, start + quad + q, classes);
            Group<AT_ONCE> here = group;
#pragma unroll
            for (int e = 0; e < AT_ONCE; e++) {
                const int j = quad + q + e;
                Real z = (here.x[e] - pivot) + margin;
                if (j == y) z = -1;
                Real term, slope;
                hinge(z, exponent, term, slope);
                losses[q + e] += term;
                slopes[q + e] += slope;
                if (OP == LOSS_MASK) bits |= (u32)is_active(z) << j;
                if (OP == LOSS_GRAD) here.x[e] = slope != 0 ? slope * scale : (Real)0;
            }
            if (OP == LOSS_GRAD) group = here;
        }
    }
    const Real total = (losses[0] + losses[1]) + (losses[2] + losses[3]);
    const Real slope = (slopes[0] + slopes[1]) + (slopes[2] + slopes[3]);
    Sums sums = {(double)total * DOWN, (Slopes)(POWER == 1 ? slope : slope * DOWN)};
    const bool infinite = is_infinite(total) || (OP != LOSS && POWER != 1 && is_infinite(slope));
    if (infinite && y >= 0) {
        const Sums again = tile_sums_again(a, row, y, pivot);
        sums.loss = again.loss;
        if (POWER != 1) sums.slope = again.slope;
    }
    const double loss = row_loss(a, y, pivot, sums.loss);
    const bool no_value = loss != loss || (OP == LOSS_GRAD && y >= 0 && scale != scale);
    if (OP == LOSS_MASK)
        ((u32*)a.mask)[row] = no_value ? TILE_NO_VALUE : y == IGNORED ? 0 : bits;
    if (OP == LOSS_GRAD) {
        tile[place(start + column, classes)] = (Real)own_gradient(sums.slope, scale);
        if (no_value || y == IGNORED)
            tile_fill(tile, start, classes, no_value ? not_a_number() : (Real)0);
    }
    if (y == BAD && a.flag) atomicMin(a.flag, row);
    if (a.loss && !a.summed) a.loss[row] = round_once(loss);
    return loss;
}

DEVICE void tile_row_of_mask(const Arguments& a, i64 row, int y, u32 bits, Real factor, Real* tile,
                             u32 start) {
    const u32 classes = tile_classes(a);
    const int column = y < 0 ? 0 : y;
    const Real scale = load_scale(a, row, column, factor);
    const bool no_value = bits == TILE_NO_VALUE || (y >= 0 && scale != scale);
    const Real off = no_value ? not_a_number() : (Real)0;
#ifdef CLASSES
#pragma unroll
#endif
    for (int first = 0; first < (int)classes; first += AT_ONCE) {
        Group<AT_ONCE> here;
#pragma unroll
        for (int e = 0; e < AT_ONCE; e++) here.x[e] = bits >> (first + e) & 1 && !no_value ? scale : off;
        group_at<AT_ONCE>(tile, start + first, classes) = here;
    }
    if (!no_value)
        tile[place(start + column, classes)] = (Real)own_gradient((Slopes)__popc(bits), scale);
}

template <int OP>
DEVICE void tiles(const Arguments& a) {
    SHARED_MEMORY(shared);
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = TILE_BLOCK / 32;
    const u32 classes = tile_classes(a);
    Real* tile = (Real*)(shared + SCRATCH) + warp * 32 * classes;
    const double kept = kept_rows(a, shared);
    const Real factor = batch_factor(a, kept);
    double block_total = 0;
    for (i64 first = ((i64)blockIdx.x * warps + warp) * 32; first < a.rows;
         first += (i64)gridDim.x * warps * 32) {
        const u32 here = a.rows - first < 32 ? (u32)(a.rows - first) : 32;
        const i64 row = first + lane;
        const i64 target = lane < here ? load_target(a, row) : 0;  // looked at after the scores
        u32 bits = 0;
        if (OP == GRAD_MASK && lane < here) bits = ((const u32*)a.mask)[row];
        if (OP != GRAD_MASK) {
            tile_load(a, first, here * classes, tile);
            __syncwarp();
        }
        const int y = class_of(a, target);
        if (lane < here) {
            if (OP == GRAD_MASK) tile_row_of_mask(a, row, y, bits, factor, tile, lane * classes);
            else block_total += tile_row<OP>(a, row, y, factor, tile, lane * classes);
        }
        __syncwarp();
        if (OP == LOSS_GRAD || OP == GRAD_MASK) {
            tile_store(a.grad + first * classes, here * classes, tile, classes);
            __syncwarp();
        }
    }
    if (OP != GRAD_MASK) finish_block(a, block_total, kept, shared);
}

// ---------------------------------------------------------------------------------------------

// Rows of more than 24 classes would spill with the registers that 8 blocks leave.
#if POWER == 0
#define TILES_RESIDENT 4
#elif defined(CLASSES) && CLASSES <= 24
#define TILES_RESIDENT 8
#else
#define TILES_RESIDENT (SCALAR == 64 ? 5 : 7)
#endif
#define ROWS_RESIDENT (POWER == 0 || SCALAR == 64 ? 2 : 3)
#define GRAD_RESIDENT 2

#if !defined(LAYOUT) || LAYOUT == 1
KERNEL(tiles_loss, TILE_BLOCK, TILES_RESIDENT, (tiles<LOSS>(a)))
KERNEL(tiles_loss_grad, TILE_BLOCK, TILES_RESIDENT, (tiles<LOSS_GRAD>(a)))
#if POWER == 1
KERNEL(tiles_loss_mask, TILE_BLOCK, TILES_RESIDENT, (tiles<LOSS_MASK>(a)))
KERNEL(tiles_grad_mask, TILE_BLOCK, TILES_RESIDENT, (tiles<GRAD_MASK>(a)))
#endif
#endif

#if !defined(LAYOUT) || LAYOUT == 2
KERNEL(rows_loss, BLOCK, ROWS_RESIDENT, (rows_of_scores<LOSS, ROWS>(a)))
KERNEL(rows_loss_grad, BLOCK, GRAD_RESIDENT, (rows_of_scores<LOSS_GRAD, ROWS>(a)))
#if POWER == 1
KERNEL(rows_loss_mask, BLOCK, ROWS_RESIDENT, (rows_of_scores<LOSS_MASK, ROWS>(a)))
KERNEL(rows_grad_mask, BLOCK, ROWS_RESIDENT, (rows_of_mask<ROWS>(a)))
#endif
#endif

#if !defined(LAYOUT) || LAYOUT == 3
KERNEL(wide_loss, BLOCK, ROWS_RESIDENT, (rows_of_scores<LOSS, WIDE>(a)))
KERNEL(wide_loss_grad, BLOCK, GRAD_RESIDENT, (rows_of_scores<LOSS_GRAD, WIDE>(a)))
#if POWER == 1
KERNEL(wide_loss_mask, BLOCK, ROWS_RESIDENT, (rows_of_scores<LOSS_MASK, WIDE>(a)))
KERNEL(wide_grad_mask, BLOCK, ROWS_RESIDENT, (rows_of_mask<WIDE>(a)))
#endif
#endif

#if !defined(LAYOUT) || LAYOUT == 4
KERNEL(split_loss, BLOCK, ROWS_RESIDENT, (rows_of_scores<LOSS, SPLIT>(a)))
KERNEL(split_loss_end, SUM_BLOCK, 1, (split_rows<LOSS>(a)))
KERNEL(split_loss_grad, BLOCK, GRAD_RESIDENT, (rows_of_scores<LOSS_GRAD, SPLIT>(a)))
KERNEL(split_loss_grad_end, SUM_BLOCK, 1, (split_rows<LOSS_GRAD>(a)))
#if POWER == 1
KERNEL(split_loss_mask, BLOCK, ROWS_RESIDENT, (rows_of_scores<LOSS_MASK, SPLIT>(a)))
KERNEL(split_loss_mask_end, SUM_BLOCK, 1, (split_rows<LOSS_MASK>(a)))
KERNEL(split_grad_mask, BLOCK, ROWS_RESIDENT, (rows_of_mask<SPLIT>(a)))
#endif
#endif

KERNEL(count, BLOCK, 1, (count_kept(a)))
KERNEL(finish, SUM_BLOCK, 1, (sum_partials(a)))
