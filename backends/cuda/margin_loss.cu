// The multi-margin loss and its gradient on NVIDIA GPUs: one source for CuPy and PyTorch.
//
// Compiled at run time by NVRTC without any header, once per element type, power and layout:
//   SCALAR  64, 32, 16 (float16) or 17 (bfloat16)
//   POWER   1, 2, or 0 for any other p
//   LAYOUT  1 tiles, 2 rows, 3 wide; undefined: all of them
// docs/gpu.md explains the design. The tests compile the same file with g++ under a small
// emulator, tests/gpu/simt.h, which is included first and then supplies what follows #ifndef SIMT.

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
    PERIOD = 128 / sizeof(Real),      // shared memory: one element of padding after so many
    SCRATCH = 32,                     // doubles at the start of shared memory, for reductions
    NONE = -1
};

enum Operation { LOSS, LOSS_MASK, LOSS_GRAD, GRAD_MASK };

const u32 NO_VALUE = 0xffffffffu;     // a count that says: this row's loss is NaN
const u32 TILE_NO_VALUE = 1u << 31;   // the same in a tile's mask word, C is at most 31 there

// Every field begins a new 8 bytes: so the host packs them.
#define FIELDS(F) \
    F(const Scalar*, scores)   /* (rows, classes), the classes contiguous */ \
    F(const void*, target)     /* (rows,) */ \
    F(const void*, weight)     /* (classes,) or null */ \
    F(const void*, upstream)   /* gradient for the loss: (rows,), one number, or null for 1 */ \
    F(Scalar*, loss)           /* (rows,) or null */ \
    F(double*, partials)       /* (blocks,) or null: the sum of each block's losses */ \
    F(Scalar*, result)         /* the reduced loss */ \
    F(i64*, flag)              /* lowered to the first row with a bad target, or null */ \
    F(unsigned char*, mask)    /* rows * mask_row bytes */ \
    F(u32*, counts)            /* (rows,): active classes, or NO_VALUE */ \
    F(Scalar*, grad)           /* (rows, classes), contiguous */ \
    F(i64, rows) F(i64, classes) F(i64, row_stride) \
    F(i64, target_stride) F(i64, target_kind)      /* bytes per element, negative if unsigned */ \
    F(i64, upstream_stride) F(i64, upstream_wide)  /* wide: Real, else Scalar */ \
    F(i64, weight_wide) \
    F(i64, lanes)              /* that share a row: a power of two up to 32, or BLOCK */ \
    F(i64, vector)             /* whether scores lie like grad for accesses of 16 bytes */ \
    F(i64, mask_row)           /* bytes of mask per row */ \
    F(i64, blocks)             /* of the launch whose partials are summed */ \
    F(double, loss_factor)     /* 1 / classes */ \
    F(double, divisor)         /* rows for the mean, else 1 */ \
    F(Real, margin) F(Real, exponent)  /* p - 1 */
// and, after the last comma: Real grad_factor, p / classes, over rows for the mean

#define MEMBER(type, name) alignas(8) type name;
struct Arguments {
    FIELDS(MEMBER)
    alignas(8) Real grad_factor;
};

#ifndef SIMT
// Blocks resident at once: the register budget. Left alone, ptxas spills a few bytes for more.
#define ROWS_RESIDENT (POWER == 0 || SCALAR == 64 ? 2 : 3)
#define TILES_RESIDENT (POWER == 0 && SCALAR == 64 ? 6 : 8)
#define PARAMETER(type, name) type name,
#define VALUE(type, name) name,
#define KERNEL(name, threads, call) \
    extern "C" __global__ void __launch_bounds__(threads, threads == BLOCK ? ROWS_RESIDENT : TILES_RESIDENT) \
        name(FIELDS(PARAMETER) Real grad_factor) { \
        const Arguments a = {FIELDS(VALUE) grad_factor}; \
        call; \
    }
#define SHARED_MEMORY(name) extern __shared__ double name[]
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
typedef u32 Slopes;        // every slope is 1: they are counted
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
// One row.

DEVICE Real load_real(const void* data, i64 i, i64 wide) {
    return wide ? ((const Real*)data)[i] : to_real(((const Scalar*)data)[i]);
}

