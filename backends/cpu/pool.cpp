#include "pool.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace mml {
namespace {

using Clock = std::chrono::steady_clock;
// A thread without work stays awake for four times as long as its last work took, within these
// bounds: waking it takes up to 100 us, and a compiled program has 150 us between two calls.
constexpr std::chrono::nanoseconds LEAST = std::chrono::microseconds(100), MOST = std::chrono::milliseconds(1);
constexpr auto ASK = std::chrono::milliseconds(20);    // how often the caller looks for a Ctrl-C

// The blocks of one call. It stands on the caller's stack, where it stays until no helper is left.
struct Call {
    const std::function<void(int64_t)> &block;
    const int64_t count, parts, each;
    int wanted, helpers = 0;  // guarded by the pool's mutex
    std::atomic<int64_t> turns{0};

    Call(const std::function<void(int64_t)> &block, int64_t count, int threads)
        : block(block), count(count), parts(threads), each((count + threads - 1) / threads),
          wanted(threads - 1) {}

    // The next block, or -1. Turns go round the parts, one for each thread: threads side by side
    // would wait for the same fresh page of 2 MB.
    int64_t take() {
        for (;;) {
            int64_t turn = turns.fetch_add(1, std::memory_order_relaxed);
            if (turn >= each * parts) return -1;
            int64_t block = turn % parts * each + turn / parts;
            if (block < count) return block;
        }
    }
    bool has_more() const { return turns.load(std::memory_order_relaxed) < each * parts; }
    void stop() { turns.store(each * parts, std::memory_order_relaxed); }
};

template <class F> bool spin_until(std::chrono::nanoseconds most, F ready) {
    for (auto end = Clock::now() + most; Clock::now() < end; std::this_thread::yield())
        if (ready()) return true;
    return false;
}

class Pool {
    std::mutex mutex;
    std::condition_variable come, done;
    std::vector<Call *> calls;
    std::atomic<int64_t> news{0};  // counts the calls that came
    int threads = 0;

    Call *find() {
        for (Call *call : calls)
            if (call->helpers < call->wanted && call->has_more()) return call;
        return nullptr;
    }
    void work() {
        std::unique_lock<std::mutex> lock(mutex);
        std::chrono::nanoseconds awake = LEAST;
        for (;;) {
            Call *call = find();
            if (!call) {
                int64_t seen = news;
                lock.unlock();
                spin_until(awake, [&] { return news != seen; });
                lock.lock();
                come.wait(lock, [&] { return news != seen || find(); });
                continue;
            }
            call->helpers++;
            lock.unlock();
            const auto begun = Clock::now();
            for (int64_t block; (block = call->take()) >= 0;) call->block(block);
            awake = std::clamp<std::chrono::nanoseconds>(4 * (Clock::now() - begun), LEAST, MOST);
            lock.lock();
            if (!--call->helpers) done.notify_all();
        }
    }
    // Start threads until there are ``wanted``; fewer where the system gives no more.
    void grow(int wanted) {
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the program's own threads
        try {
            for (; threads < wanted; threads++) std::thread([this] { work(); }).detach();
        } catch (const std::system_error &) {
        } catch (const std::bad_alloc &) {
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

  public:
    // Let helpers in on a call.
    void open(Call &call) {
        std::lock_guard<std::mutex> lock(mutex);
        calls.reserve(calls.size() + 1);
        call.wanted = std::max(0, (call.wanted + 1) / int(calls.size() + 1) - 1);
        calls.push_back(&call);
        if (!call.wanted) return;
        grow(call.wanted);
        news++;
        come.notify_all();
    }
    // Let no more in, and wait for those who are.
    void close(Call &call) {
        std::unique_lock<std::mutex> lock(mutex);
        calls.erase(std::find(calls.begin(), calls.end(), &call));
        while (call.helpers) done.wait(lock);
    }
};

// Never destroyed: its threads may outlive the program's static objects. A forked child has none of
// them, and begins anew; a lock may have been held when it was forked.
alignas(Pool) char memory[sizeof(Pool)];
Pool *pool = nullptr;
std::atomic<int> generation{0};

void begin() {
    pool = new (memory) Pool;
    generation++;
}
Pool &the_pool() {
    static const bool begun = (begin(), pthread_atfork(nullptr, nullptr, begin), true);
    (void)begun;
    return *pool;
}

}  // namespace

bool in_parallel(int64_t count, int threads, const std::function<void(int64_t)> &block,
                 const std::function<bool()> &interrupted) {
    threads = int(std::min<int64_t>(threads, count));
    Call call(block, count, std::max(threads, 1));
    Pool *shared = threads > 1 ? &the_pool() : nullptr;
    const int born = generation;
    if (shared) shared->open(call);
    bool whole = true;
    auto next = Clock::now() + ASK;
    for (int64_t k; (k = call.take()) >= 0;) {
        block(k);
        if (Clock::now() < next) continue;
        next = Clock::now() + ASK;
        if (!interrupted()) continue;
        whole = false;
        call.stop();
    }
    if (shared && born != generation) return false;  // a signal's handler forked: the helpers are gone
    if (shared) shared->close(call);
    return whole;
}

}  // namespace mml
