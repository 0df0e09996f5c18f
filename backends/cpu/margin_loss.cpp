// The kernels: rows of scores in, sums and gradients out, on one thread.
//
// Rows are walked in vectors of the machine's width, the last of which overlaps the one before: so
// no row ends in single steps. The target's class is left out by comparing indices. No fast-math:
// the order (x_j - x_y) + margin and of all additions is as written. A lane adds at most LANE_TERMS
// numbers in float32, then the sum goes to float64; where float32 overflowed, the row is summed again
// in float64.
#include "margin_loss.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))

namespace mml {
namespace {

#ifdef __AVX2__
constexpr int WIDTH = 32;  // bytes of a vector
#else
constexpr int WIDTH = 16;
#endif
constexpr int LANE_TERMS = 16;
constexpr int GROUP = 64;         // rows whose targets are looked up together, at most
constexpr int64_t NEAR = 4096;    // bytes of rows that are
constexpr int64_t AHEAD = 6144;     // bytes from what is read to what is fetched, about
constexpr int64_t STAGE = 1 << 17;  // bytes of rows that are copied together
constexpr int64_t JOINED = 1 << 15;  // of rows that are put together from pieces: the nearest cache
constexpr double LARGE = 0x1p64;  // the unit in which sums that overflow float64 are kept
constexpr double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();
constexpr int32_t OUTSIDE = -1, IGNORED = -2;

template <class S, int N> struct Vector { typedef S type __attribute__((vector_size(sizeof(S) * N))); };
template <class S, int N> using Vec = typename Vector<S, N>::type;

template <class T> INLINE T read(const void *p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
}
template <class T> INLINE void write(void *p, const T &value) { std::memcpy(p, &value, sizeof value); }
template <class To, class From> INLINE To bits_as(From x) { return (To)x; }  // of vectors
template <class To, class From> INLINE To convert(From x) {
    if constexpr (std::is_same<To, From>::value) return x;
    else return __builtin_convertvector(x, To);
}

// ---- Elements. The bits of 16-bit floats, told apart by type.

struct Half {
    uint16_t bits;
};
struct Brain {
    uint16_t bits;
};

// 16-bit numbers to 32 bits and back. GCC 12 takes them one by one.
template <int N> INLINE Vec<uint32_t, N> from_16_bits(const char *p) {
#ifdef __AVX2__
    if constexpr (N == 8) return bits_as<Vec<uint32_t, N>>(_mm256_cvtepu16_epi32(read<__m128i>(p)));
#endif
    return convert<Vec<uint32_t, N>>(read<Vec<uint16_t, N>>(p));
}
template <int N> INLINE Vec<uint16_t, N> to_16_bits(Vec<uint32_t, N> x) {
#ifdef __AVX2__
    if constexpr (N == 8) {
        __m256i bits = bits_as<__m256i>(x);
        return bits_as<Vec<uint16_t, N>>(_mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1)));
    }
#endif
    return convert<Vec<uint16_t, N>>(x);
}

// N elements as float32, or as they are where they are float64.
template <int N> INLINE Vec<double, N> load(const char *p, double) { return read<Vec<double, N>>(p); }
template <int N> INLINE Vec<float, N> load(const char *p, float) { return read<Vec<float, N>>(p); }
template <int N> INLINE Vec<float, N> load(const char *p, Brain) {
    auto bits = from_16_bits<N>(p) << 16;
    return bits_as<Vec<float, N>>(bits);
}
template <int N> INLINE Vec<float, N> load(const char *p, Half) {
#ifdef __F16C__
    if constexpr (N == 8) return bits_as<Vec<float, N>>(_mm256_cvtph_ps(read<__m128i>(p)));
    if constexpr (N == 4) {
        __m128i bits = _mm_cvtsi64_si128(read<int64_t>(p));
        return bits_as<Vec<float, N>>(_mm_cvtph_ps(bits));
    }
#endif
    // Exponent and mantissa move to their places in a float32; times 2**112 mends the exponent's bias
    // and normalises subnormals; infinity and NaN get the full exponent.
    auto bits = from_16_bits<N>(p);
    auto moved = (bits & 0x7fff) << 13;
    auto finite = bits_as<Vec<uint32_t, N>>(bits_as<Vec<float, N>>(moved) * 0x1p112f);
    auto special = bits_as<Vec<uint32_t, N>>(moved >= 0x0f800000) & 0x7f800000;
    return bits_as<Vec<float, N>>(finite | special | (bits & 0x8000) << 16);
}

// The bits of N numbers rounded to the element type, to nearest even.
template <int N> INLINE Vec<double, N> round_to(Vec<double, N> x, double) { return x; }
template <int N> INLINE Vec<float, N> round_to(Vec<float, N> x, float) { return x; }
template <int N> INLINE Vec<uint16_t, N> round_to(Vec<float, N> x, Brain) {
    auto bits = bits_as<Vec<uint32_t, N>>(x);
    auto nan = bits_as<Vec<uint32_t, N>>(x != x);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & ~nan;
    return to_16_bits<N>((bits | (nan & 0x7fc00000)) >> 16);
}
template <int N> INLINE Vec<uint16_t, N> round_to(Vec<float, N> x, Half) {
#ifdef __F16C__
    if constexpr (N == 8) return bits_as<Vec<uint16_t, N>>(_mm256_cvtps_ph(bits_as<__m256>(x), 0));
#endif
    using U = Vec<uint32_t, N>;
    auto bits = bits_as<U>(x), size = bits & 0x7fffffff;
    auto normal = (size + 0xc8000fff + (size >> 13 & 1)) >> 13;
    // Adding 0.5, whose last bit is the smallest float16, rounds subnormal results.
    auto small = bits_as<U>(bits_as<Vec<float, N>>(size) + 0.5f) - 0x3f000000;
    auto is_small = bits_as<U>(size < 0x38800000), is_large = bits_as<U>(size >= 0x47800000);
    auto large = 0x7c00 | (bits_as<U>(size > 0x7f800000) & 0x0200);
    auto finite = (small & is_small) | (normal & ~is_small);
    return to_16_bits<N>((large & is_large) | (finite & ~is_large) | (bits >> 16 & 0x8000));
}

template <class E> INLINE auto widen(const char *p) {  // one element
    if constexpr (std::is_floating_point<E>::value) return read<E>(p);
    else if constexpr (std::is_same<E, Brain>::value) {
        uint32_t bits = uint32_t(read<uint16_t>(p)) << 16;
        return read<float>(&bits);
    } else {
        char padded[8] = {};
        std::memcpy(padded, p, 2);
        return load<4>(padded, E{})[0];
    }
}
// A float64 rounded once: a float32 on the way has its last bit set where it isn't exact.
template <class E> NOINLINE uint16_t round_to_16_bits(double x) {
    float f = float(x);
    auto bits = read<uint32_t>(&f);
    if (double(f) != x && x == x) bits = (bits - (std::fabs(double(f)) > std::fabs(x))) | 1;
    return round_to<4>(Vec<float, 4>{} + read<float>(&bits), E{})[0];
}
template <class E> INLINE void store_rounded(char *p, double x) {
    if constexpr (std::is_floating_point<E>::value) write(p, E(x));
    else write(p, round_to_16_bits<E>(x));
}

