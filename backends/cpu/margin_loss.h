// The records that the door to Python (module.cpp) hands to the kernels (margin_loss.cpp).
#pragma once
#include <cstdint>

namespace mml {

constexpr int MAX_DIMS = 16;
constexpr int MAX_HIGHEST = 8;
constexpr uint8_t INSIDE = 1, RIGHT = 2;  // another class is within the margin; the target leads
constexpr int BIN_SHIFT = 47;             // the bits of a float64 that a bin leaves out

enum class Type : uint8_t { f64, f32, f16, bf16, i8, i16, i32, i64, u8, u16, u32, u64, none };

// The batch axes of an array, merged where one stride walks several; strides are in bytes.
struct Walk {
    char *data = nullptr;
    Type type = Type::none;
    int ndim = 0;
    int64_t shape[MAX_DIMS], stride[MAX_DIMS];

    char *at(int64_t i) const {  // element i in C order
        return ndim > 1 ? far(i) : data + (ndim ? i * stride[0] : 0);
    }
    __attribute__((noinline)) char *far(int64_t i) const {
        char *place = data;
        for (int d = ndim; d--; i /= shape[d]) place += i % shape[d] * stride[d];
        return place;
    }
};

// An array of scores: where its rows begin, and how many bytes lie between two classes of a row.
struct Scores : Walk {
    int64_t step = 0;
};

// Scores of some of the classes.
struct Piece {
    Scores x;
    int64_t classes;
};

// One call. What has no data was not given or not asked for.
struct Call {
    Scores x;           // (rows, classes)
    const Piece *pieces = nullptr;  // in place of x: arrays whose classes follow one another
    int64_t n_pieces = 0;
    Walk y;             // any integers
    Walk weight;        // (classes), any floats
    int64_t rows, classes;
    double p, margin;
    bool ignores = false, ignore_is_large = false;  // large: above the largest int64
    int64_t ignore = 0;
    bool stop_at_bad_target = false;
    double shrink = 1;  // multiplies the sum of losses; below 1 where that overflowed
    // Results
    Walk losses;             // x's type
    Scores grad;             // x's type
    double scale = 1;        // of every row's gradient, beside weight / classes
    Walk upstream;           // any floats: another factor for each row
    uint8_t *bits = nullptr; // p = 1: which hinges are positive, row_bytes() for each row
    // A part of the classes, from ``first`` on. The targets' scores come from outside.
    bool part = false;
    int64_t first = 0;
    Walk own;     // computing type; NaN where the row has no value
    Walk sums;    // float64, written: each row's sum of terms
    Walk slopes;  // float64: each row's sum of slopes; written with sums if asked for, read with grad
    // Standings, all written
    int64_t *highest = nullptr;   // the classes of each row's highest scores, ``wanted`` a row
    int wanted = 0;
    uint8_t *kinds = nullptr;     // of each row: INSIDE, RIGHT
    int32_t *bins = nullptr;      // of each row's lead
    int64_t *confused = nullptr;  // target * classes + the class that the target doesn't lead, or -1
    double unit = 1;              // of the leads
};

// What a block of rows adds up to.
struct Result {
    double sum = 0;     // of the rows' terms times weight and shrink, not yet divided by the classes
    int64_t count = 0;  // of rows that are not ignored
    bool bad = false;   // a target is out of range
};

using Block = void (*)(const Call &, int64_t start, int64_t stop, Result &);

int64_t size_of(Type);
double load_float(const char *, Type);               // any of the four float types
void store_float(char *, Type, double);              // rounded once, to nearest even
int64_t count_not_ignored(const Call &);             // looks at the targets only
int64_t row_bytes(Type, int64_t classes);            // bits of one row, in whole bytes
Block loss_block(const Call &);                      // null where pieces can't be put together
Block grad_block(const Call &), bits_block(const Call &);
Block own_block(const Call &);                       // writes Call::own, 0 where elsewhere
Block standings_block(const Call &);                 // classes side by side; the losses too if asked for

// Exact sums, in units of 2 ** -SUM_UNIT: integers of SUM_DIGITS digits of 32 bits in two's complement,
// the lowest first. They hold MOST_SUMMED numbers of any size.
constexpr int SUM_UNIT = 1130, SUM_DIGITS = 70;
constexpr int64_t MOST_SUMMED = 1 << 30;
// Sum float32 or float64 by group (int64), ``n`` of them. False: one is not finite, or its group isn't
// one of the ``groups``.
bool exact_sums(const Walk &values, const Walk &group, int64_t n, int64_t groups, uint32_t *sums);

}  // namespace mml
