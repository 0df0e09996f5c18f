// Vectors of the machine's width: elements, lanes and their masks, for AVX-512, AVX2, SSE2 and what
// the compiler makes of plain code elsewhere. Included by margin_loss.cpp alone: what stands here is
// the build's own.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __SSE2__
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))

namespace mml {
namespace {

#ifdef __AVX512VL__
constexpr int WIDTH = 64;  // bytes of a vector
#elif defined(__AVX2__)
constexpr int WIDTH = 32;
#else
constexpr int WIDTH = 16;
#endif

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
#ifdef __AVX512VL__
    if constexpr (N == 16) return bits_as<Vec<uint32_t, N>>(_mm512_cvtepu16_epi32(read<__m256i>(p)));
#endif
#ifdef __AVX2__
    if constexpr (N == 8) return bits_as<Vec<uint32_t, N>>(_mm256_cvtepu16_epi32(read<__m128i>(p)));
#endif
    return convert<Vec<uint32_t, N>>(read<Vec<uint16_t, N>>(p));
}
template <int N> INLINE Vec<uint16_t, N> to_16_bits(Vec<uint32_t, N> x) {
#ifdef __AVX512VL__
    if constexpr (N == 16) return bits_as<Vec<uint16_t, N>>(_mm512_cvtepi32_epi16(bits_as<__m512i>(x)));
#endif
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
#ifdef __AVX512VL__
    if constexpr (N == 16) return bits_as<Vec<float, N>>(_mm512_cvtph_ps(read<__m256i>(p)));
#endif
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
#ifdef __AVX512VL__
    if constexpr (N == 16) return bits_as<Vec<uint16_t, N>>(_mm512_cvtps_ph(bits_as<__m512>(x), 0));
#endif
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
// Numbers rounded once: a float32 on the way has its last bit set where it isn't exact.
constexpr int WIDE = WIDTH / 8;
using Wide = Vec<double, WIDE>;
template <class E> INLINE auto rounded(Wide x) {
    if constexpr (std::is_floating_point<E>::value) return convert<Vec<E, WIDE>>(x);
    else {
        using U = Vec<uint32_t, WIDE>;
        auto f = convert<Vec<float, WIDE>>(x);
        const Wide back = convert<Wide>(f), size = x < 0 ? -x : x, got = back < 0 ? -back : back;
        const U inexact = convert<U>((back != x) & (x == x)), above = convert<U>(got > size);
        const U bits = (bits_as<U>(f) + (above & inexact)) | (inexact & 1);
        return round_to<WIDE>(bits_as<Vec<float, WIDE>>(bits), E{});
    }
}
template <class E> INLINE void store_rounded(char *p, double x) { write(p, rounded<E>(Wide{x})[0]); }

// ---- Vectors of the precision T in which a call is computed.

template <class T> struct Lanes {
    static constexpr int W = WIDTH / sizeof(T);
    using Index = typename std::conditional<sizeof(T) == 8, int64_t, int32_t>::type;
    using F = Vec<T, W>;
    using I = Vec<Index, W>;
#ifdef __AVX512VL__
    using Mask = typename std::conditional<W == 8, __mmask8, __mmask16>::type;  // a bit for each lane
#else
    using Mask = I;  // 0 or -1
#endif

    static INLINE F all(T x) { return x - F{}; }
    static INLINE I iota() {
        I result;
        for (int k = 0; k < W; k++) result[k] = k;
        return result;
    }
    static INLINE I bit() { return (I{} + 1) << iota(); }
    // max(0, x); of NaN and a number these instructions return what stands second.
    static INLINE F relu(F x) {
#if defined(__AVX512VL__)
        if constexpr (W == 16) return bits_as<F>(_mm512_max_ps(__m512{}, bits_as<__m512>(x)));
        else return bits_as<F>(_mm512_max_pd(__m512d{}, bits_as<__m512d>(x)));
#elif defined(__AVX2__)
        if constexpr (W == 8) return bits_as<F>(_mm256_max_ps(__m256{}, bits_as<__m256>(x)));
        else return bits_as<F>(_mm256_max_pd(__m256d{}, bits_as<__m256d>(x)));
#elif defined(__SSE2__)
        if constexpr (W == 4) return bits_as<F>(_mm_max_ps(__m128{}, bits_as<__m128>(x)));
        else return bits_as<F>(_mm_max_pd(__m128d{}, bits_as<__m128d>(x)));
#else
        return x <= 0 ? F{} : x;
#endif
    }
    // x where the mask is set, 0 elsewhere; comparisons; masks as whole lanes and as bits.
#ifdef __AVX512VL__
    static INLINE F only(F x, Mask mask) {
        if constexpr (W == 16) return bits_as<F>(_mm512_maskz_mov_ps(mask, bits_as<__m512>(x)));
        else return bits_as<F>(_mm512_maskz_mov_pd(mask, bits_as<__m512d>(x)));
    }
    template <int HOW> static INLINE Mask compare(F x, F y) {
        if constexpr (W == 16) return _mm512_cmp_ps_mask(bits_as<__m512>(x), bits_as<__m512>(y), HOW);
        else return _mm512_cmp_pd_mask(bits_as<__m512d>(x), bits_as<__m512d>(y), HOW);
    }
    static INLINE Mask above(F x, F y) { return compare<_CMP_GT_OQ>(x, y); }
    static INLINE Mask differ(F x, F y) { return compare<_CMP_NEQ_UQ>(x, y); }
    static INLINE Mask equal(I x, I y) {
        if constexpr (W == 16) return _mm512_cmpeq_epi32_mask(bits_as<__m512i>(x), bits_as<__m512i>(y));
        else return _mm512_cmpeq_epi64_mask(bits_as<__m512i>(x), bits_as<__m512i>(y));
    }
    static INLINE Mask mask(I x) {
        if constexpr (W == 16) return _mm512_movepi32_mask(bits_as<__m512i>(x));
        else return _mm512_movepi64_mask(bits_as<__m512i>(x));
    }
    static INLINE I ones(Mask mask) {
        if constexpr (W == 16) return bits_as<I>(_mm512_movm_epi32(mask));
        else return bits_as<I>(_mm512_movm_epi64(mask));
    }
    static INLINE int to_bits(Mask mask) { return mask; }
    static INLINE Mask from_bits(int bits) { return Mask(bits); }
#else
    static INLINE F only(F x, Mask mask) { return bits_as<F>(bits_as<I>(x) & mask); }
    static INLINE Mask above(F x, F y) { return x > y; }
    static INLINE Mask differ(F x, F y) { return x != y; }
    static INLINE Mask equal(I x, I y) { return x == y; }
    static INLINE Mask mask(I x) { return x; }
    static INLINE I ones(Mask mask) { return mask; }
    static INLINE Mask from_bits(int bits) { return ((I{} + bits) & bit()) != 0; }
    static INLINE int to_bits(Mask mask) {
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
#endif

    // Lanes of x: those that NAMES * W bytes name. With AVX2 they name 32 bits each.
#ifdef __AVX512VL__
    static constexpr int NAMES = 1;
    static INLINE I lanes(const uint8_t *p) {
        if constexpr (W == 16) return bits_as<I>(_mm512_cvtepu8_epi32(read<__m128i>(p)));
        else return bits_as<I>(_mm512_cvtepu8_epi64(_mm_cvtsi64_si128(read<int64_t>(p))));
    }
#elif defined(__AVX2__)
    static constexpr int NAMES = 8 / W;
    static INLINE I lanes(const uint8_t *p) {
        return bits_as<I>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(read<int64_t>(p))));
    }
#else
    static constexpr int NAMES = 1;
    static INLINE I lanes(const uint8_t *p) { return convert<I>(read<Vec<uint8_t, W>>(p)); }
#endif
    // Between W float64 and a vector. GCC 12 converts two numbers at a time.
    static INLINE F from_doubles(const double *p) {
#ifdef __AVX512VL__
        if constexpr (W == 16)
            return bits_as<F>(_mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(_mm512_loadu_pd(p))),
                                                 _mm512_cvtpd_ps(_mm512_loadu_pd(p + 8)), 1));
        else return read<F>(p);
#elif defined(__AVX2__)
        if constexpr (W == 8)
            return bits_as<F>(_mm256_set_m128(_mm256_cvtpd_ps(_mm256_loadu_pd(p + 4)), _mm256_cvtpd_ps(_mm256_loadu_pd(p))));
#endif
        F x;
        for (int k = 0; k < W; k++) x[k] = T(p[k]);
        return x;
    }
    struct Halves {
        Vec<double, W / 2> low, high;
    };
    static INLINE Halves to_doubles(F x) {
#ifdef __AVX512VL__
        if constexpr (W == 16) {
            const __m512 all = bits_as<__m512>(x);
            return {bits_as<Vec<double, 8>>(_mm512_cvtps_pd(_mm512_castps512_ps256(all))),
                    bits_as<Vec<double, 8>>(_mm512_cvtps_pd(_mm512_extractf32x8_ps(all, 1)))};
        }
#elif defined(__AVX2__)
        if constexpr (W == 8) {
            const __m256 all = bits_as<__m256>(x);
            return {bits_as<Vec<double, 4>>(_mm256_cvtps_pd(_mm256_castps256_ps128(all))),
                    bits_as<Vec<double, 4>>(_mm256_cvtps_pd(_mm256_extractf128_ps(all, 1)))};
        }
#endif
        Vec<T, W / 2> halves[2];
        std::memcpy(halves, &x, sizeof x);
        return {convert<Vec<double, W / 2>>(halves[0]), convert<Vec<double, W / 2>>(halves[1])};
    }