// Call f with a value of the element type, or of the integer type.
template <class F> auto with_float(Type type, F f) {
    switch (type) {
        case Type::f64: return f(double{});
        case Type::f16: return f(Half{});
        case Type::bf16: return f(Brain{});
        default: return f(float{});
    }
}
template <class F> auto with_integer(Type type, F f) {
    switch (type) {
        case Type::i8: return f(int8_t{});
        case Type::i16: return f(int16_t{});
        case Type::i32: return f(int32_t{});
        case Type::u8: return f(uint8_t{});
        case Type::u16: return f(uint16_t{});
        case Type::u32: return f(uint32_t{});
        case Type::u64: return f(uint64_t{});
        default: return f(int64_t{});
    }
}

// ---- Vectors of the precision T in which a call is computed.

template <class T> struct Lanes {
    static constexpr int W = WIDTH / sizeof(T);
    using Index = typename std::conditional<sizeof(T) == 8, int64_t, int32_t>::type;
    using F = Vec<T, W>;
    using I = Vec<Index, W>;

    static INLINE F all(T x) { return x - F{}; }
    static INLINE I iota() {
        I result;
        for (int k = 0; k < W; k++) result[k] = k;
        return result;
    }
    static INLINE I bit() { return (I{} + 1) << iota(); }
    static INLINE F only(F x, I mask) { return bits_as<F>(bits_as<I>(x) & mask); }
    static INLINE int to_bits(I mask) {
#if defined(__AVX2__)
        if constexpr (W == 8) return __builtin_ia32_movmskps256(bits_as<Vec<float, 8>>(mask));
        else return __builtin_ia32_movmskpd256(bits_as<Vec<double, 4>>(mask));
#elif defined(__SSE2__)
        if constexpr (W == 4) return __builtin_ia32_movmskps(bits_as<Vec<float, 4>>(mask));
        else return __builtin_ia32_movmskpd(bits_as<Vec<double, 2>>(mask));
#else
        int result = 0;
        I set = mask & bit();
        for (int k = 0; k < W; k++) result |= int(set[k]);
        return result;
#endif
    }
    static INLINE I from_bits(int byte) { return ((I{} + byte) & bit()) != 0; }
};

INLINE double added(Vec<double, 2> x) { return x[0] + x[1]; }
#ifdef __AVX2__
INLINE double added(Vec<double, 4> x) {
    __m256d all = bits_as<__m256d>(x);
    return added(bits_as<Vec<double, 2>>(_mm256_castpd256_pd128(all)) + bits_as<Vec<double, 2>>(_mm256_extractf128_pd(all, 1)));
}
#endif
// A sum in float64, to which vectors are added.
template <class T> class Sum {
    using L = Lanes<T>;
    static constexpr int H = L::W / 2;
    Vec<double, H> low{}, high{};

  public:
    INLINE void add(typename L::F x) {
#ifdef __AVX2__  // GCC 12 converts two numbers at a time
        low += bits_as<Vec<double, H>>(_mm256_cvtps_pd(_mm256_castps256_ps128(bits_as<__m256>(x))));
        high += bits_as<Vec<double, H>>(_mm256_cvtps_pd(_mm256_extractf128_ps(bits_as<__m256>(x), 1)));
#else
        Vec<T, H> halves[2];
        std::memcpy(halves, &x, sizeof x);
        low += convert<Vec<double, H>>(halves[0]);
        high += convert<Vec<double, H>>(halves[1]);
#endif
    }
    INLINE double total() const { return added(low + high); }
};
template <> class Sum<double> {
    Lanes<double>::F sum{};

  public:
    INLINE void add(Lanes<double>::F x) { sum += x; }
    INLINE double total() const { return added(sum); }
};

// ---- Exponents. A term is h ** p, a slope is h ** (p - 1); factor times that is the derivative.

struct One {
    template <class E> using Computing = typename std::conditional<sizeof(E) == 8, double, float>::type;
    One(double, double) {}
    static constexpr double factor = 1;
    template <class F> INLINE F term(F h) const { return h; }
    template <class F> INLINE F slope(F h) const { return h; }  // 1 where that is positive
};
struct Two {
    template <class E> using Computing = One::Computing<E>;
    Two(double, double) {}
    static constexpr double factor = 2;
    template <class F> INLINE F term(F h) const { return h * h; }
    template <class F> INLINE F slope(F h) const { return h; }
};
struct Other {
    // float64 for every type: float32 would lose 1e-6 of the power of a large h.
    template <class> using Computing = double;
    double factor, largest;  // of the scores' own computing type: what is beyond is infinite there
    Other(double p, double largest) : factor(p), largest(largest) {}
    template <class F> INLINE F term(F h) const { return power(h, factor); }
    template <class F> INLINE F slope(F h) const { return power(h, factor - 1); }

  private:
    template <class F> NOINLINE F power(F h, double p) const {
        for (unsigned k = 0; k < sizeof h / sizeof h[0]; k++) {
            if (h[k] > largest) h[k] = INFINITY;
            if (h[k] != 0) h[k] = std::pow(h[k], p);
            if (h[k] > largest) h[k] = INFINITY;
        }
        return h;
    }
};

// A row's sum of slopes; for p = 1 a count, by lanes where several vectors come in a row.
constexpr int ALONE = 4;  // which vector of a step: none
template <class T, class P> class Slopes {
    using F = typename Lanes<T>::F;
    F part[2] = {};
    Sum<T> sum;

  public:
    INLINE void add(F slope, int which) { part[which % 2] += slope; }
    INLINE void flush() { sum.add(part[0] + part[1]), part[0] = part[1] = F{}; }
    INLINE double total() { return flush(), sum.total(); }
};
template <class T> class Slopes<T, One> {
    using L = Lanes<T>;
    using Pairs = Vec<int64_t, WIDTH / 8>;
    typename L::I minus{};
    int64_t count = 0;

  public:
    INLINE void add(typename L::F slope, int which) {
        if (which < ALONE) minus += slope > 0;
        else count += __builtin_popcount(unsigned(L::to_bits(slope > 0)));
    }
    INLINE void flush() {
        Pairs sums = bits_as<Pairs>(minus);
        if (sizeof(T) == 4) sums = (sums >> 32) + (sums << 32 >> 32);
        for (int k = 0; k < WIDTH / 8; k++) count -= sums[k];
        minus = typename L::I{};
    }
    INLINE double total() { return double(count); }
};

// ---- What belongs to the rows themselves.

template <class T> struct Group {
    int count;
    const char *row[GROUP];
    int32_t y[GROUP];  // the target's place among the call's classes; OUTSIDE or IGNORED
    T own[GROUP];      // its score; NaN where the row has no value
    double weight[GROUP];

    Group() {
        for (double &w : weight) w = 1;
    }
};

