// A call that a door (module.cpp, operators.cpp) has read: it is checked here, and run in blocks.
#pragma once
#include <functional>

#include "margin_loss.h"

namespace mml {

// The memory of an array. Strides are in bytes.
struct Memory {
    char *data = nullptr;
    Type type = Type::none;
    bool writable = false;
    int ndim = 0;
    int64_t shape[MAX_DIMS], strides[MAX_DIMS];

    int64_t size() const {
        int64_t n = 1;
        for (int d = 0; d < ndim; d++) n *= shape[d];
        return n;
    }
    bool is_float() const { return type <= Type::bf16; }
    bool is_integer() const { return type > Type::bf16 && type < Type::none; }
};

enum class Reduction { none, mean, sum };

struct Options {
    double p, margin;
    Reduction reduction;
    bool ignores = false, ignore_is_large = false, stop_at_bad_target;
    int64_t ignore = 0, axis;
};

constexpr int64_t MOST_CLASSES = INT32_MAX - 64;

// All axes but one (-1: all), in C order; those that one stride walks become one.
void walk(Walk &out, const Memory &array, int axis);
void scores(Scores &out, const Memory &array, int axis);

// The arrays are the door's, and stay open as long as the job. What returns bool says false where
// this is no call for the kernels.
struct Job {
    const Memory &input, &target, &weight;
    Options options;
    Call call;
    int axis;  // of the classes in input; -1: input is 0-d, one class

    Job(const Memory &input, const Memory &target, const Memory &weight)
        : input(input), target(target), weight(weight) {}

    bool check_scores();  // input and target; then the call's classes may be changed
    bool check_rest(bool weighted);
    bool same_batch(const Memory &rows) const;
    bool set_losses(const Memory &out);  // of the target's shape
    bool set_grad(const Memory &grad);
    bool set_upstream(const Memory &given);  // of the loss's shape
    bool set_bits(const Memory &given);
    void set_scale();                     // the mean's share in the factor of the gradient
    int64_t bits_size() const;            // 0 where reading the scores again takes less time
    double value(const Result &) const;   // the mean or the sum
    bool overflowed(const Result &);      // then the sum is to be added up once more, smaller
};

bool is_small(const Call &);       // runs alone, and doesn't give up Python's lock for it
bool wants_threads(const Call &);

// Runs all rows in blocks, which depend on the shape only; adds their results in order. As
// in_parallel(); may throw bad_alloc.
bool run_blocks(const Call &, Block, int threads, const std::function<bool()> &interrupted, Result &total);

}  // namespace mml