// The target class, or NONE where it is out of range: compared before any narrowing.
DEVICE int load_target(const Arguments& a, i64 row) {
    const i64 i = row * a.target_stride;
    const int bits = (int)(a.target_kind < 0 ? -a.target_kind : a.target_kind) * 8;
    i64 y;
    switch (bits) {
        case 64: y = ((const i64*)a.target)[i]; break;  // unsigned: what is too large is negative
        case 32: y = ((const u32*)a.target)[i]; break;
        case 16: y = ((const unsigned short*)a.target)[i]; break;
        default: y = ((const unsigned char*)a.target)[i]; break;
    }
    if (a.target_kind > 0) y = (i64)((unsigned long long)y << (64 - bits)) >> (64 - bits);
    return y < 0 || y >= a.classes ? (int)NONE : (int)y;
}

DEVICE Real load_weight(const Arguments& a, int y) {
    return a.weight ? load_real(a.weight, y, a.weight_wide) : (Real)1;
}

// Formed in Real: in half precision 1 / (rows * classes) is 0 from 2**25 elements on.
DEVICE Real load_scale(const Arguments& a, i64 row, int y) {
    Real scale = load_weight(a, y) * a.grad_factor;
    if (a.upstream) scale *= load_real(a.upstream, row * a.upstream_stride, a.upstream_wide);
    return scale;
}

DEVICE void report_target(const Arguments& a, i64 row) {
    if (a.flag) atomicMin(a.flag, row);
}

// A row in memory: single elements up to a 16-byte boundary (head), whole vectors (body), and
// single elements again. Elements outside the body are "edges", numbered through. The boundaries
// are those of the contiguous gradient, or of the scores where no gradient is in play: so the mask
// depends on nothing but shape and type, and a later launch can read it.
struct Span {
    u32 head, body;
};

DEVICE Span span_of(const Arguments& a, size_t address) {
    Span s;
    s.head = (u32)((16 - (address & 15)) & 15) / (u32)sizeof(Scalar);
    if (s.head > (u32)a.classes) s.head = (u32)a.classes;
    s.body = ((u32)a.classes - s.head) / V;
    return s;
}

DEVICE Span span_of_gradient(const Arguments& a, i64 row) {
    return span_of(a, (size_t)(row * a.classes) * sizeof(Scalar));
}

// The vector that holds class y; not below s.body if y lies in an edge, or is NONE.
DEVICE u32 own_vector(const Span& s, int y) { return ((u32)y - s.head) / V; }

DEVICE u32 edges(const Arguments& a, const Span& s) { return (u32)a.classes - s.body * V; }

DEVICE u32 edge_column(const Span& s, u32 edge) {
    return edge < s.head ? edge : edge + s.body * V;
}

DEVICE void store_own(const Span& s, Scalar* grad, u32 lane, u32 lanes, int y, Scalar value) {
    const u32 vector = own_vector(s, y);
    const u32 edge = (u32)y < s.head ? (u32)y : (u32)y - s.body * V;
    if ((vector < s.body ? vector : edge) % lanes == lane) grad[y] = value;
}

// Each lane writes the addresses that it wrote before: no other order is needed.
DEVICE void fill_row(const Arguments& a, const Span& s, Scalar* grad, u32 lane, u32 lanes,
                     Scalar value) {
    Scalar same[V];
#pragma unroll
    for (int e = 0; e < V; e++) same[e] = value;
    const uint4 q = pack(same);
    uint4* body = (uint4*)(grad + s.head);
#pragma unroll 1
    for (u32 k = lane; k < s.body; k += lanes) body[k] = q;
#pragma unroll 1
    for (u32 e = lane; e < edges(a, s); e += lanes) grad[edge_column(s, e)] = value;
}

// ---------------------------------------------------------------------------------------------
// Sums over lanes, in an order that depends on nothing but the launch.