// What a call's targets are compared with.
struct Classes {
    int64_t first, count, ignore;
    bool ignores, ignore_is_large;
    explicit Classes(const Call &c)
        : first(c.first), count(c.classes), ignore(c.ignore), ignores(c.ignores), ignore_is_large(c.ignore_is_large) {}

    template <class I> INLINE int32_t place(I y) const {
        constexpr bool is_signed = std::numeric_limits<I>::is_signed;
        if (ignores && (is_signed ? !ignore_is_large && int64_t(y) == ignore
                                  : (ignore_is_large || ignore >= 0) && uint64_t(y) == uint64_t(ignore)))
            return IGNORED;
        // What is below the first class, or too large for int64, is a large unsigned number.
        uint64_t place = uint64_t(int64_t(y)) - uint64_t(first);
        bool large = !is_signed && uint64_t(y) > uint64_t(std::numeric_limits<int64_t>::max());
        return large || place >= uint64_t(count) ? OUTSIDE : int32_t(place);
    }
};

// Calls f with k and the address of element start + k.
template <class F> INLINE void each(const Walk &walk, int64_t start, int64_t count, F f) {
    if (walk.ndim < 2) {
        int64_t stride = walk.ndim ? walk.stride[0] : 0;
        char *p = walk.data + start * stride;
        for (int64_t k = 0; k < count; k++, p += stride) f(k, p);
    } else {
        for (int64_t k = 0; k < count; k++) f(k, walk.at(start + k));
    }
}
// Look up the targets' places of rows in a row.
NOINLINE void look_up_targets(const Call &c, int64_t start, int64_t count, int32_t *y) {
    const Classes classes(c);
    with_integer(c.y.type, [&](auto zero) {
        each(c.y, start, count, [&](int64_t k, const char *p) { y[k] = classes.place(read<decltype(zero)>(p)); });
    });
}
// The weights of targets, in the computing precision of the call; 1 where there is none.
NOINLINE void look_up_weights(const Call &c, const int32_t *y, int64_t count, double *weight) {
    const bool narrow = c.x.type != Type::f64;
    const int64_t step = c.weight.ndim ? c.weight.stride[0] : 0;
    with_float(c.weight.type, [&](auto e) {
        for (int64_t k = 0; k < count; k++) {
            double w = y[k] < 0 ? 1 : double(widen<decltype(e)>(c.weight.data + y[k] * step));
            weight[k] = narrow ? double(float(w)) : w;
        }
    });
}
// Rows from ``start`` on; their scores are those of x from ``at`` on.
template <class E, class T>
NOINLINE void look_up(const Call &c, const Scores &x, int64_t at, int64_t start, int64_t count, Group<T> &g) {
    const bool needs_own = !c.bits || !c.grad.data;  // the backward pass by bits reads no score
    g.count = int(count);
    look_up_targets(c, start, count, g.y);
    each(x, at, count, [&](int64_t t, const char *p) {
        g.row[t] = p;
        if (!c.part && needs_own) g.own[t] = g.y[t] >= 0 ? T(widen<E>(p + g.y[t] * x.step)) : T(NOT_A_NUMBER);
    });
    if (c.part) each(c.own, start, count, [&](int64_t t, const char *p) { g.own[t] = T(load_float(p, c.own.type)); });
    if (c.weight.data) look_up_weights(c, g.y, count, g.weight);
}

// A row's sums of terms and of slopes, in units of 1, or of LARGE where they overflowed.
struct Sums {
    double terms, slopes, unit;
};

// Room for copies of rows and of their gradients, of each thread; null where there is no memory. Not
// on the stack: with musl a thread has 128 KB.
inline char *stage() {
    thread_local std::unique_ptr<char[]> room(new (std::nothrow) char[2 * STAGE]);
    return room.get();
}

// ---- The kernels for scores of type E, the exponent P, classes side by side (UNIT) or not.

