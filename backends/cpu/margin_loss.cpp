// The kernels: rows of scores in, sums and gradients out, on one thread.
//
// Rows are walked in vectors of the machine's width, the last of which overlaps the one before: so
// no row ends in single steps. The target's class is left out by comparing indices. No fast-math:
// the order (x_j - x_y) + margin and of all additions is as written. A lane adds at most LANE_TERMS
// numbers in float32, then the sum goes to float64; where float32 overflowed, the row is summed again
// in float64.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("vect-cost-model=dynamic")  // with -O2 as fast as -O3, which builds in 1.5 times the time
#endif
#include "margin_loss.h"

#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "lanes.h"

namespace mml {
namespace {

constexpr int LANE_TERMS = 16;
constexpr int GROUP = 64;         // rows whose targets are looked up together, at most
constexpr int64_t NEAR = 4096;    // bytes of rows that are
constexpr int64_t AHEAD = 6144;     // bytes from what is read to what is fetched, about
constexpr int64_t STAGE = 1 << 17;  // bytes of rows that are copied together
constexpr int64_t JOINED = 1 << 15;  // of rows that are put together from pieces: the nearest cache
constexpr double LARGE = 0x1p64;  // the unit in which sums that overflow float64 are kept
constexpr double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();
constexpr int32_t OUTSIDE = -1, IGNORED = -2;

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
#pragma GCC unroll 1  // unrolled, a general power takes a third longer
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
    using F = typename L::F;
    using Pairs = Vec<int64_t, WIDTH / 8>;
    typename L::I minus{};
    int64_t count = 0;

  public:
    INLINE void add(F slope, int which) {
        const auto active = L::above(slope, F{});
        if (which < ALONE) minus += L::ones(active);
        else count += __builtin_popcount(unsigned(L::to_bits(active)));
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
        for (int32_t &place : y) place = IGNORED;
    }
};

// What a call's targets are compared with.
struct Classes {
    int64_t first, count, ignore;
    bool ignores, ignore_is_large;
    explicit Classes(const Call &c)
        : first(c.first), count(c.classes), ignore(c.ignore), ignores(c.ignores), ignore_is_large(c.ignore_is_large) {}

