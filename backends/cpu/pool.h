// Threads for the blocks of one call: a pool of our own, made when first needed and afresh after a
// fork, or those of PyTorch.
#pragma once
#include <cstdint>
#include <functional>

namespace mml {

// torch_parallel_for: calls the function for parts of a range, on several threads.
using Team = int32_t (*)(int64_t begin, int64_t end, int64_t grain, void (*)(int64_t, int64_t, void *), void *);

struct Helpers {
    int threads = 1;      // at most, the caller's among them
    Team team = nullptr;  // whose threads help; null: our own
    // Asked by the caller now and then; once it says yes, no block is begun any more.
    std::function<bool()> interrupted = [] { return false; };
};

// Run block(0) to block(count - 1). Calls made at the same time share our own threads. False: the
// call was interrupted, or the process forked meanwhile.
bool in_parallel(int64_t count, const Helpers &, const std::function<void(int64_t)> &block);

// Notice forks from now on.
void watch_forks();

}  // namespace mml