template <class E, class P, bool UNIT> struct Kernel {
    using T = typename P::template Computing<E>;
    using L = Lanes<T>;
    using F = typename L::F;
    using I = typename L::I;
    static constexpr int W = L::W;
    static constexpr int64_t SIZE = sizeof(E);
    static constexpr bool SIDE_BY_SIDE = UNIT;
    static constexpr double LARGEST = std::numeric_limits<One::Computing<E>>::max();
    static constexpr int STEP = 4 * W, RUN = LANE_TERMS / 2 * STEP;

    const Call &c;
    const P power;
    const F margin;
    const int64_t n, whole, last;  // classes; those in whole vectors; where the last vector begins
    const int64_t bytes;           // of a row's bits
    const double common;           // factor of all rows' gradients
    const I rest;                  // the lanes of the last vector that no other covers
    const I last_classes;          // the classes in it

    // Rows whose classes do not lie side by side, or are fewer than a vector, are worked on in copies.
    const bool staged;
    const int64_t pitch;           // bytes from copy to copy
    const int64_t in_step, out_step;
    const int64_t ahead;           // bytes from what is read to what is fetched
    char *copies = nullptr;        // of the gradient's rows, from row ``base`` on
    int64_t base = 0;

    explicit Kernel(const Call &c)
        : c(c), power(c.p, LARGEST), margin(L::all(T(One::Computing<E>(c.margin)))), n(c.classes),
          whole(n / W * W), last(n < W ? 0 : n - W), bytes(row_bytes(c.x.type, n)), common(c.scale * power.factor / (c.part ? 1 : double(n))),
          rest((L::iota() >= (I{} + typename L::Index(whole - last))) &
               (L::iota() < (I{} + typename L::Index(n - last)))),
          last_classes(L::iota() + typename L::Index(last)),
          staged(UNIT && (c.pieces || !in_place(c))), pitch(pitch_of(n)), in_step(staged ? SIZE : c.x.step),
          out_step(staged ? SIZE : c.grad.step), ahead(ahead_of(c.x)) {}

    static bool in_place(const Call &c) {
        return c.x.step == SIZE && (!c.grad.data || c.grad.step == SIZE) && c.classes >= W;
    }
    static bool can_stage(const Call &c) { return pitch_of(c.classes) <= STAGE; }
    // Whole lines and one more, so that neighbours in a column are not apart by a power of two.
    static int64_t pitch_of(int64_t n) { return n < 4 * W ? (n > W ? n : W) * SIZE : (n * SIZE / 64 + 2) * 64; }
    // Rows may lie apart, or follow one another backwards: whole rows, then.
    static int64_t ahead_of(const Scores &x) {
        const int64_t stride = x.ndim == 1 ? x.stride[0] : 0, size = std::abs(stride);
        return size && size < AHEAD ? AHEAD / size * stride : AHEAD;
    }
    INLINE char *out(int64_t i) const { return staged ? copies + (i - base) * pitch : c.grad.at(i); }

    // The scores of the W classes from j on; beyond the row's end the last one comes again.
    INLINE F scores(const char *row, int64_t j, int64_t step) const {
        if constexpr (UNIT) return convert<F>(load<W>(row + j * int64_t(sizeof(E)), E{}));
        else return scattered_scores(row, j, step);
    }
    NOINLINE F scattered_scores(const char *row, int64_t j, int64_t step) const {
        F x;
        for (int k = 0; k < W; k++) x[k] = widen<E>(row + (j + k < n ? j + k : n - 1) * step);
        return x;
    }
    // max(0, z), and 0 for the target's class; NaN stays. ``at``: the target's place minus j.
    INLINE F hinge(F x, I own_class, F own) const {
        F z = (x - own) + margin;
        return L::only(z, ~((z <= 0) | own_class));
    }
    INLINE F hinge(const char *row, int64_t j, int shift, I at, F own) const {
        return hinge(scores(row, j + shift, in_step), L::iota() + shift == at, own);
    }
    static INLINE I place(int64_t y, int64_t j) { return I{} + typename L::Index(y - j); }

    // The sum of a row's terms times weight, without what is added to ``sum`` on the way. ``each``
    // sees the hinges of whole vectors and of the last one.
    template <class Each>
    INLINE F terms(const char *row, int64_t y, T own_, F weight, Each &each, Sum<T> &sum) const {
        F own = L::all(own_), s{};
        int64_t j = 0;
        if (n < STEP) fetch(row, n * SIZE);
        while (j + STEP <= n) {
            F a{}, b{}, d{}, e{};
            const int64_t stop = n < j + RUN ? n : j + RUN;
            for (; j + STEP <= stop; j += STEP) {
                fetch(row + j * SIZE, STEP * SIZE);
                I at = place(y, j);
                F h0 = hinge(row, j, 0, at, own), h1 = hinge(row, j, W, at, own);
                F h2 = hinge(row, j, 2 * W, at, own), h3 = hinge(row, j, 3 * W, at, own);
                a += power.term(h0), b += power.term(h1), d += power.term(h2), e += power.term(h3);
                each.whole(j, h0, 0), each.whole(j + W, h1, 1);
                each.whole(j + 2 * W, h2, 2), each.whole(j + 3 * W, h3, 3);
            }
            s = (a + b) + (d + e);
            each.flush();
            if (j + STEP <= n) sum.add(s * weight), s = F{};
        }
        for (I at = place(y, j); j + W <= n; j += W, at -= W) {
            F h = hinge(row, j, 0, at, own);
            s += power.term(h), each.whole(j, h, ALONE);
        }
        F h = hinge(row, last, 0, place(y, last), own);
        each.last(h);
        return (s + L::only(power.term(h), rest)) * weight;
    }
    // The same for a row of fewer than two vectors.
    template <class Each> INLINE F short_terms(const char *row, const int32_t &y_, T own_, Each &each) const {
        F own = L::all(own_), s{};
        I y = I{} + typename L::Index(y_);
        if (n >= W) {
            F h = hinge(scores(row, 0, in_step), L::iota() == y, own);
            s = power.term(h), each.whole(0, h, ALONE);
        }
        F h = hinge(scores(row, last, in_step), last_classes == y, own);
        each.last(h);
        return s + L::only(power.term(h), rest);
    }
    template <class Each> INLINE double row_terms(const Group<T> &g, int t, Each &each) const {
        Sum<T> sum;
        sum.add(terms(g.row[t], g.y[t], g.own[t], L::all(1), each, sum));
        return sum.total();
    }
    struct Nothing {
        INLINE void whole(int64_t, F, int) {}
        INLINE void last(F) {}
        INLINE void flush() {}
        INLINE void end() {}
    };
    struct Keep : Nothing {  // a bit for each class, of p = 1
        uint8_t *bits;
        int64_t final;
        Keep(const Kernel &k, int64_t i) : bits(k.c.bits + i * k.bytes), final(k.bytes - 1) {}
        INLINE void whole(int64_t j, F h, int) { bits[j / W] = uint8_t(L::to_bits(h > 0)); }
        INLINE void last(F h) { bits[final] = uint8_t(L::to_bits(h > 0)); }
    };
    struct AddSlopes : Nothing {
        const Kernel &k;
        Slopes<T, P> slopes;
        explicit AddSlopes(const Kernel &k) : k(k) {}
        INLINE void whole(int64_t, F h, int which) { slopes.add(k.power.slope(h), which); }
        INLINE void last(F h) { slopes.add(L::only(k.power.slope(h), k.rest), ALONE); }
        INLINE void flush() { slopes.flush(); }
    };
    // What all active classes of a row get for p = 1, in the element type.
    class Same {
        using Bits = typename std::conditional<sizeof(E) == 2, Vec<uint32_t, W>, F>::type;
        Bits value;

      public:
        explicit Same(double scale) {
            if constexpr (sizeof(E) == 2) value = Bits{} + in_element_type(L::all(T(scale)))[0];
            else value = L::all(T(scale));
        }
        INLINE auto where(I mask) const {
            if constexpr (sizeof(E) == 2) return to_16_bits<W>(value & bits_as<Bits>(mask));
            else return L::only(value, mask);
        }
    };
    struct Write : Nothing {  // the gradient but for the target's class
        static constexpr bool SAME = std::is_same<P, One>::value;
        const Kernel &k;
        char *to;
        typename std::conditional<SAME, Same, F>::type scale;
        Slopes<T, P> slopes;
        Write(const Kernel &k, char *to, double by) : k(k), to(to), scale(scale_from(by)) {}
        static INLINE auto scale_from(double by) {
            if constexpr (SAME) return Same(by);
            else return L::all(T(by));
        }
        INLINE F put(int64_t j, F h) {
            F slope = k.power.slope(h);
            if constexpr (SAME) k.put(to, j, scale.where(h > 0));
            else k.put(to, j, in_element_type(L::only(slope * scale, h > 0)));  // no 0 * infinity
            return slope;
        }
        INLINE void whole(int64_t j, F h, int which) { slopes.add(put(j, h), which); }
        INLINE void last(F h) { slopes.add(L::only(put(k.last, h), k.rest), ALONE); }
        INLINE void flush() { slopes.flush(); }
    };
    struct WriteWhole : Write {  // with the target's class
        int64_t y;
        double scale;
        WriteWhole(const Kernel &k, int64_t i, int64_t y, double by)
            : Write(k, k.out(i), by), y(y), scale(by) {}
        INLINE void end() { this->k.finish(this->to, y, 0, {0, this->slopes.total(), 1}, scale); }
    };

    // Sums in float64, term by term; where float64 overflows too, in large units.
    NOINLINE Sums careful(const char *row, int64_t y, T own) const {
        Sums s = careful(row, y, own, 1);
        return s.terms == INFINITY || s.slopes == INFINITY ? careful(row, y, own, LARGE) : s;
    }
    NOINLINE Sums careful(const char *row, int64_t y, T own, double unit) const {
        Sums s = {0, 0, unit};
        for (int64_t j = 0; j < n; j++) {
            T z = (T(widen<E>(row + j * in_step)) - own) + margin[0];
            if (j == y || z <= 0) continue;
            Vec<double, 2> h = {double(z), 0};
            const double term = power.term(h)[0];
            s.terms += (term > LARGEST ? INFINITY : term) / unit;
            s.slopes += (std::is_same<P, One>::value ? h[0] > 0 : power.slope(h)[0]) / unit;
        }
        return s;
    }
    // The rest of a gradient: the target's class; NaN in all of a row whose loss or factor is NaN. No
    // class is active: 0, even where the factor is infinite.
    INLINE void finish(char *to, int64_t y, double loss, Sums s, double scale) const {
        if (loss != loss || scale != scale) return fill(to, NOT_A_NUMBER);
        if (y < 0) return;
        T own = T(-(s.slopes == 0 ? 0 : s.slopes * scale) * s.unit);
        if constexpr (sizeof(T) == 4) write(to + y * out_step, in_element_type(L::all(own))[0]);
        else store_rounded<E>(to + y * out_step, own);
    }
    NOINLINE void fill(char *to, double value) const {
        for (int64_t j = 0; j < n; j++) store_rounded<E>(to + j * out_step, value);
    }
    template <class V> INLINE void put(char *to, int64_t j, V values) const {
        if constexpr (UNIT) write(to + j * int64_t(sizeof(E)), values);
        else scatter(to, j, values);
    }
    template <class V> NOINLINE void scatter(char *to, int64_t j, V values) const {
        for (int k = 0; k < W && j + k < n; k++) write(to + (j + k) * out_step, values[k]);
    }
    static INLINE auto in_element_type(F g) {
        if constexpr (sizeof(E) == 8) return g;
        else return round_to<W>(convert<Vec<float, W>>(g), E{});
    }
    INLINE double scale_of(int64_t i, double weight) const {
        double scale = common * weight;
        return c.upstream.data ? scale * load_float(c.upstream.at(i), c.upstream.type) : scale;
    }

    // What a row adds to the results, beside its gradient. Returns its loss times C.
    INLINE double account(int64_t i, Sums s, double weight, Result &result) const {
        double loss = s.terms * weight;
        if (loss - loss == 0) result.sum += loss * (c.shrink * s.unit);
        else result.sum += s.terms * (c.shrink * s.unit) * weight;
        result.count++;
        if (c.losses.data) store_rounded<E>(c.losses.at(i), s.terms / double(n) * weight * s.unit);
        return loss;
    }
    NOINLINE void ignore(int64_t i) const {
        if (c.losses.data) store_rounded<E>(c.losses.at(i), 0);
        if (c.sums.data) write(c.sums.at(i), 0.0);
        if (c.sums.data && c.slopes.data) write(c.slopes.at(i), 0.0);
        if (c.grad.data) fill(out(i), 0);
        if (c.bits) std::memset(c.bits + i * bytes, 0, size_t(bytes));
    }
    // Looking up targets here and there hides from the processor that rows are read in turn: what
    // comes next is fetched by hand.
    INLINE void fetch(const char *p, int64_t bytes) const {
        if constexpr (UNIT)
            for (int64_t k = 0; k < bytes; k += 64) __builtin_prefetch(p + ahead + k);
    }

    // Adds up the rows of a group. Returns how many are ignored.
    template <bool SHORT, class Make>
    INLINE int64_t add_rows(int64_t start, const Group<T> &g, Sum<T> &sum, Make make) const {
        const int64_t rows = SHORT ? LANE_TERMS - 4 : n < RUN ? LANE_TERMS - 6 - n / STEP : 1;
        const bool weighted = c.weight.data;
        int64_t ignored = 0;
        for (int64_t t = 0; t < g.count;) {
            F s{};
            for (int64_t stop = t + rows < g.count ? t + rows : g.count; t < stop; t++) {
                if (SHORT) fetch(g.row[t], 64);
                if (g.y[t] == IGNORED) {
                    ignore(start + t), ignored++;
                    continue;
                }
                auto each = make(start + t, t);
                if (SHORT) {
                    F row = short_terms(g.row[t], g.y[t], g.own[t], each);
                    s += weighted ? row * L::all(T(g.weight[t])) : row;
                } else {
                    s += terms(g.row[t], g.y[t], g.own[t], L::all(T(g.weight[t])), each, sum);
                }
                each.end();
            }
            sum.add(s);
        }
        return ignored;
    }
    // Writes the losses of the rows of a group. False where one is not finite, or its row ignored.
    template <bool SHORT, class Make> INLINE bool write_rows(int64_t start, const Group<T> &g, Make make) const {
        double sums[GROUP];
        bool ordinary = true;
        for (int64_t t = 0; t < g.count; t++) {
            if (SHORT) fetch(g.row[t], 64);
            auto each = make(start + t, t);
            Sum<T> sum;
            sum.add(SHORT ? short_terms(g.row[t], g.y[t], g.own[t], each)
                          : terms(g.row[t], g.y[t], g.own[t], L::all(1), each, sum));
            each.end();
            sums[t] = sum.total();
        }
        for (int64_t t = 0; t < g.count; t++) {
            sums[t] = sums[t] / double(n) * g.weight[t];
            ordinary &= (sums[t] - sums[t] == 0) & (g.y[t] >= 0);
        }
        if (!ordinary) return false;
        each(c.losses, start, g.count, [&](int64_t t, char *p) { store_rounded<E>(p, sums[t]); });
        return true;
    }
    // Rows of which nothing needs a closer look. Where their own losses are not asked for, a lane adds
    // up several. False where one does need it: the usual way finds it, and what it comes to.
    template <class Make> INLINE bool together(int64_t start, const Group<T> &g, Result &result, Make make) const {
        if (n == 1 || c.part) return false;
        if (c.losses.data) return n < 2 * W ? write_rows<true>(start, g, make) : write_rows<false>(start, g, make);
        Sum<T> sum;
        int64_t ignored = n < 2 * W ? add_rows<true>(start, g, sum, make) : add_rows<false>(start, g, sum, make);
        double total = sum.total() * c.shrink;
        if (total - total != 0) return false;
        result.sum += total;
        result.count += g.count - ignored;
        return true;
    }
    // Calls f with the place and number of each row that isn't ignored.
    template <class F_> INLINE void each_row(int64_t start, const Group<T> &g, Result &result, F_ f) const {
        for (int t = 0; t < g.count; t++) {
            if (g.y[t] == IGNORED) {
                ignore(start + t);
                continue;
            }
            result.bad |= g.y[t] < 0;
            f(t, start + t);
        }
    }
    INLINE Sums checked(const Group<T> &g, int t, double terms, double slopes) const {
        if (terms == INFINITY || slopes == INFINITY) return careful(g.row[t], g.y[t], g.own[t]);
        bool no_value = g.own[t] != g.own[t];  // matters for a single class
        return {no_value ? NOT_A_NUMBER : terms, slopes, 1};
    }
    void losses(int64_t start, const Group<T> &g, Result &result) const {
        if (together(start, g, result, [&](int64_t, int64_t) { return Nothing(); })) return;
        each_row(start, g, result, [&](int t, int64_t i) {
            Nothing nothing;
            account(i, checked(g, t, row_terms(g, t, nothing), 0), g.weight[t], result);
        });
    }
    void losses_and_bits(int64_t start, const Group<T> &g, Result &result) const {
        if (together(start, g, result, [&](int64_t i, int64_t) { return Keep(*this, i); })) return;
        each_row(start, g, result, [&](int t, int64_t i) {
            Keep keep(*this, i);
            Sums s = checked(g, t, row_terms(g, t, keep), 0);
            double loss = account(i, s, g.weight[t], result);
            if (loss != loss) std::memset(keep.bits, 255, size_t(bytes));
        });
    }
    void gradients(int64_t start, const Group<T> &g, Result &result) const {
        if (together(start, g, result, [&](int64_t i, int64_t t) {
                return WriteWhole(*this, i, g.y[t], scale_of(i, g.weight[t]));
            }))
            return;
        each_row(start, g, result, [&](int t, int64_t i) {
            double scale = scale_of(i, g.weight[t]);
            Write write(*this, out(i), scale);
            double sum = row_terms(g, t, write);
            Sums s = checked(g, t, sum, write.slopes.total());
            double loss = account(i, s, g.weight[t], result);
            if (c.part) loss = s.slopes = read<double>(c.slopes.at(i)) / power.factor, s.unit = 1;
            finish(write.to, g.y[t], loss, s, scale);
        });
    }
    // Sums of terms, and of slopes, for a part of the classes.
    void parts(int64_t start, const Group<T> &g, Result &result) const {
        each_row(start, g, result, [&](int t, int64_t i) {
            Nothing nothing;
            Sums s = checked(g, t, row_terms(g, t, nothing), 0);
            write(c.sums.at(i), s.terms * s.unit);
        });
    }
    void parts_and_slopes(int64_t start, const Group<T> &g, Result &result) const {
        each_row(start, g, result, [&](int t, int64_t i) {
            AddSlopes add(*this);
            double terms = row_terms(g, t, add);
            Sums s = checked(g, t, terms, add.slopes.total());
            write(c.sums.at(i), s.terms * s.unit);
            write(c.slopes.at(i), s.terms != s.terms ? s.terms : s.slopes * power.factor * s.unit);
        });
    }

    template <class Work> static void in_groups(const Call &c, int64_t start, int64_t stop, Work work) {
        Kernel kernel(c);
        if constexpr (UNIT)
            if (kernel.staged) {
                char *room = stage();
                if (room) return kernel.in_stages(room, start, stop, work);
                return Kernel<E, P, false>::in_groups(c, start, stop, work);
            }
        Group<T> group;
        // Few rows at a time where they are long: what a look at the target has fetched is in reach.
        const int64_t size = group_size(NEAR / (c.classes * SIZE));
        for (int64_t first = start; first < stop; first += size) {
            look_up<E>(c, c.x, first, first, first + size < stop ? size : stop - first, group);
            work(kernel, first, group);
        }
    }
    static int64_t group_size(int64_t rows) { return rows > GROUP ? GROUP : rows < 1 ? 1 : rows; }

    template <class Work> NOINLINE void in_stages(char *in, int64_t start, int64_t stop, Work work) {
        Group<T> group;
        char *rows[GROUP];
        const int64_t size = group_size(STAGE / pitch);
        std::memset(in, 0, size_t(size * pitch));
        copies = in + STAGE;
        for (base = start; base < stop; base += size) {
            const int64_t count = base + size < stop ? size : stop - base;
            look_up<E>(c, c.x, base, base, count, group);
            each(c.x, base, count, [&](int64_t t, char *p) { rows[t] = p; });
            copy<true>(in, rows, count, c.x.step, c.x);
            for (int64_t t = 0; t < count; t++) group.row[t] = in + t * pitch;
            work(*this, base, group);
            if (!c.grad.data) continue;
            each(c.grad, base, count, [&](int64_t t, char *p) { rows[t] = p; });
            copy<false>(copies, rows, count, c.grad.step, c.grad);
        }
    }
    INLINE void copy_row(char *to, const char *from, const Piece &piece) const {
        const int64_t length = piece.classes * SIZE, step = piece.x.step;
        auto move = [&](int64_t k) { write(to + k, read<F>(from + k)); };
        if (step != SIZE || length < WIDTH) {
            for (int64_t k = 0; k < length; k += SIZE, from += step) write(to + k, read<E>(from));
            return;
        }
        fetch(from, length);
        for (int64_t k = 0; k < length - WIDTH; k += WIDTH) move(k);
        move(length - WIDTH);  // may overlap the one before
    }
    // Rows in pieces are put together, a few at a time.
    static bool can_join(const Call &c) { return pitch_of(c.classes) <= JOINED; }
    template <class Work> NOINLINE void in_pieces(int64_t start, int64_t stop, Work work) const {
        alignas(64) char room[JOINED] = {};
        Group<T> group;
        Scores joined;
        joined.data = room, joined.ndim = 1, joined.stride[0] = pitch, joined.step = SIZE;
        const int64_t size = group_size(JOINED / pitch);
        for (int64_t first = start; first < stop; first += size) {
            const int64_t count = first + size < stop ? size : stop - first;
            char *to = room;
            for (const Piece *piece = c.pieces; piece < c.pieces + c.n_pieces; piece++) {
                each(piece->x, first, count, [&](int64_t t, const char *p) { copy_row(to + t * pitch, p, *piece); });
                to += piece->classes * SIZE;
            }
            look_up<E>(c, joined, 0, first, count, group);
            work(*this, first, group);
        }
    }
    // Between rows and their copies. What lies side by side in the rows' memory is taken in turn.
    template <bool IN> INLINE void copy(char *stage, char *const *rows, int64_t count, int64_t step, const Walk &walk) const {
        auto move = [&](int64_t t, int64_t j) {
            char *a = stage + t * pitch + j * SIZE, *b = rows[t] + j * step;
            if (IN) write(a, read<E>(b));
            else write(b, read<E>(a));
        };
        if (walk.ndim == 1 && std::abs(walk.stride[0]) < std::abs(step))
            for (int64_t j = 0; j < n; j++)
                for (int64_t t = 0; t < count; t++) move(t, j);
        else
            for (int64_t t = 0; t < count; t++)
                for (int64_t j = 0; j < n; j++) move(t, j);
    }
    static void loss_block(const Call &c, int64_t start, int64_t stop, Result &result) {
        in_groups(c, start, stop, [&](const auto &k, int64_t first, const Group<T> &g) {
            if constexpr (std::is_same<P, One>::value)
                if (c.bits) return k.losses_and_bits(first, g, result);
            k.losses(first, g, result);
        });
    }
    static void joined_block(const Call &c, int64_t start, int64_t stop, Result &result) {
        Kernel(c).in_pieces(start, stop, [&](const Kernel &k, int64_t first, const Group<T> &g) { k.losses(first, g, result); });
    }
    static void part_block(const Call &c, int64_t start, int64_t stop, Result &result) {
        in_groups(c, start, stop, [&](const auto &k, int64_t first, const Group<T> &g) {
            if (c.slopes.data) k.parts_and_slopes(first, g, result);
            else k.parts(first, g, result);
        });
    }
    static void grad_block(const Call &c, int64_t start, int64_t stop, Result &result) {
        in_groups(c, start, stop, [&](const auto &k, int64_t first, const Group<T> &g) {
            k.gradients(first, g, result);
        });
    }

    // The gradient of p = 1 from the bits that loss_block kept.
    static void bits_block(const Call &c, int64_t start, int64_t stop, Result &result) {
        in_groups(c, start, stop, [&](const auto &k, int64_t first, const Group<T> &g) {
            for (int t = 0; t < g.count; t++) {
                result.bad |= g.y[t] == OUTSIDE;
                k.row_of_bits(first + t, g.y[t], g.weight[t]);
            }
        });
    }
    INLINE void row_of_bits(int64_t i, int32_t y, double weight) const {
        const uint8_t *bits = c.bits + i * bytes;
        char *to = out(i);
        // The target's own bit is set only where the row's loss is NaN.
        if (y < 0 || bit_of(bits, y)) return fill(to, y == IGNORED ? 0 : NOT_A_NUMBER);
        double scale = scale_of(i, weight);
        int64_t count = n >= W && n < 2 * W ? short_from_bits(bits, to, Same(scale)) : from_bits(bits, to, Same(scale));
        finish(to, y, 0, {0, double(count), 1}, scale);
    }
    // Every class of a row of fewer than two vectors has its bit in this number.
    INLINE unsigned short_bits(const uint8_t *bits) const { return bits[0] | unsigned(bits[bytes - 1]) << last; }
    INLINE bool bit_of(const uint8_t *bits, int64_t y) const {
        if (n < 2 * W) return short_bits(bits) >> y & 1;
        int64_t byte = y < whole ? y / W : bytes - 1, bit = y < whole ? y % W : y - last;
        return bits[byte] >> bit & 1;
    }
    INLINE int64_t short_from_bits(const uint8_t *bits, char *to, Same scale) const {
        put(to, 0, scale.where(L::from_bits(bits[0])));
        put(to, last, scale.where(L::from_bits(bits[bytes - 1])));
        return __builtin_popcount(short_bits(bits));
    }
    INLINE int64_t from_bits(const uint8_t *bits, char *to, Same scale) const {
        int64_t count = 0;
        for (int64_t j = 0; j < whole; j += W) {
            count += __builtin_popcount(bits[j / W]);
            put(to, j, scale.where(L::from_bits(bits[j / W])));
        }
        if (whole < n) {
            int byte = bits[whole / W];
            count += __builtin_popcount(byte & L::to_bits(rest));
            put(to, last, scale.where(L::from_bits(byte)));
        }
        return count;
    }
};

