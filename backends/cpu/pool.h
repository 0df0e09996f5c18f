// A pool of threads for blocks of one call: made when first needed, afresh after a fork.
#pragma once
#include <cstdint>
#include <functional>

namespace mml {

// Run block(0) to block(count - 1), on at most ``threads`` threads, the caller's among them. Calls
// made at the same time share the threads. ``interrupted`` is asked by the caller now and then; once
// it says yes, no block is begun any more. False: it did, or it forked.
bool in_parallel(int64_t count, int threads, const std::function<void(int64_t)> &block,
                 const std::function<bool()> &interrupted);

}  // namespace mml