    template <class I> INLINE int32_t of(I y) const {
        constexpr bool is_signed = std::numeric_limits<I>::is_signed;
        if (ignores && (is_signed ? !ignore_is_large && int64_t(y) == ignore
                                  : (ignore_is_large || ignore >= 0) && uint64_t(y) == uint64_t(ignore)))
            return IGNORED;
        return place(y);
    }
    // Without a branch.
    template <class I> INLINE int32_t place(I y) const {
        // What is below the first class, or too large for int64, is a large unsigned number.
        uint64_t place = uint64_t(int64_t(y)) - uint64_t(first);
        bool large = !std::numeric_limits<I>::is_signed && uint64_t(y) > uint64_t(std::numeric_limits<int64_t>::max());
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
        using Y = decltype(zero);
        const char *p = c.y.data + start * int64_t(sizeof(Y));
        if (classes.ignores || c.y.ndim != 1 || c.y.stride[0] != sizeof(Y))
            return each(c.y, start, count, [&](int64_t k, const char *at) { y[k] = classes.of(read<Y>(at)); });
        for (int64_t k = 0; k < count; k++, p += sizeof(Y)) y[k] = classes.place(read<Y>(p));
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
// What own scores are multiplied by: beside an infinite margin no score's distance to them may be
// infinite too, as that of two finite scores is when it is more than the type can hold.
template <class E> double own_factor(const Call &c) { return std::isinf(One::Computing<E>(c.margin)) ? 0x1p-100 : 1; }
template <class T> INLINE T no_score(int32_t y) {  // beside infinity no class is within the margin
    return T(y == IGNORED ? INFINITY : NOT_A_NUMBER);
}
// The own scores of rows without gaps. Branches would take twice the time.
template <class E, class T> INLINE void look_up_own(const char *rows, int n, Group<T> &g) {
    int32_t place[GROUP], outside = 0;
    for (int t = 0, begin = 0; t < GROUP; t++, begin += n) {  // all: in vectors
        const int32_t y = g.y[t], negative = y >> 31;
        outside |= negative;
        place[t] = begin + (y & ~negative);
    }
    for (int t = 0; t < g.count; t++) g.own[t] = T(widen<E>(rows + place[t] * int64_t(sizeof(E))));
    for (int t = 0; outside && t < g.count; t++)
        if (g.y[t] < 0) g.own[t] = no_score<T>(g.y[t]);
}
// Rows from ``start`` on; their scores are those of x from ``at`` on. Of rows without gaps the first is
// enough.
template <class E, class T>
NOINLINE void look_up(const Call &c, const Scores &x, int64_t at, int64_t start, int64_t count, Group<T> &g, bool gaps) {
    const bool needs_own = !c.part && (!c.bits || !c.grad.data);  // the backward pass by bits reads no score
    g.count = int(count);
    look_up_targets(c, start, count, g.y);
    for (int64_t t = count; t % WIDTH; t++) g.y[t] = IGNORED, g.own[t] = no_score<T>(IGNORED);
    if (!gaps) {
        g.row[0] = x.at(at);
        if (needs_own) look_up_own<E>(g.row[0], int(c.classes), g);
    } else {
        each(x, at, count, [&](int64_t t, const char *p) {
            g.row[t] = p;
            if (needs_own) g.own[t] = g.y[t] >= 0 ? T(widen<E>(p + g.y[t] * x.step)) : no_score<T>(g.y[t]);
        });
    }
    if (c.part) each(c.own, start, count, [&](int64_t t, const char *p) { g.own[t] = T(load_float(p, c.own.type)); });
    const T factor = T(own_factor<E>(c));
    for (int64_t t = 0; factor != 1 && t < count; t++) g.own[t] *= factor;
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

// ---- The classes of each row's highest scores: NaN first, then by score, then by class.

template <class E> struct Highest {
    using T = One::Computing<E>;
    using L = Lanes<T>;
    static constexpr int64_t W = L::W, STEP = 4 * W;

    const char *row;
    int64_t *found;  // the classes, in order
    const int wanted;
    int count = 0;
    int64_t seen = 0;
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
        if (!L::to_bits(L::mask(any))) return;
        for (int v = 0; v < 4; v++)
            for (unsigned bits = unsigned(L::to_bits(L::mask(higher[v]))); bits; bits &= bits - 1)
                take(j + v * W + __builtin_ctz(bits));
    }
    // Look at the classes before ``stop``; at a few of them later on, if that isn't the row's end.
    INLINE void look(int64_t stop) {
        for (; seen < wanted; seen++) take(seen);
        for (; seen + STEP <= stop; seen += STEP) take_higher(seen);
    }
    INLINE void finish(int64_t n) {
        look(n);
        for (; seen < n; seen++) take(seen);
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
            Highest{c.x.at(start), c.highest + start * c.wanted, c.wanted}.finish(c.classes);
    }
};

// ---- The kernels for scores of type E, the exponent P, classes side by side (UNIT) or not.

template <class E, class P> struct FewClasses;

template <class E, class P, bool UNIT> struct Kernel {
    using T = typename P::template Computing<E>;
    using L = Lanes<T>;
    static constexpr int W = L::W;
    using F = typename L::F;
    using I = typename L::I;
    using Mask = typename L::Mask;
    using Bits = typename std::conditional<(W > 8), uint16_t, uint8_t>::type;  // of a vector
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
    const Mask rest;               // the lanes of the last vector that no other covers

    // Rows whose classes do not lie side by side, or are fewer than a vector, are worked on in copies.
    const bool few, staged;
    const int64_t pitch;           // bytes from copy to copy
    const int64_t in_step, out_step;
    const int64_t ahead;           // bytes from what is read to what is fetched
    char *copies = nullptr;        // of the gradient's rows, from row ``base`` on
    int64_t base = 0;

    explicit Kernel(const Call &c)
        : c(c), power(c.p, LARGEST), margin(L::all(T(One::Computing<E>(c.margin)))), n(c.classes),
          whole(n / W * W), last(n < W ? 0 : n - W), bytes(row_bytes(c.x.type, n)), common(c.scale * power.factor / (c.part ? 1 : double(n))),
          rest(L::mask((L::iota() >= (I{} + typename L::Index(whole - last))) &
                       (L::iota() < (I{} + typename L::Index(n - last))))),
          few(is_few(c)), staged(UNIT && (c.pieces || !in_place(c))), pitch(pitch_of(c)), in_step(staged ? SIZE : c.x.step),
          out_step(staged ? SIZE : c.grad.step), ahead(ahead_of(c.x)) {}

    static bool in_place(const Call &c) {
        if (is_few(c)) return is_dense(c.x, c) && (!c.grad.data || is_dense(c.grad, c));
        return c.x.step == SIZE && (!c.grad.data || c.grad.step == SIZE) && c.classes >= W;
    }
    // Rows whose highest scores are found beside their losses; 16 bits are converted by who asks.
    static constexpr bool LOOKS = UNIT && sizeof(E) > 2;
    static bool looks(const Call &c) {
        return LOOKS && c.highest && c.losses.data && c.classes >= RUN && (c.p == 1 || c.p == 2) && in_place(c);
    }
    static bool can_stage(const Call &c) { return pitch_of(c) <= STAGE; }
    // Rows that FewClasses takes.
    static bool is_few(const Call &c) { return UNIT && c.classes > 1 && c.classes <= LANE_TERMS && !c.part; }
    static bool is_dense(const Scores &x, const Call &c) {
        return x.step == SIZE && (!x.ndim || (x.ndim == 1 && x.stride[0] == c.classes * SIZE));
    }
    // Whole lines and one more, so that neighbours in a column are not apart by a power of two.
    static int64_t pitch_of(const Call &c) {
        const int64_t n = c.classes;
        return is_few(c) ? n * SIZE : n < 4 * W ? (n > W ? n : W) * SIZE : (n * SIZE / 64 + 2) * 64;
    }
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
    // What the scores' own computing type can't hold is infinite, where powers are taken in a wider one.
    template <class V> static INLINE V difference(V x, V own) {
        V z = x - own;
        if constexpr (sizeof(T) > sizeof(One::Computing<E>)) {
            z = z > LARGEST ? V{} + T(INFINITY) : z;
            z = z < -LARGEST ? V{} - T(INFINITY) : z;
        }
        return z;
    }
    // max(0, z), and 0 for the target's class; NaN stays. ``at``: the target's place minus j.
    INLINE F hinge(F x, Mask own_class, F own) const {
        return L::only(L::relu(difference(x, own) + margin), Mask(~own_class));
    }
    INLINE F hinge(const char *row, int64_t j, int shift, I at, F own) const {
        return hinge(scores(row, j + shift, in_step), L::equal(L::iota() + shift, at), own);
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
    struct Look : Nothing {  // for the highest scores, while a run of them is in the nearest cache
        Highest<E> highest;
        const int64_t n;
        int64_t stop = 0;
        Look(const Kernel &k, int64_t i, const char *row)
            : highest{row, k.c.highest + i * k.c.wanted, k.c.wanted}, n(k.n) {}
        INLINE void whole(int64_t j, F, int) { stop = j + W; }
        INLINE void flush() { highest.look(stop); }
        INLINE void end() { highest.finish(n); }
    };
    struct Keep : Nothing {  // a bit for each class, of p = 1
        uint8_t *bits;
        int64_t final;
        Keep(const Kernel &k, int64_t i) : bits(k.c.bits + i * k.bytes), final(k.bytes - int64_t(sizeof(Bits))) {}
        INLINE void whole(int64_t j, F h, int) { write(bits + j / W * sizeof(Bits), Bits(L::to_bits(L::above(h, F{})))); }
        INLINE void last(F h) { write(bits + final, Bits(L::to_bits(L::above(h, F{})))); }
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
        using Value = typename std::conditional<sizeof(E) == 2, Vec<uint32_t, W>, F>::type;
        Value value;

      public:
        explicit Same(double scale) {
            if constexpr (sizeof(E) == 2) value = Value{} + in_element_type(L::all(T(scale)))[0];
            else value = L::all(T(scale));
        }
        explicit Same(F scales) : value(convert<Value>(in_element_type(scales))) {}  // by lanes
        INLINE Same of(I which) const {
            Same picked = *this;
            picked.value = L::pick(value, which);
            return picked;
        }
        INLINE auto where(Mask mask) const {
            if constexpr (sizeof(E) == 2) return to_16_bits<W>(value & bits_as<Value>(L::ones(mask)));
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
            if constexpr (SAME) k.put(to, j, scale.where(L::above(h, F{})));
            else k.put(to, j, in_element_type(L::only(slope * scale, L::differ(slope, F{}))));  // no 0 * infinity
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
            T z = difference(T(widen<E>(row + j * in_step)), own) + margin[0];
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
        // In large units slopes may be so small that their product with the scale has no digits left.
        const double sum = s.slopes * s.unit, whole = sum < INFINITY ? sum * scale : s.slopes * scale * s.unit;
        T own = T(-(sum == 0 ? 0 : whole));
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
        // The weight last: large, it would make the product with a small upstream gradient infinite.
        return (c.upstream.data ? common * load_float(c.upstream.at(i), c.upstream.type) : common) * weight;
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
        if (c.bits && !few) std::memset(c.bits + i * bytes, 0, size_t(bytes));
    }
    // Looking up targets here and there hides from the processor that rows are read in turn: what
    // comes next is fetched by hand.
    INLINE void fetch(const char *p, int64_t bytes) const {
        if constexpr (UNIT)
            for (int64_t k = 0; k < bytes; k += 64) __builtin_prefetch(p + ahead + k);
    }

    // Adds up the rows of a group. Returns how many are ignored.
    template <class Make> INLINE int64_t add_rows(int64_t start, const Group<T> &g, Sum<T> &sum, Make make) const {
        const int64_t rows = n < RUN ? LANE_TERMS - 6 - n / STEP : 1;
        int64_t ignored = 0;
        for (int64_t t = 0; t < g.count;) {
            F s{};
            for (int64_t stop = t + rows < g.count ? t + rows : g.count; t < stop; t++) {
                if (g.y[t] == IGNORED) {
                    ignore(start + t), ignored++;
                    continue;
                }
                auto each = make(start + t, t);
                s += terms(g.row[t], g.y[t], g.own[t], L::all(T(g.weight[t])), each, sum);
                each.end();
            }
            sum.add(s);
        }
        return ignored;
    }
    // Writes the losses of the rows of a group. False where one is not finite, or its row ignored.
    template <class Make> INLINE bool write_rows(int64_t start, const Group<T> &g, Make make) const {
        double sums[GROUP];
        for (int64_t t = 0; t < g.count; t++) {
            if (g.y[t] < 0) return false;
            auto each = make(start + t, t);
            sums[t] = row_terms(g, int(t), each);
            each.end();
        }
        for (int64_t t = g.count; t % WIDE; t++) sums[t] = 0;
        return write_losses(start, g, sums);
    }
    // The losses of a group from the sums of its rows. False where one is not finite.
    INLINE bool write_losses(int64_t start, const Group<T> &g, const double *sums) const {
        double losses[GROUP];
        Vec<int64_t, WIDE> odd{};
        for (int64_t t = 0; t < g.count; t += WIDE) {
            const Wide loss = read<Wide>(sums + t) / double(n) * read<Wide>(g.weight + t);
            odd |= loss - loss != 0;
            write(losses + t, loss);
        }
        if (Lanes<double>::to_bits(Lanes<double>::mask(odd))) return false;
        int64_t t = 0;
        if (c.losses.ndim == 1 && c.losses.stride[0] == SIZE)
            for (char *to = c.losses.at(start); t + WIDE <= g.count; t += WIDE)
                write(to + t * SIZE, rounded<E>(read<Wide>(losses + t)));
        const int64_t done = t;
        if (t < g.count)
            each(c.losses, start + t, g.count - t, [&](int64_t t, char *p) { store_rounded<E>(p, losses[done + t]); });
        return true;
    }
    // Rows of which nothing needs a closer look. Where their own losses are not asked for, a lane adds
    // up several. False where one does need it: the usual way finds it, and what it comes to. Beside
    // scattered reads it would save nothing, and take a sixth of the time of a build.
    template <class Make> INLINE bool together(int64_t start, const Group<T> &g, Result &result, Make make) const {
        if constexpr (!UNIT) return false;
        if (n == 1 || c.part) return false;
        if (c.losses.data) return write_rows(start, g, make);
        Sum<T> sum;
        int64_t ignored = add_rows(start, g, sum, make);
        return take(sum.total() * c.shrink, g.count - ignored, result);
    }
    static INLINE bool take(double total, int64_t count, Result &result) {
        if (total - total != 0) return false;
        result.sum += total;
        result.count += count;
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
        if constexpr (UNIT)
            if (few) return FewClasses<E, P>(*this, start, g).losses(result);
        if constexpr (LOOKS)
            if (looks(c)) {
                auto look = [&](int64_t i, int64_t t) { return Look(*this, i, g.row[t]); };
                if (together(start, g, result, look)) return;
                Highest<E>::find(c, start, start + g.count);
                return each_loss(start, g, result);
            }
        if (together(start, g, result, [&](int64_t, int64_t) { return Nothing(); })) return;
        each_loss(start, g, result);
    }
    NOINLINE void each_loss(int64_t start, const Group<T> &g, Result &result) const {
        each_row(start, g, result, [&](int t, int64_t i) {
            Nothing nothing;
            account(i, checked(g, t, row_terms(g, t, nothing), 0), g.weight[t], result);
        });
    }
    void losses_and_bits(int64_t start, const Group<T> &g, Result &result) const {
        if constexpr (UNIT)
            if (few) return FewClasses<E, P>(*this, start, g).losses_and_bits(result);
        if (together(start, g, result, [&](int64_t i, int64_t) { return Keep(*this, i); })) return;
        each_row(start, g, result, [&](int t, int64_t i) {
            Keep keep(*this, i);
            Sums s = checked(g, t, row_terms(g, t, keep), 0);
            double loss = account(i, s, g.weight[t], result);
            if (loss != loss) std::memset(keep.bits, 255, size_t(bytes));
        });
    }
    void gradients(int64_t start, const Group<T> &g, Result &result) const {
        if constexpr (UNIT)
            if (few) return FewClasses<E, P>(*this, start, g).gradients(result);
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
                // The bits of few classes lie in an order of their own, whatever memory there is.
                char small[2 * GROUP * LANE_TERMS * SIZE], *room = kernel.few ? small : stage();
                if (room) return kernel.in_stages(room, start, stop, work);
                return Kernel<E, P, false>::in_groups(c, start, stop, work);
            }
        Group<T> group;
        // Few rows at a time where they are long: what a look at the target has fetched is in reach.
        const int64_t size = kernel.few ? GROUP : group_size(NEAR / (c.classes * SIZE));
        for (int64_t first = start; first < stop; first += size) {
            look_up<E>(c, c.x, first, first, first + size < stop ? size : stop - first, group, !kernel.few);
            work(kernel, first, group);
        }
    }
    static int64_t group_size(int64_t rows) { return rows > GROUP ? GROUP : rows < 1 ? 1 : rows; }

    template <class Work> NOINLINE void in_stages(char *in, int64_t start, int64_t stop, Work work) {
        Group<T> group;
        char *rows[GROUP];
        const int64_t size = group_size(STAGE / pitch);
        std::memset(in, 0, size_t(size * pitch));
        copies = in + size * pitch;
        for (base = start; base < stop; base += size) {
            const int64_t count = base + size < stop ? size : stop - base;
            look_up<E>(c, c.x, base, base, count, group, true);
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
    static bool can_join(const Call &c) { return pitch_of(c) <= JOINED; }
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
            look_up<E>(c, joined, 0, first, count, group, !few);
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
            if constexpr (std::remove_reference_t<decltype(k)>::SIDE_BY_SIDE)
                if (k.few) return FewClasses<E, P>(k, first, g).gradients_of_bits(result);
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
        const int64_t count = from_bits(bits, to, Same(scale));
        finish(to, y, 0, {0, double(count), 1}, scale);
    }
    INLINE bool bit_of(const uint8_t *bits, int64_t y) const {
        const int64_t place = y < whole ? y / W : whole / W, bit = y < whole ? y % W : y - last;
        return read<Bits>(bits + place * int64_t(sizeof(Bits))) >> bit & 1;
    }
    INLINE int64_t from_bits(const uint8_t *bits, char *to, Same scale) const {
        int64_t count = 0;
        for (int64_t j = 0; j < whole; j += W, bits += sizeof(Bits)) {
            count += __builtin_popcount(read<Bits>(bits));
            put(to, j, scale.where(L::from_bits(read<Bits>(bits))));
        }
        if (whole < n) {
            count += __builtin_popcount(read<Bits>(bits) & unsigned(L::to_bits(rest)));
            put(to, last, scale.where(L::from_bits(read<Bits>(bits))));
        }
        return count;
    }
};

// ---- Few classes: W rows at a time, as n vectors without gaps. Row by row the last vector would
// read some scores again, and most instructions would serve a row alone: 1.3 times the time for 10
// classes, three times for 4.

// Whose row each of the scores belongs to, by the number of classes, in NAMES bytes.
template <int NAMES> struct RowsOfScores {
    uint8_t row[LANE_TERMS + 1][LANE_TERMS * WIDTH / 4] = {};
    constexpr RowsOfScores() {
        for (int n = 1; n <= LANE_TERMS; n++)
            for (int at = 0; at < n * (WIDTH / 4); at++) row[n][at] = uint8_t(at / NAMES / n * NAMES + at % NAMES);
    }
};
template <int NAMES> constexpr RowsOfScores<NAMES> ROWS_OF_SCORES;

template <class E, class P> struct FewClasses {
    using K = Kernel<E, P, true>;
    using T = typename K::T;
    using L = Lanes<T>;
    using F = typename L::F;
    using I = typename L::I;
    static constexpr int W = L::W;
    static constexpr int64_t SIZE = sizeof(E);

    const K &k;
    const Call &c;
    const Group<T> &g;
    const int64_t start;
    const int n;

    FewClasses(const K &k, int64_t start, const Group<T> &g) : k(k), c(k.c), g(g), start(start), n(int(k.n)) {}

    INLINE const char *row(int64_t t) const { return g.row[0] + t * n * SIZE; }
    // Calls f(v, which) for each vector; ``which`` picks what belongs to its rows.
    template <class F_> INLINE void each_vector(F_ f) const {
        const uint8_t *rows = ROWS_OF_SCORES<L::NAMES>.row[n];
#pragma GCC unroll 16  // a tenth of the time of a loss; GCC ignores it where n stands in the condition
        for (int v = 0; v < LANE_TERMS; v++) {
            if (v == n) break;
            f(v, L::lanes(rows + v * W * L::NAMES));
        }
    }
    // Calls f(v, which, hinges) for each vector of the rows from t on.
    template <class F_> INLINE void each_hinge(int64_t t, F_ f) const {
        alignas(WIDTH) char room[LANE_TERMS * W * SIZE];
        const char *from = row(t);
        const int64_t size = W * n * SIZE, there = (g.count - t) * n * SIZE;
        if (there < size) {
            std::memcpy(room, from, size_t(there));
            std::memset(room + there, 0, size_t(size - there));
            from = room;
        }
        k.fetch(from, size);
        const F own = read<F>(g.own + t);
        const I y = convert<I>(read<Vec<int32_t, W>>(g.y + t)) + L::iota() * typename L::Index(n);
        I at = L::iota();
        each_vector([&](int v, I which) {
            const F x = convert<F>(load<W>(from + v * W * SIZE, E{}));
            f(v, which, k.hinge(x, L::equal(L::pick(y, which), at), L::pick(own, which)));
            at += W;
        });
    }

    // A bit for each score of W rows, without gaps.
    struct Bits {
        using Some = typename K::Bits;
        uint8_t bytes[2 * LANE_TERMS + 4];
        INLINE void put(int v, typename L::Mask mask) {
            uint8_t *to = bytes + v * W / 8;
            const int bits = L::to_bits(mask), shift = v * W % 8;
            write(to, Some(shift ? *to | bits << shift : bits));
        }
        INLINE typename L::Mask mask(int v) const { return L::from_bits(read<Some>(bytes + v * W / 8) >> v * W % 8); }
        INLINE unsigned row(int64_t t, int n) const {
            const uint8_t *p = bytes + t * n / 8;
            const unsigned four = p[0] | unsigned(p[1]) << 8 | unsigned(p[2]) << 16 | unsigned(p[3]) << 24;
            return four >> t * n % 8 & ((1u << n) - 1);
        }
    };
    static INLINE void copy(uint8_t *to, const uint8_t *from, size_t size) {
        if (size >= 8) {
            for (size_t k = 0; k + 8 < size && k < 2 * LANE_TERMS; k += 8) write(to + k, read<uint64_t>(from + k));
            write(to + size - 8, read<uint64_t>(from + size - 8));
        } else {
            for (size_t k = 0; k < size; k++) to[k] = from[k];
        }
    }
    INLINE uint8_t *bits_at(int64_t t) const { return c.bits + (start + t) * k.bytes; }
    INLINE size_t bits_size(int64_t t) const {
        return size_t((g.count - t < W ? g.count - t : W) * n + 7) / 8;
    }

    // The sums of W rows whose terms are written one after the other.
    INLINE F row_sums(const T *terms) const {
        F rows[W];
        const auto left = L::mask(I{} + typename L::Index(n % W) > L::iota());
        for (int t = 0; t < W; t++, terms += n) {
            F s{};
            int j = 0;
            for (; j + W <= n; j += W) s += read<F>(terms + j);
            rows[t] = s + L::only(read<F>(terms + j), left);
        }
        return L::sums(rows);
    }
    // As Kernel::together. ``begin`` and ``end`` see where W rows begin, ``each`` their vectors of hinges.
    // Where losses are asked for, ``sums`` are those of the rows' terms.
    template <bool BY_ROW, class Begin, class Each, class End>
    INLINE bool together(Result &result, double *sums, Begin begin, Each each, End end) const {
        T terms[BY_ROW ? GROUP * LANE_TERMS + W : 1];
        Sum<T> sum;
        for (int64_t t = 0; t < g.count; t += W) {
            F s{}, weight{};
            if (!BY_ROW && c.weight.data) weight = L::from_doubles(g.weight + t);
            begin(t);
            each_hinge(t, [&](int v, I which, F h) {
                const F term = k.power.term(h);
                if (BY_ROW) write(terms + t * n + v * W, term);
                else s += c.weight.data ? term * L::pick(weight, which) : term;
                each(v, which, h);
            });
            end(t);
            sum.add(s);
        }
        if (BY_ROW) {
            for (int64_t t = 0; t < g.count; t += W) {
                const auto halves = L::to_doubles(row_sums(terms + t * n));
                write(sums + t, halves.low), write(sums + t + W / 2, halves.high);
            }
            return k.write_losses(start, g, sums);
        }
        int64_t count = 0;
        for (int64_t t = 0; t < g.count; t++) count += g.y[t] != IGNORED;
        return K::take(sum.total() * c.shrink, count, result);
    }
    template <class Begin, class Each, class End>
    INLINE void work(Result &result, Begin begin, Each each, End end) const {
        double sums[GROUP];
        if (c.losses.data ? !together<true>(result, sums, begin, each, end)
                          : !together<false>(result, sums, begin, each, end))
            apart(result, sums);
    }
    INLINE T hinge(int64_t t, int64_t j) const {
        const T z = (widen<E>(row(t) + j * SIZE) - g.own[t]) + k.margin[0];
        return j == g.y[t] || z <= 0 ? 0 : z;
    }
    // Row by row, in float64. What stands beside a row does not change the bits of its loss.
    NOINLINE void apart(Result &result, const double *sums) const {
        if (c.bits) std::memset(bits_at(0), 0, size_t(g.count * k.bytes));
        k.each_row(start, g, result, [&](int64_t t, int64_t i) {
            Sums s = k.careful(row(t), g.y[t], g.own[t]);
            if (c.losses.data && s.unit == 1 && sums[t] - sums[t] == 0) s.terms = sums[t];
            const double loss = k.account(i, s, g.weight[t], result);
            for (int64_t j = 0, at = t % W * n; c.bits && j < n; j++, at++)
                if (loss != loss || hinge(t, j) > 0) bits_at(t - t % W)[at / 8] |= uint8_t(1 << at % 8);
            if (!c.grad.data) return;
            const double scale = k.scale_of(i, g.weight[t]);
            for (int64_t j = 0; j < n; j++) {
                const T h = hinge(t, j), slope = std::is_same<P, One>::value ? 1 : h;
                store_rounded<E>(k.out(i) + j * SIZE, h > 0 ? T(slope * T(scale)) : 0);
            }
            k.finish(k.out(i), g.y[t], loss, s, scale);
        });
    }

    void losses(Result &result) const {
        const auto nothing = [](int64_t) {};
        work(result, nothing, [](int, I, F) {}, nothing);
    }
    void losses_and_bits(Result &result) const {
        Bits bits;
        work(result, [](int64_t) {}, [&](int v, I, F h) { bits.put(v, L::above(h, F{})); },
              [&](int64_t t) { copy(bits_at(t), bits.bytes, bits_size(t)); });
    }

    // The gradients of W rows. Of p = 1: what their active classes get.
    struct Gradients {
        alignas(WIDTH) char room[LANE_TERMS * W * SIZE];  // where there are fewer rows
        char *to;
        double scale[W];
        typename std::conditional<K::Write::SAME, typename K::Same, F>::type factor{F{}};
    };
    INLINE void begin(int64_t t, Gradients &d) const {
        const bool whole = t + W <= g.count;
        d.to = whole ? k.out(start + t) : d.room;
        const bool same = !c.weight.data && !c.upstream.ndim;
        if (same && t) return;
        F factor;
        for (int s = 0; s < W; s++) {
            if (s && same) d.scale[s] = d.scale[0];
            else d.scale[s] = whole || t + s < g.count ? k.scale_of(start + t + s, g.weight[t + s]) : 0;
            factor[s] = T(d.scale[s]);
        }
        d.factor = decltype(d.factor)(factor);
    }
    // The rest of the rows' gradients; ``slopes`` gives a row's sum, NaN where all of its gradient is.
    template <class Slopes> INLINE void end(int64_t t, const Gradients &d, Slopes slopes) const {
        const int64_t count = g.count - t < W ? g.count - t : W;
        T own[W] = {};
        bool ordinary = true;
        for (int64_t s = 0; s < count; s++) {
            own[s] = T(-(slopes(s) * d.scale[s]));
            ordinary &= (g.y[t + s] >= 0) & (own[s] == own[s]);
        }
        if (ordinary) {
            const auto values = K::in_element_type(read<F>(own));
            for (int64_t s = 0; s < count; s++) write(d.to + (s * n + g.y[t + s]) * SIZE, values[s]);
        } else {
            for (int64_t s = 0; s < count; s++) finish(t + s, d.to + s * n * SIZE, slopes(s), d.scale[s]);
        }
        if (d.to == d.room) std::memcpy(k.out(start + t), d.room, size_t(count * n * SIZE));
    }
    NOINLINE void finish(int64_t t, char *to, double slopes, double scale) const {
        if (g.y[t] == IGNORED) return;
        const double loss = g.y[t] == OUTSIDE ? NOT_A_NUMBER : slopes;
        k.finish(to, g.y[t], loss, {0, slopes, 1}, scale);
    }
    void gradients(Result &result) const {
        Gradients d;
        Bits bits;
        T slopes[LANE_TERMS * W + W];
        F sums;
        work(
            result, [&](int64_t t) { begin(t, d); },
            [&](int v, I which, F h) {
                if constexpr (std::is_same<P, One>::value) {
                    const auto active = L::above(h, F{});
                    bits.put(v, active), k.put(d.to, v * W, d.factor.of(which).where(active));
                } else {
                    const F slope = k.power.slope(h), value = L::only(slope * L::pick(d.factor, which), L::differ(slope, F{}));
                    write(slopes + v * W, slope), k.put(d.to, v * W, K::in_element_type(value));
                }
            },
            [&](int64_t t) {
                if constexpr (std::is_same<P, Two>::value) sums = row_sums(slopes);
                end(t, d, [&](int64_t s) {
                    return std::is_same<P, One>::value ? double(__builtin_popcount(bits.row(s, n))) : double(sums[s]);
                });
            });
    }
    void gradients_of_bits(Result &result) const {
        Gradients d;
        Bits bits;
        for (int64_t t = 0; t < g.count; t += W) {
            if (t + W > g.count) bits = {};
            copy(bits.bytes, bits_at(t), bits_size(t));
            begin(t, d);
            each_vector([&](int v, I which) { k.put(d.to, v * W, d.factor.of(which).where(bits.mask(v))); });
            // The target's own bit is set only where the row's loss is NaN.
            end(t, d, [&](int64_t s) {
                const unsigned row = bits.row(s, n);
                return row >> (g.y[t + s] & 31) & 1 ? NOT_A_NUMBER : double(__builtin_popcount(row));
            });
        }
        for (int64_t t = 0; t < g.count; t++) result.bad |= g.y[t] == OUTSIDE;
    }
};

// ---- Where each row's target stands: by how much it leads the highest other score.

constexpr int64_t CACHED = 1 << 18;  // bytes

template <class E> struct Standings {
    using T = One::Computing<E>;
    const Call &c;
    const T margin, factor;
    explicit Standings(const Call &c) : c(c), margin(T(c.margin)), factor(T(own_factor<E>(c))) {}

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
        put(i, own - other, !((other - own * factor) + margin <= 0), y * c.classes + rival);
    }
    INLINE void put(int64_t i, T lead, bool inside, int64_t confused) const {
        c.kinds[i] = uint8_t(inside * INSIDE + (lead > 0) * RIGHT);
        c.bins[i] = bin(lead);
        c.confused[i] = lead <= 0 ? confused : -1;
    }
    // Rows are looked at again while they are in the cache.
    static void block(const Call &c, int64_t start, int64_t stop, Result &result) {
        const int64_t fit = CACHED / (c.classes * int64_t(sizeof(E))), step = fit < 1 ? 1 : fit < GROUP ? fit : GROUP;
        const Standings standings(c);
        int32_t y[GROUP];
        for (; start < stop; start += step) {
            const int64_t count = stop - start < step ? stop - start : step;
            if (c.losses.data) loss_block(c)(c, start, start + count, result);
            if (!Kernel<E, One, true>::looks(c)) Highest<E>::find(c, start, start + count);
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
    if (classes > 1 && classes <= LANE_TERMS) return (classes + 7) / 8;  // of FewClasses, without gaps
    const int lanes = WIDTH / (type == Type::f64 ? 8 : 4);
    return (classes + lanes - 1) / lanes * (lanes > 8 ? 2 : 1);
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