// ---- The classes of each row's highest scores: NaN first, then by score, then by class.

template <class E> struct Highest {
    using T = One::Computing<E>;
    using L = Lanes<T>;
    static constexpr int64_t W = L::W, STEP = 4 * W;

    const char *row;
    int64_t *found;  // the classes, in order
    const int wanted;
    int count = 0;
    T scores[MAX_HIGHEST];  // of these classes

    static bool beats(T x, T y) { return x > y || (x != x && y == y); }

    INLINE void take(int64_t j) {
        const T x = widen<E>(row + j * int64_t(sizeof(E)));
        if (count == wanted && !beats(x, scores[count - 1])) return;
        int at = count < wanted ? count++ : count - 1;
        for (; at && beats(x, scores[at - 1]); at--) scores[at] = scores[at - 1], found[at] = found[at - 1];
        scores[at] = x;
        found[at] = j;
    }
    // Take what may be among the highest of four vectors of scores from j on.
    INLINE void take_higher(int64_t j) {
        const auto least = L::all(scores[count - 1]);
        typename L::I higher[4], any{};
        for (int v = 0; v < 4; v++)
            any |= higher[v] = ~(load<W>(row + (j + v * W) * int64_t(sizeof(E)), E{}) <= least);
        if (!L::to_bits(any)) return;
        for (int v = 0; v < 4; v++)
            for (unsigned bits = unsigned(L::to_bits(higher[v])); bits; bits &= bits - 1)
                take(j + v * W + __builtin_ctz(bits));
    }
    INLINE void look(int64_t n) {
        int64_t j = 0;
        for (; j < wanted; j++) take(j);
        for (; j + STEP <= n; j += STEP) take_higher(j);
        for (; j < n; j++) take(j);
    }
    // As many short rows as a vector has lanes, class by class: no branch to be predicted.
    static INLINE void look_across(const Call &c, int64_t i) {
        const char *rows[W];
        typename L::F scores[MAX_HIGHEST] = {};
        typename L::I found[MAX_HIGHEST];
        for (int k = 0; k < W; k++) rows[k] = c.x.at(i + k);
        for (int s = 0; s < c.wanted; s++) found[s] = typename L::I{} - 1;  // nothing yet
        for (int64_t j = 0; j < c.classes; j++) {
            typename L::F x;
            for (int k = 0; k < W; k++) x[k] = widen<E>(rows[k] + j * int64_t(sizeof(E)));
            typename L::I at = typename L::I{} + typename L::Index(j), higher{};
            for (int s = 0; s < c.wanted; s++) {
                const auto best = scores[s];
                const auto whose = found[s];
                higher |= (x > best) | ((x != x) & (best == best)) | (whose < 0);
                scores[s] = higher ? x : best, x = higher ? best : x;
                found[s] = higher ? at : whose, at = higher ? whose : at;
            }
        }
        for (int k = 0; k < W; k++)
            for (int s = 0; s < c.wanted; s++) c.highest[(i + k) * c.wanted + s] = found[s][k];
    }
    static void find(const Call &c, int64_t start, int64_t stop) {
        if (c.classes < 2 * STEP)
            for (; start + W <= stop; start += W) look_across(c, start);
        for (; start < stop; start++)
            Highest{c.x.at(start), c.highest + start * c.wanted, c.wanted}.look(c.classes);
    }
};

