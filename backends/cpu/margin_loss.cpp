#include "margin_loss.h"

#include <cmath>
#include <cstring>
#include <limits>

namespace mml {
namespace {

template <class T> T read(const char *p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
}
template <class T> void write(char *p, T value) { std::memcpy(p, &value, sizeof value); }

// The bits of 16-bit floats, told apart by type.
struct Half { uint16_t bits; };
struct Bfloat { uint16_t bits; };

template <class E> struct Computing { using type = float; };
template <> struct Computing<double> { using type = double; };

double widen(double x) { return x; }
float widen(float x) { return x; }
float widen(Bfloat x) {
    uint32_t u = uint32_t(x.bits) << 16;
    return read<float>(reinterpret_cast<char *>(&u));
}
float widen(Half x) {
    // Exponent and mantissa move to their places in a float32; times 2**112 mends the exponent's
    // bias and normalises subnormals; infinity and NaN get the full exponent.
    uint32_t moved = (x.bits & 0x7fffu) << 13;
    float finite = read<float>(reinterpret_cast<char *>(&moved)) * 0x1p112f;
    uint32_t u = read<uint32_t>(reinterpret_cast<char *>(&finite));
    if (moved >= 0x0f800000u) u |= 0x7f800000u;
    u |= (x.bits & 0x8000u) << 16;
    return read<float>(reinterpret_cast<char *>(&u));
}

// To nearest even. A float64 goes through a float32 whose last bit is set where it isn't exact: so
// it is rounded once.
float sticky(double x) {
    float f = float(x);
    if (double(f) == x || x != x) return f;
    uint32_t u = read<uint32_t>(reinterpret_cast<char *>(&f));
    if (std::fabs(double(f)) > std::fabs(x)) u -= 1;
    u |= 1;
    return read<float>(reinterpret_cast<char *>(&u));
}
template <class E> E narrow(double x);
template <> double narrow<double>(double x) { return x; }
template <> float narrow<float>(double x) { return float(x); }
template <> Bfloat narrow<Bfloat>(double x) {
    float f = sticky(x);
    uint32_t u = read<uint32_t>(reinterpret_cast<char *>(&f));
    if (f != f) return {0x7fc0};
    return {uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
template <> Half narrow<Half>(double x) {
    float f = sticky(x);
    uint32_t u = read<uint32_t>(reinterpret_cast<char *>(&f)), size = u & 0x7fffffffu;
    uint16_t sign = uint16_t(u >> 16 & 0x8000u);
    if (f != f) return {0x7e00};
    if (size >= 0x47800000u) return {uint16_t(sign | 0x7c00)};
    if (size < 0x38800000u) {  // subnormal: the last bit of 0.5 is the smallest float16
        float half = read<float>(reinterpret_cast<char *>(&size)) + 0.5f;
        return {uint16_t(sign | (read<uint32_t>(reinterpret_cast<char *>(&half)) - 0x3f000000u))};
    }
    return {uint16_t(sign | ((size + 0xc8000fffu + (size >> 13 & 1)) >> 13))};
}

// Calls f with a value of the element type.
template <class F> auto with_float(Type type, F f) {
    switch (type) {
        case Type::f64: return f(double{});
        case Type::f16: return f(Half{});
        case Type::bf16: return f(Bfloat{});
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

// Exponents: a term of the loss, and its derivative.
struct One {
    explicit One(double) {}
    double term(double h) const { return h; }
    double slope(double h) const { return h > 0 ? 1 : h; }
};
struct Two {
    explicit Two(double) {}
    double term(double h) const { return h * h; }
    double slope(double h) const { return 2 * h; }
};
struct Other {
    double p;
    explicit Other(double p) : p(p) {}
    double term(double h) const { return h == 0 ? 0 : std::pow(h, p); }
    double slope(double h) const { return h == 0 ? 0 : p * std::pow(h, p - 1); }
};

constexpr int IGNORED = -2, OUTSIDE = -1;

// The target's place among the call's classes; OUTSIDE, or IGNORED.
int32_t target(const Call &call, int64_t i, bool &bad) {
    return with_integer(call.y.type, [&](auto zero) {
        using I = decltype(zero);
        I y = read<I>(call.y.at(i));
        bool is_signed = std::numeric_limits<I>::is_signed;
        if (call.ignores && (is_signed ? !call.ignore_is_large && int64_t(y) == call.ignore
                                       : (call.ignore_is_large || call.ignore >= 0) &&
                                             uint64_t(y) == uint64_t(call.ignore)))
            return IGNORED;
        bool large = !is_signed && uint64_t(y) > uint64_t(std::numeric_limits<int64_t>::max());
        int64_t place = int64_t(y) - (large ? 0 : call.first);
        if (!large && 0 <= place && place < call.classes) return int32_t(place);
        bad = true;
        return OUTSIDE;
    });
}

template <class E, class P> struct Rows {
    using T = typename Computing<E>::type;
    static T score(const Call &c, const char *row, int64_t j) {
        return widen(read<E>(row + j * c.x.step));
    }
    static double hinge(T x, T own, T margin) {
        T z = (x - own) + margin;
        return z <= 0 ? 0 : double(z);
    }
    static void block(const Call &c, int64_t start, int64_t stop, Result &result) {
        P power(c.p);
        T margin = T(c.margin);
        for (int64_t i = start; i < stop; i++) {
            const char *row = c.x.at(i);
            bool bad = false;
            int32_t y = target(c, i, bad);
            if (y == IGNORED) {
                if (c.losses.data) write(c.losses.at(i), narrow<E>(0));
                if (c.grad.data) fill(c, i, 0);
                if (c.sums.data) write(c.sums.at(i), 0.0), write(c.slopes.at(i), 0.0);
                continue;
            }
            T own = c.part ? read<T>(c.own.at(i))
                           : bad ? std::numeric_limits<T>::quiet_NaN() : score(c, row, y);
            double sum = c.classes == 1 && own != own ? own : 0, slope = 0;
            for (int64_t j = 0; j < c.classes; j++) {
                if (j == y) continue;
                double h = hinge(score(c, row, j), own, margin);
                sum += power.term(h) * c.shrink;
                slope += power.slope(h);
            }
            if (own != own) sum = slope = own;
            result.count++;
            result.bad |= bad && !c.part;
            double w = 1;
            if (c.weight.data && y >= 0) w = T(load_float(c.weight.at(y), c.weight.type));
            if (c.part) {
                if (c.sums.data) {
                    write(c.sums.at(i), sum);
                    write(c.slopes.at(i), sum != sum ? sum : slope);
                }
                if (c.grad.data) slope = sum = read<double>(c.slopes.at(i));
            }
            double loss = sum / double(c.classes) * w;
            result.sum += loss;
            if (c.losses.data) write(c.losses.at(i), narrow<E>(loss / c.shrink));
            if (c.bits) keep(c, i, row, y, own, margin, loss);
            if (!c.grad.data) continue;
            if (loss != loss) {
                fill(c, i, std::numeric_limits<double>::quiet_NaN());
                continue;
            }
            double scale = row_scale(c, i, w);
            for (int64_t j = 0; j < c.classes; j++) {
                double h = hinge(score(c, row, j), own, margin);
                double g = j == y ? -slope * scale : h > 0 ? T(power.slope(h)) * T(scale) : 0;
                write(c.grad.at(i) + j * c.grad.step, narrow<E>(T(g)));
            }
        }
    }
    static double row_scale(const Call &c, int64_t i, double w) {
        double scale = c.part ? c.scale : c.scale * w / double(c.classes);
        return c.upstream.data ? scale * load_float(c.upstream.at(i), c.upstream.type) : scale;
    }
    static void fill(const Call &c, int64_t i, double value) {
        for (int64_t j = 0; j < c.classes; j++)
            write(c.grad.at(i) + j * c.grad.step, narrow<E>(value));
    }
    static void keep(const Call &c, int64_t i, const char *row, int32_t y, T own, T m, double loss) {
        uint8_t *bits = c.bits + i * row_bytes(c.x.type, c.classes);
        std::memset(bits, loss != loss ? 255 : 0, row_bytes(c.x.type, c.classes));
        for (int64_t j = 0; j < c.classes; j++)
            if (j != y && hinge(score(c, row, j), own, m) > 0) bits[j / 8] |= 1 << j % 8;
    }
    // The gradient of p = 1 from the bits that the loss kept.
    static void bits_block(const Call &c, int64_t start, int64_t stop, Result &) {
        for (int64_t i = start; i < stop; i++) {
            const uint8_t *bits = c.bits + i * row_bytes(c.x.type, c.classes);
            bool bad = false;
            int32_t y = target(c, i, bad);
            if (y < 0 || bits[y / 8] >> y % 8 & 1) {
                fill(c, i, y == IGNORED ? 0 : std::numeric_limits<double>::quiet_NaN());
                continue;
            }
            double w = c.weight.data ? T(load_float(c.weight.at(y), c.weight.type)) : T(1);
            double scale = row_scale(c, i, w), slope = 0;
            for (int64_t j = 0; j < c.classes; j++) {
                bool on = bits[j / 8] >> j % 8 & 1;
                slope += on;
                write(c.grad.at(i) + j * c.grad.step, narrow<E>(on ? T(scale) : 0));
            }
            write(c.grad.at(i) + y * c.grad.step, narrow<E>(T(-slope * scale)));
        }
    }
};

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
    return with_float(type, [&](auto e) { return double(widen(read<decltype(e)>(p))); });
}
void store_float(char *p, Type type, double value) {
    with_float(type, [&](auto e) { write(p, narrow<decltype(e)>(value)); });
}
int64_t count_not_ignored(const Call &call) {
    int64_t count = 0;
    bool bad = false;
    for (int64_t i = 0; i < call.rows; i++) count += target(call, i, bad) != IGNORED;
    return count;
}
int64_t row_bytes(Type, int64_t classes) { return (classes + 7) / 8; }
Block loss_block(const Call &c) {
    return with_float(c.x.type, [&](auto e) -> Block {
        using E = decltype(e);
        return c.p == 1 ? Rows<E, One>::block : c.p == 2 ? Rows<E, Two>::block : Rows<E, Other>::block;
    });
}
Block grad_block(const Call &c) { return loss_block(c); }
Block bits_block(const Call &c) {
    return with_float(c.x.type, [](auto e) -> Block { return Rows<decltype(e), One>::bits_block; });
}
bool walks_tiles(const Call &) { return false; }
void own_scores(const Call &c) {
    bool bad = false;
    for (int64_t i = 0; i < c.rows; i++) {
        int32_t y = target(c, i, bad);
        double own = y < 0 ? 0 : load_float(c.x.at(i) + y * c.x.step, c.x.type);
        store_float(c.own.at(i), c.own.type, own);
    }
}

}  // namespace mml
