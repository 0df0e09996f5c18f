// A small SIMT machine: enough of CUDA C++ to run backends/cuda/margin_loss.cu on a CPU.
//
// A block's threads are fibers (ucontext). Each runs alone until it waits at a barrier or a shuffle,
// a warp runs as far ahead of the others as it can, and blocks run one after the other: so a
// missing barrier shows. It is stricter than a GPU: all 32 lanes must meet at the same kind of
// point, a thread that has left may not be waited for, and shared memory starts out as NaN.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

enum Wait { RUNNING, AT_BLOCK, AT_WARP, AT_SHUFFLE, DONE };

struct Index {
    unsigned x;
};

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    Wait wait = RUNNING;
    void* fake_stack = nullptr;
    unsigned shuffles = 0;
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<double> shared;
    char shuffle[1024][2][8];
};

static Block block;
static ucontext_t scheduler;
static unsigned thread, block_index, block_size, grid_size;
static void (*body)(const void*);
static const void* arguments;

#if defined(__SANITIZE_ADDRESS__)
static const void* main_stack;
static size_t main_stack_size;
static void* main_fake_stack;
inline void leave(void** keep, const void* stack, size_t size) {
    __sanitizer_start_switch_fiber(keep, stack, size);
}
inline void enter(void* kept, const void** stack, size_t* size) {
    __sanitizer_finish_switch_fiber(kept, stack, size);
}
#else
static const void* main_stack;
static size_t main_stack_size;
static void* main_fake_stack;
inline void leave(void**, const void*, size_t) {}
inline void enter(void*, const void**, size_t*) {}
#endif

inline void wait(Wait why) {
    Fiber& fiber = block.fibers[thread];
    fiber.wait = why;
    leave(why == DONE ? nullptr : &fiber.fake_stack, main_stack, main_stack_size);
    swapcontext(&fiber.context, &scheduler);
    enter(fiber.fake_stack, &main_stack, &main_stack_size);
}

inline void thread_main() {
    enter(nullptr, &main_stack, &main_stack_size);
    body(arguments);
    wait(DONE);
}

inline void resume(unsigned t) {
    thread = t;
    Fiber& fiber = block.fibers[t];
    leave(&main_fake_stack, fiber.stack.data(), fiber.stack.size());
    swapcontext(&scheduler, &fiber.context);
    enter(main_fake_stack, nullptr, nullptr);
}

// Lets the threads from `begin` to `end` go on if all of them wait for the same thing.
inline bool release(unsigned begin, unsigned end, bool whole_block) {
    const Wait why = block.fibers[begin].wait;
    if (why == RUNNING || why == DONE || (why == AT_BLOCK) != whole_block) return false;
    for (unsigned t = begin; t < end; t++)
        if (block.fibers[t].wait != why) return false;
    for (unsigned t = begin; t < end; t++) block.fibers[t].wait = RUNNING;
    return true;
}

// Runs a warp until all its threads are done or wait for the block; returns how many ended.
inline unsigned run_warp(unsigned warp, bool backwards) {
    unsigned ended = 0;
    do {
        for (unsigned i = 0; i < 32; i++) {
            const unsigned t = warp + (backwards ? 31 - i : i);
            if (block.fibers[t].wait != RUNNING) continue;
            resume(t);
            if (block.fibers[t].wait == DONE) ended++;
        }
    } while (release(warp, warp + 32, false));
    return ended;
}

inline bool run_block(bool backwards) {
    unsigned left = block_size;
    do {
        for (unsigned w = 0; w < block_size; w += 32)
            left -= run_warp(backwards ? block_size - 32 - w : w, backwards);
    } while (release(0, block_size, true));
    return left == 0;
}