// ---- Where each row's target stands: by how much it leads the highest other score.

template <class E> struct Standings {
    using T = One::Computing<E>;
    const Call &c;
    const T margin;
    explicit Standings(const Call &c) : c(c), margin(T(c.margin)) {}

    // A lead's sign and leading bits, so that bins order as leads do; NaN is beyond both infinities.
    int32_t bin(T lead) const {
        double ratio = double(lead) / c.unit;
        auto bits = read<int64_t>(&ratio), sign = bits >> 63;
        return int32_t((((bits & INT64_MAX) ^ sign) - sign) >> BIN_SHIFT);
    }
    INLINE void place(int64_t i, int32_t y) const {
        const char *row = c.x.at(i);
        const int64_t *best = c.highest + i * c.wanted;
        const T own = widen<E>(row + y * int64_t(sizeof(E)));
        if (c.classes == 1) return put(i, own == own ? INFINITY : own, own != own, -1);
        const int64_t rival = best[best[0] == y];
        const T other = widen<E>(row + rival * int64_t(sizeof(E)));
        put(i, own - other, !((other - own) + margin <= 0), y * c.classes + rival);
    }
    INLINE void put(int64_t i, T lead, bool inside, int64_t confused) const {
        c.kinds[i] = uint8_t(inside * INSIDE + (lead > 0) * RIGHT);
        c.bins[i] = bin(lead);
        c.confused[i] = lead <= 0 ? confused : -1;
    }
    static void block(const Call &c, int64_t start, int64_t stop, Result &result) {
        const Standings standings(c);
        int32_t y[GROUP];
        if (c.losses.data) loss_block(c)(c, start, stop, result);
        Highest<E>::find(c, start, stop);
        for (; start < stop; start += GROUP) {
            const int64_t count = stop - start < GROUP ? stop - start : GROUP;
            look_up_targets(c, start, count, y);
            for (int64_t t = 0; t < count; t++) {
                if (y[t] >= 0) standings.place(start + t, y[t]);
                else result.bad = true;
            }
        }
    }
};