template <class T>
DEVICE T lane_sum(T value, u32 lanes) {
    for (u32 step = lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    return value;  // the same bits in every lane: addition commutes
}

template <class T>
DEVICE T block_sum(T value, double* scratch) {
    value = lane_sum(value, 32);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = (double)value;
    __syncthreads();
    double total = 0;
    for (u32 w = 0; w < blockDim.x / 32; w++) total += scratch[w];
    __syncthreads();  // before scratch is used again
    return (T)total;
}

// The end of a launch that sums losses: one number per block, or the result if there is but one.
DEVICE void finish_block(const Arguments& a, double total, double* scratch) {
    if (!a.partials && !a.result) return;
    total = block_sum(total, scratch);
    if (threadIdx.x != 0) return;
    if (gridDim.x == 1) *a.result = round_once(total / a.divisor);
    else a.partials[blockIdx.x] = total;
}

DEVICE void sum_partials(const Arguments& a) {
    SHARED_MEMORY(scratch);
    double total = 0;
    for (i64 i = threadIdx.x; i < a.blocks; i += blockDim.x) total += a.partials[i];
    total = block_sum(total, scratch);
    if (threadIdx.x == 0) *a.result = round_once(total / a.divisor);  // no rows: 0 / 0 is NaN
}

// ---------------------------------------------------------------------------------------------
// Rows shared by a group of lanes: 4 to 32 of a warp, or (WIDE) a whole block.

// Fetches vectors first, first + lanes, ...; those from s.body on are left as they are.
template <int OP>
DEVICE void load_vectors(const Arguments& a, const Span& s, const Scalar* scores, u32 first,
                         u32 lanes, uint4 (&raw)[VECTORS]) {
    const Scalar* from = scores + s.head;
    if (OP == LOSS || a.vector) {
#pragma unroll
        for (u32 v = 0; v < VECTORS; v++) {
            const u32 k = first + v * lanes;
            if (k < s.body) raw[v] = __ldg((const uint4*)from + k);
        }
        return;
    }
#pragma unroll
    for (u32 v = 0; v < VECTORS; v++) {
        const u32 k = first + v * lanes;
        if (k >= s.body) continue;
        Scalar one[V];
#pragma unroll
        for (int e = 0; e < V; e++) one[e] = from[k * V + e];
        raw[v] = pack(one);
    }
}

template <int OP>
DEVICE void row_body(const Arguments& a, const Span& s, i64 row, int y, u32 lane, u32 lanes,
                     Real pivot, Real scale, const Scalar* scores, Scalar* grad, Sums& sums) {
    const Real margin = a.margin, exponent = a.exponent;
    uint4* to = (uint4*)(grad + s.head);
    const u32 own = own_vector(s, y);
    u32 unit = 0;
    for (u32 start = 0; start < s.body; start += lanes * VECTORS, unit += UNITS) {
        uint4 raw[VECTORS];
        load_vectors<OP>(a, s, scores, start + lane, lanes, raw);
        Real loss = 0, slopes = 0;
#pragma unroll
        for (u32 u = 0; u < UNITS; u++) {
            u32 bits = 0;
#pragma unroll
            for (u32 v = u * UNIT_VECTORS; v < (u + 1) * UNIT_VECTORS; v++) {
                const u32 k = start + v * lanes + lane;
                if (k >= s.body) continue;
                Real z[V];
                unpack(raw[v], z);
#pragma unroll
                for (int e = 0; e < V; e++) z[e] = (z[e] - pivot) + margin;
                if (k == own) {
                    const int own_element = (y - (int)s.head) % V;
#pragma unroll
                    for (int e = 0; e < V; e++) z[e] = e == own_element ? (Real)-1 : z[e];
                }
                Real term[V], slope[V];
                Scalar out[V];
#pragma unroll
                for (int e = 0; e < V; e++) {
                    hinge(z[e], exponent, term[e], slope[e]);
                    if (POWER == 1 && OP != LOSS)
                        bits |= (u32)is_active(z[e]) << ((v % UNIT_VECTORS) * V + e);
                    if (OP == LOSS_GRAD)
                        out[e] = to_scalar(is_active(z[e]) ? slope[e] * scale : (Real)0);
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
            if (OP == LOSS_MASK && start + u * UNIT_VECTORS * lanes < s.body)
                a.mask[row * a.mask_row + (i64)(unit + u) * lanes + lane] = (unsigned char)bits;
        }
        sums.loss += (double)loss;
#if POWER != 1
        sums.slope += (double)slopes;
#endif
    }
}

// The mask's bytes of a row: those of the body's units, then those of its edges, UNIT elements of
// one lane to a byte.
DEVICE i64 edge_byte(const Span& s, u32 turn, u32 lane, u32 lanes) {
    const u32 per_unit = lanes * UNIT_VECTORS;
    const u32 units = (s.body + per_unit - 1) / per_unit;
    return (i64)(units + turn / UNIT) * lanes + lane;
}

template <int OP>
DEVICE void row_edges(const Arguments& a, const Span& s, i64 row, int y, u32 lane, u32 lanes,
                      Real pivot, Real scale, const Scalar* scores, Scalar* grad, Sums& sums) {
    u32 turn = 0, bits = 0;
    for (u32 edge = lane; edge < edges(a, s); edge += lanes, turn++) {
        const u32 j = edge_column(s, edge);
        Real z = (to_real(scores[j]) - pivot) + a.margin;
        if ((int)j == y) z = -1;
        Real term, slope;
        hinge(z, a.exponent, term, slope);
        sums.loss += (double)term;
        sums.slope += (Slopes)slope;
        if (OP == LOSS_GRAD) grad[j] = to_scalar(is_active(z) ? slope * scale : (Real)0);
        if (OP == LOSS_MASK) {
            bits |= (u32)is_active(z) << (turn % UNIT);
            if (turn % UNIT == UNIT - 1 || edge + lanes >= edges(a, s)) {
                a.mask[row * a.mask_row + edge_byte(s, turn, lane, lanes)] = (unsigned char)bits;
                bits = 0;
            }
        }
    }
}

template <int OP, bool WIDE>
DEVICE void rows_of_scores(const Arguments& a) {
    SHARED_MEMORY(scratch);
    const u32 lanes = WIDE ? (u32)BLOCK : (u32)a.lanes;
    const u32 lane = threadIdx.x % lanes;
    const u32 per_block = BLOCK / lanes;
    const i64 stride = (i64)gridDim.x * per_block;
    double block_total = 0;
    i64 row = (i64)blockIdx.x * per_block + threadIdx.x / lanes;
    int next = row < a.rows ? load_target(a, row) : (int)NONE;
    // The loop's count is the block's, so that lanes without a row still take part in the sums.
    for (i64 first = (i64)blockIdx.x * per_block; first < a.rows; first += stride, row += stride) {
        const bool here = row < a.rows;
        const int y = next;  // loaded one turn ahead: the score at y is the next thing needed
        next = row + stride < a.rows ? load_target(a, row + stride) : (int)NONE;
        Span s = {0, 0};
        const Scalar* scores = 0;
        Scalar* grad = 0;
        Real pivot = 0, scale = 0;
        if (here) {
            scores = a.scores + row * a.row_stride;
            if (OP == LOSS_GRAD) grad = a.grad + row * a.classes;
            s = OP == LOSS ? span_of(a, (size_t)scores) : span_of_gradient(a, row);
            pivot = to_real(scores[y < 0 ? 0 : y]);
            if (OP == LOSS_GRAD) scale = load_scale(a, row, y < 0 ? 0 : y);
        }
        Sums sums = {0, 0};
        row_body<OP>(a, s, row, y, lane, lanes, pivot, scale, scores, grad, sums);
        if (here) row_edges<OP>(a, s, row, y, lane, lanes, pivot, scale, scores, grad, sums);
        sums.loss = WIDE ? block_sum(sums.loss, scratch) : lane_sum(sums.loss, lanes);
        if (OP != LOSS) sums.slope = WIDE ? block_sum(sums.slope, scratch) : lane_sum(sums.slope, lanes);
        if (!here) continue;

        const bool no_value = y < 0 || sums.loss != sums.loss || pivot != pivot;
        if (OP == LOSS_GRAD) {
            if (no_value) {
                fill_row(a, s, grad, lane, lanes, to_scalar(not_a_number()));
            } else {
                const double own = sums.slope > 0 ? -(double)sums.slope * scale : 0;
                store_own(s, grad, lane, lanes, y, round_once(own));
            }
        }
        if (lane != 0) continue;
        if (y < 0) report_target(a, row);
        if (OP == LOSS_MASK) a.counts[row] = no_value ? NO_VALUE : (u32)sums.slope;
        const double loss = no_value ? (double)not_a_number()
                                     : sums.loss * a.loss_factor * load_weight(a, y);
        if (a.loss) a.loss[row] = round_once(loss);
        block_total += loss;
    }
    finish_block(a, block_total, scratch);
}

// The gradient for p = 1 from the mask. It reads no scores.
template <bool WIDE>
DEVICE void rows_of_mask(const Arguments& a) {
    const u32 lanes = WIDE ? (u32)BLOCK : (u32)a.lanes;
    const u32 lane = threadIdx.x % lanes;
    const u32 per_block = BLOCK / lanes;
    for (i64 row = (i64)blockIdx.x * per_block + threadIdx.x / lanes; row < a.rows;
         row += (i64)gridDim.x * per_block) {
        const int y = load_target(a, row);
        const u32 count = a.counts[row];
        Scalar* grad = a.grad + row * a.classes;
        const Span s = span_of_gradient(a, row);
        if (count == NO_VALUE) {
            fill_row(a, s, grad, lane, lanes, to_scalar(not_a_number()));
            continue;
        }
        const unsigned char* mask = a.mask + row * a.mask_row;
        const Real scale = load_scale(a, row, y);
        const Scalar on = to_scalar(scale), off = to_scalar(0);
        const Scalar own = round_once(count > 0 ? -(double)count * scale : 0);
        uint4* to = (uint4*)(grad + s.head);
        u32 unit = 0;
        for (u32 start = 0; start < s.body; start += lanes * VECTORS, unit += UNITS) {
            u32 bits[UNITS];
#pragma unroll
            for (u32 u = 0; u < UNITS; u++) {
                const bool any = start + u * UNIT_VECTORS * lanes < s.body;
                bits[u] = any ? mask[(i64)(unit + u) * lanes + lane] : 0;
            }
#pragma unroll
            for (u32 v = 0; v < VECTORS; v++) {
                const u32 k = start + v * lanes + lane;
                if (k >= s.body) continue;
                Scalar out[V];
#pragma unroll
                for (int e = 0; e < V; e++)
                    out[e] = bits[v / UNIT_VECTORS] >> ((v % UNIT_VECTORS) * V + e) & 1 ? on : off;
                to[k] = pack(out);
            }
        }
        u32 turn = 0;
        for (u32 edge = lane; edge < edges(a, s); edge += lanes, turn++) {
            const u32 byte = mask[edge_byte(s, turn, lane, lanes)];
            grad[edge_column(s, edge)] = byte >> (turn % UNIT) & 1 ? on : off;
        }
        store_own(s, grad, lane, lanes, y, own);
    }
}

// ---------------------------------------------------------------------------------------------
// Small C: a warp carries 32 rows through shared memory, a thread works on one row. Only so are
// both the accesses to memory whole and the lanes all busy when a row is 40 bytes long.

DEVICE u32 padded(u32 i) { return i + i / PERIOD; }

DEVICE void tile_load(const Arguments& a, i64 first, u32 n, Real* tile) {
    const Scalar* from = a.scores + first * a.row_stride;
    const u32 lane = threadIdx.x % 32, classes = (u32)a.classes;
    const u32 vectors = a.vector ? n / V : 0;
#pragma unroll 4
    for (u32 k = lane; k < vectors; k += 32) {
        Real x[V];
        unpack(__ldg((const uint4*)from + k), x);
#pragma unroll
        for (int e = 0; e < V; e++) tile[padded(k * V + e)] = x[e];
    }
    for (u32 i = vectors * V + lane; i < n; i += 32)
        tile[padded(i)] = to_real(from[i / classes * a.row_stride + i % classes]);
}

DEVICE void tile_store(Scalar* to, u32 n, const Real* tile) {
    const u32 lane = threadIdx.x % 32, vectors = n / V;
#pragma unroll 4
    for (u32 k = lane; k < vectors; k += 32) {
        Scalar s[V];
#pragma unroll
        for (int e = 0; e < V; e++) s[e] = to_scalar(tile[padded(k * V + e)]);
        ((uint4*)to)[k] = pack(s);
    }
    for (u32 i = vectors * V + lane; i < n; i += 32) to[i] = to_scalar(tile[padded(i)]);
}

// One row of a tile; returns its loss, and leaves its gradient in the row's place.
template <int OP>
DEVICE double tile_row(const Arguments& a, i64 row, Real* tile, u32 start) {
    const int y = load_target(a, row);
    const int column = y < 0 ? 0 : y;
    const int classes = (int)a.classes;
    const Real pivot = tile[padded(start + column)];
    const Real margin = a.margin, exponent = a.exponent;
    const Real scale = OP == LOSS_GRAD ? load_scale(a, row, column) : (Real)0;
    Real losses[4] = {0, 0, 0, 0}, slopes[4] = {0, 0, 0, 0};  // four, for the rounding error
    u32 bits = 0;
    for (int j0 = 0; j0 < classes; j0 += 4) {
#pragma unroll
        for (int q = 0; q < 4; q++) {
            const int j = j0 + q;
            if (j >= classes) continue;
            Real& place = tile[padded(start + j)];
            Real z = (place - pivot) + margin;
            if (j == y) z = -1;
            Real term, slope;
            hinge(z, exponent, term, slope);
            losses[q] += term;
            slopes[q] += slope;
            if (OP == LOSS_MASK) bits |= (u32)is_active(z) << j;
            if (OP == LOSS_GRAD) place = is_active(z) ? slope * scale : (Real)0;
        }
    }
    const Real total = (losses[0] + losses[1]) + (losses[2] + losses[3]);
    const Real slope = (slopes[0] + slopes[1]) + (slopes[2] + slopes[3]);
    const bool no_value = y < 0 || total != total || pivot != pivot;
    if (OP == LOSS_MASK) ((u32*)a.mask)[row] = no_value ? TILE_NO_VALUE : bits;
    if (OP == LOSS_GRAD) {
        tile[padded(start + column)] = slope > 0 ? -slope * scale : (Real)0;
        if (no_value)
            for (int j = 0; j < classes; j++) tile[padded(start + j)] = not_a_number();
    }
    if (y < 0) report_target(a, row);
    const double loss = no_value ? (double)not_a_number()
                                 : (double)total * a.loss_factor * load_weight(a, y);
    if (a.loss) a.loss[row] = round_once(loss);
    return loss;
}

DEVICE double tile_row_of_mask(const Arguments& a, i64 row, Real* tile, u32 start) {
    const u32 bits = ((const u32*)a.mask)[row];
    const int classes = (int)a.classes;
    if (bits == TILE_NO_VALUE) {
        for (int j = 0; j < classes; j++) tile[padded(start + j)] = not_a_number();
        return 0;
    }
    const int y = load_target(a, row);
    const Real scale = load_scale(a, row, y);
    for (int j = 0; j < classes; j++)
        tile[padded(start + j)] = bits >> j & 1 ? scale : (Real)0;
    tile[padded(start + y)] = bits ? -(Real)__popc(bits) * scale : (Real)0;
    return 0;
}

template <int OP>
DEVICE void tiles(const Arguments& a) {
    SHARED_MEMORY(scratch);
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = TILE_BLOCK / 32;
    const u32 classes = (u32)a.classes;
    Real* tile = (Real*)(scratch + SCRATCH) + warp * (padded(32 * classes) + 1);
    double block_total = 0;
    for (i64 first = ((i64)blockIdx.x * warps + warp) * 32; first < a.rows;
         first += (i64)gridDim.x * warps * 32) {
        const u32 here = a.rows - first < 32 ? (u32)(a.rows - first) : 32;
        if (OP != GRAD_MASK) {
            tile_load(a, first, here * classes, tile);
            __syncwarp();
        }
        if (lane < here) {
            if (OP == GRAD_MASK) tile_row_of_mask(a, first + lane, tile, lane * classes);
            else block_total += tile_row<OP>(a, first + lane, tile, lane * classes);
        }
        __syncwarp();
        if (OP == LOSS_GRAD || OP == GRAD_MASK) {
            tile_store(a.grad + first * a.classes, here * classes, tile);
            __syncwarp();
        }
    }
    if (OP != GRAD_MASK) finish_block(a, block_total, scratch);
}

// ---------------------------------------------------------------------------------------------

#if !defined(LAYOUT) || LAYOUT == 1
KERNEL(tiles_loss, TILE_BLOCK, (tiles<LOSS>(a)))
KERNEL(tiles_loss_grad, TILE_BLOCK, (tiles<LOSS_GRAD>(a)))
#if POWER == 1
KERNEL(tiles_loss_mask, TILE_BLOCK, (tiles<LOSS_MASK>(a)))
KERNEL(tiles_grad_mask, TILE_BLOCK, (tiles<GRAD_MASK>(a)))
#endif
#endif

#if !defined(LAYOUT) || LAYOUT == 2
KERNEL(rows_loss, BLOCK, (rows_of_scores<LOSS, false>(a)))
KERNEL(rows_loss_grad, BLOCK, (rows_of_scores<LOSS_GRAD, false>(a)))
#if POWER == 1
KERNEL(rows_loss_mask, BLOCK, (rows_of_scores<LOSS_MASK, false>(a)))
KERNEL(rows_grad_mask, BLOCK, (rows_of_mask<false>(a)))
#endif
#endif

#if !defined(LAYOUT) || LAYOUT == 3
KERNEL(wide_loss, BLOCK, (rows_of_scores<LOSS, true>(a)))
KERNEL(wide_loss_grad, BLOCK, (rows_of_scores<LOSS_GRAD, true>(a)))
#if POWER == 1
KERNEL(wide_loss_mask, BLOCK, (rows_of_scores<LOSS_MASK, true>(a)))
KERNEL(wide_grad_mask, BLOCK, (rows_of_mask<true>(a)))
#endif
#endif

KERNEL(finish, BLOCK, (sum_partials(a)))