// Returns 0, or 1 where threads wait for others that never come.
inline int launch(void (*kernel)(const void*), unsigned grid, unsigned threads, unsigned shared,
                  const void* packed, int backwards) {
    body = kernel;
    arguments = packed;
    grid_size = grid;
    block_size = threads;
    if (block.fibers.size() < threads) block.fibers.resize(threads);
    for (block_index = 0; block_index < grid; block_index++) {
        block.shared.assign((shared + 7) / 8, NAN);
        for (unsigned t = 0; t < threads; t++) {
            Fiber& fiber = block.fibers[t];
            fiber.stack.resize(64 * 1024);
            fiber.wait = RUNNING;
            fiber.fake_stack = nullptr;
            fiber.shuffles = 0;
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.data();
            fiber.context.uc_stack.ss_size = fiber.stack.size();
            fiber.context.uc_link = nullptr;
            makecontext(&fiber.context, thread_main, 0);
        }
        if (!run_block(backwards != 0)) return 1;
    }
    return 0;
}

}  // namespace simt

#define SIMT 1
#define DEVICE static inline
#define SHARED_MEMORY(name) double* name = simt::block.shared.data()
#define KERNEL(name, threads, resident, call) \
    static void name##_thread(const void* packed) { \
        const Arguments a = *(const Arguments*)packed; \
        call; \
    } \
    extern "C" int name(unsigned grid, unsigned block, unsigned shared, const void* packed, \
                        int backwards) { \
        if (block != threads) return 2; \
        return simt::launch(name##_thread, grid, block, shared, packed, backwards); \
    }

#define threadIdx (simt::Index{simt::thread})
#define blockIdx (simt::Index{simt::block_index})
#define blockDim (simt::Index{simt::block_size})
#define gridDim (simt::Index{simt::grid_size})

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct alignas(8) uint2 {
    unsigned x, y;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

template <class T>
inline T __ldg(const T* p) { return *p; }

inline void __syncthreads() { simt::wait(simt::AT_BLOCK); }
inline void __syncwarp() { simt::wait(simt::AT_WARP); }

template <class T>
inline T __shfl_xor_sync(unsigned, T value, unsigned step) {
    // Two slots in turn: no lane can be two shuffles ahead of another.
    const unsigned turn = simt::block.fibers[simt::thread].shuffles++ % 2;
    memcpy(simt::block.shuffle[simt::thread][turn], &value, sizeof value);
    simt::wait(simt::AT_SHUFFLE);
    memcpy(&value, simt::block.shuffle[simt::thread ^ step][turn], sizeof value);
    return value;
}

inline int __any_sync(unsigned mask, int predicate) {
    for (unsigned step = 16; step > 0; step /= 2) predicate |= __shfl_xor_sync(mask, predicate, step);
    return predicate;
}

inline long long atomicMin(long long* p, long long value) {
    const long long before = *p;
    if (value < before) *p = value;
    return before;
}

template <class To, class From>
inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
inline float __uint_as_float(unsigned u) { return bits_as<float>(u); }
inline unsigned __float_as_uint(float f) { return bits_as<unsigned>(f); }
inline double __hiloint2double(int high, int low) {
    return bits_as<double>((unsigned long long)(unsigned)high << 32 | (unsigned)low);
}
inline int __double2hiint(double d) { return (int)(bits_as<unsigned long long>(d) >> 32); }
inline int __double2loint(double d) { return (int)bits_as<unsigned long long>(d); }
inline int __popc(unsigned u) { return __builtin_popcount(u); }

inline float half_to_float(unsigned short h) {
    const unsigned exponent = h >> 10 & 31, fraction = h & 1023;
    const float sign = h >> 15 ? -1.0f : 1.0f;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp((float)fraction, -24);
    return sign * std::ldexp((float)(fraction | 1024), (int)exponent - 25);
}

inline unsigned short float_to_half(float f) {
    const unsigned sign = std::signbit(f) ? 0x8000 : 0;
    const float size = std::fabs(f);
    if (f != f) return 0x7fff;
    if (size >= 65520.0f) return (unsigned short)(sign | 0x7c00);
    if (size == 0) return (unsigned short)sign;
    int exponent = std::ilogb(size);
    if (exponent < -14) exponent = -14;
    const unsigned fraction = (unsigned)std::nearbyint(std::ldexp(size, 10 - exponent));
    return (unsigned short)(sign | (((unsigned)(exponent + 14) << 10) + fraction));
}