template <class P, class F> Block with_kernel(const Call &c, F f) {
    return with_float(c.x.type, [&](auto e) -> Block {
        using E = decltype(e);
        // Beside std::pow, loading vectors would save nothing.
        using Fast = Kernel<E, P, !std::is_same<P, Other>::value>;
        return Fast::in_place(c) || Fast::can_stage(c) ? f(static_cast<Fast *>(nullptr))
                                                       : f(static_cast<Kernel<E, P, false> *>(nullptr));
    });
}
template <class F> Block choose(const Call &c, F f) {
    return c.p == 1 ? with_kernel<One>(c, f) : c.p == 2 ? with_kernel<Two>(c, f) : with_kernel<Other>(c, f);
}

}  // namespace

int64_t size_of(Type type) {
    switch (type) {
        case Type::f64: case Type::i64: case Type::u64: return 8;
        case Type::f32: case Type::i32: case Type::u32: return 4;
        case Type::i8: case Type::u8: return 1;
        default: return 2;
    }
}
double load_float(const char *p, Type type) {
    return with_float(type, [&](auto e) { return double(widen<decltype(e)>(p)); });
}
void store_float(char *p, Type type, double value) {
    with_float(type, [&](auto e) { store_rounded<decltype(e)>(p, value); });
}
int64_t count_not_ignored(const Call &c) {
    int64_t total = 0;
    int32_t y[GROUP];
    for (int64_t first = 0; first < c.rows; first += GROUP) {
        int64_t count = first + GROUP < c.rows ? GROUP : c.rows - first;
        look_up_targets(c, first, count, y);
        for (int64_t t = 0; t < count; t++) total += y[t] != IGNORED;
    }
    return total;
}
int64_t row_bytes(Type type, int64_t classes) {
    int lanes = WIDTH / (type == Type::f64 ? 8 : 4);
    return (classes + lanes - 1) / lanes;
}
Block loss_block(const Call &c) {
    return choose(c, [&](auto *k) -> Block {
        using K = std::remove_pointer_t<decltype(k)>;
        if constexpr (K::SIDE_BY_SIDE)
            if (c.pieces && K::can_join(c)) return K::joined_block;
        if (c.pieces) return nullptr;
        return c.part ? K::part_block : K::loss_block;
    });
}
Block grad_block(const Call &c) {
    return choose(c, [](auto *k) -> Block { return std::remove_pointer_t<decltype(k)>::grad_block; });
}
Block bits_block(const Call &c) {
    return with_kernel<One>(c, [](auto *k) -> Block { return std::remove_pointer_t<decltype(k)>::bits_block; });
}
Block standings_block(const Call &c) {
    return with_float(c.x.type, [](auto e) -> Block { return Standings<decltype(e)>::block; });
}
Block own_block(const Call &c) {
    return with_float(c.x.type, [](auto e) -> Block {
        using E = decltype(e);
        return [](const Call &c, int64_t start, int64_t stop, Result &) {
            int32_t y[GROUP];
            const char *score[GROUP];
            for (; start < stop; start += GROUP) {
                const int64_t count = start + GROUP < stop ? GROUP : stop - start;
                look_up_targets(c, start, count, y);
                // A target elsewhere costs nothing: its row may stay where it is.
                each(c.x, start, count, [&](int64_t t, const char *p) {
                    score[t] = y[t] < 0 ? reinterpret_cast<const char *>(y) : p + y[t] * c.x.step;
                    __builtin_prefetch(score[t]);
                });
                each(c.own, start, count, [&](int64_t t, char *p) {
                    write(p, y[t] < 0 ? One::Computing<E>(0) : One::Computing<E>(widen<E>(score[t])));
                });
            }
        };
    });
}