#ifdef __AVX2__
    // The sums of the lanes of as many vectors.
    static INLINE Vec<float, 8> sums_of_256_bits(const Vec<float, 8> *x) {
        auto pairs = [&](int k) { return _mm256_hadd_ps(bits_as<__m256>(x[k]), bits_as<__m256>(x[k + 1])); };
        const __m256 a = _mm256_hadd_ps(pairs(0), pairs(2)), b = _mm256_hadd_ps(pairs(4), pairs(6));
        return bits_as<Vec<float, 8>>(_mm256_permute2f128_ps(a, b, 0x20)) + bits_as<Vec<float, 8>>(_mm256_permute2f128_ps(a, b, 0x31));
    }
    static INLINE Vec<double, 4> sums_of_256_bits(const Vec<double, 4> *x) {
        const __m256d a = _mm256_hadd_pd(bits_as<__m256d>(x[0]), bits_as<__m256d>(x[1]));
        const __m256d b = _mm256_hadd_pd(bits_as<__m256d>(x[2]), bits_as<__m256d>(x[3]));
        return bits_as<Vec<double, 4>>(_mm256_permute2f128_pd(a, b, 0x20)) + bits_as<Vec<double, 4>>(_mm256_permute2f128_pd(a, b, 0x31));
    }
#endif
    // The sums of the lanes of each of W vectors.
    static INLINE F sums(const F *x) {
#ifdef __AVX512VL__
        F result;
        Vec<T, W / 2> halves[W];
        for (int k = 0; k < W; k++) {
            Vec<T, W / 2> both[2];
            std::memcpy(both, x + k, sizeof both);
            halves[k] = both[0] + both[1];
        }
        Vec<T, W / 2> sums[2] = {sums_of_256_bits(halves), sums_of_256_bits(halves + W / 2)};
        std::memcpy(&result, sums, sizeof sums);
        return result;
#elif defined(__AVX2__)
        return sums_of_256_bits(x);
#else
        F result{};
        for (int k = 0; k < W; k++)
            for (int lane = 0; lane < W; lane++) result[k] += x[k][lane];
        return result;
#endif
    }
    template <class V> static INLINE V pick(V x, I which) {
#ifdef __AVX512VL__
        if constexpr (W == 16) return bits_as<V>(_mm512_permutexvar_epi32(bits_as<__m512i>(which), bits_as<__m512i>(x)));
        else return bits_as<V>(_mm512_permutexvar_epi64(bits_as<__m512i>(which), bits_as<__m512i>(x)));
#elif defined(__AVX2__)
        return bits_as<V>(_mm256_permutevar8x32_epi32(bits_as<__m256i>(x), bits_as<__m256i>(which)));
#else
        V result;
        for (int k = 0; k < W; k++) result[k] = x[which[k]];
        return result;
#endif
    }
};

INLINE double added(Vec<double, 2> x) { return x[0] + x[1]; }
#ifdef __AVX2__
INLINE double added(Vec<double, 4> x) {
    __m256d all = bits_as<__m256d>(x);
    return added(bits_as<Vec<double, 2>>(_mm256_castpd256_pd128(all)) + bits_as<Vec<double, 2>>(_mm256_extractf128_pd(all, 1)));
}
#endif
#ifdef __AVX512VL__
INLINE double added(Vec<double, 8> x) {
    Vec<double, 4> halves[2];
    std::memcpy(halves, &x, sizeof x);
    return added(halves[0] + halves[1]);
}
#endif
// A sum in float64, to which vectors are added.
template <class T> class Sum {
    using L = Lanes<T>;
    static constexpr int H = L::W / 2;
    Vec<double, H> low{}, high{};

  public:
    INLINE void add(typename L::F x) {
        const auto halves = L::to_doubles(x);
        low += halves.low, high += halves.high;
    }
    INLINE double total() const { return added(low + high); }
};
template <> class Sum<double> {
    Lanes<double>::F sum{};

  public:
    INLINE void add(Lanes<double>::F x) { sum += x; }
    INLINE double total() const { return added(sum); }
};

}  // namespace
}  // namespace mml