bool exact_sums(const Walk &values, const Walk &group, int64_t n, int64_t groups, uint32_t *sums) {
    constexpr int64_t LOW = 0xffffffff, HIDDEN = int64_t(1) << 52, NO_NUMBER = 0x7ff;
    // Digits that have room for carries; these are passed on at the end.
    std::vector<int64_t> wide(size_t(groups * SUM_DIGITS));
    for (int64_t i = 0; i < n; i++) {
        const double value = load_float(values.at(i), values.type);
        const int64_t g = read<int64_t>(group.at(i)), bits = read<int64_t>(&value);
        const int64_t exponent = bits >> 52 & NO_NUMBER, fraction = bits & (HIDDEN - 1);
        if (exponent == NO_NUMBER || uint64_t(g) >= uint64_t(groups)) return false;
        const int64_t mantissa = exponent ? fraction | HIDDEN : fraction;
        const int64_t place = (exponent ? exponent : 1) - 1075 + SUM_UNIT;  // of the mantissa's lowest bit
        const int64_t low = (mantissa & LOW) << (place & 31), high = (mantissa >> 32) << (place & 31);
        const int64_t sign = bits < 0 ? -1 : 1;
        int64_t *digit = wide.data() + g * SUM_DIGITS + (place >> 5);
        digit[0] += sign * (low & LOW);
        digit[1] += sign * ((low >> 32 & LOW) + (high & LOW));
        digit[2] += sign * (high >> 32);
    }
    for (int64_t g = 0; g < groups; g++) {
        int64_t carry = 0;
        for (int64_t k = g * SUM_DIGITS; k < (g + 1) * SUM_DIGITS; k++) {
            carry += wide[size_t(k)];
            sums[k] = uint32_t(carry & LOW);
            carry >>= 32;
        }
    }
    return true;
}

}  // namespace mml
