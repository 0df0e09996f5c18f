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

// Start threads, one by one; fewer where the system gives no more.
template <class F> void start(int count, F one) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the program's own threads
    try {
        for (int k = 0; k < count; k++) one();
    } catch (const std::system_error &) {
    } catch (const std::bad_alloc &) {
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
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
    void grow(int wanted) {
        start(wanted - threads, [&] {
            std::thread([this] { work(); }).detach();
            threads++;
        });
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

// Whether this thread can have so many others. OpenMP ends the process where it can't start one, and
// starts some for each thread that calls it.
bool can_start(int count) {
    thread_local int known = 0;
    if (count <= known) return true;
    std::vector<std::thread> tried;
    std::mutex held;
    {
        std::lock_guard<std::mutex> lock(held);
        start(count, [&] { tried.emplace_back([&] { std::lock_guard<std::mutex> wait(held); }); });
    }
    for (std::thread &thread : tried) thread.join();
    if (int(tried.size()) == count) known = count;
    return known >= count;
}

// Our own threads help, if any.
bool in_pool(Call &call, const std::function<bool()> &interrupted) {
    const int born = generation;
    Pool *shared = call.wanted ? pool : nullptr;
    if (shared) shared->open(call);
    bool whole = true;
    auto next = Clock::now() + ASK;
    for (int64_t k; (k = call.take()) >= 0;) {
        call.block(k);
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

// The threads that PyTorch's operations leave awake for a while. Ours would have to wake up beside
// them: that took twice the time, for 655,360 scores after an operation of PyTorch.
bool in_team(Call &call, const Helpers &helpers) {
    struct Shift {
        Call &call;
        Clock::time_point end;
    };
    const int born = generation;
    while (call.has_more()) {
        Shift shift{call, Clock::now() + ASK};
        const auto work = [](int64_t, int64_t, void *given) {
            const Shift &shift = *static_cast<Shift *>(given);
            for (int64_t k; Clock::now() < shift.end && (k = shift.call.take()) >= 0;) shift.call.block(k);
        };
        if (helpers.team(0, helpers.threads, 1, work, &shift)) return false;
        // Only now, between two shifts: a handler may fork, and the child would wait for the others.
        if (call.has_more() && (helpers.interrupted() || born != generation)) return false;
    }
    return true;
}

}  // namespace

void watch_forks() {
    static const bool begun = (begin(), pthread_atfork(nullptr, nullptr, begin), true);
    (void)begun;
}

bool in_parallel(int64_t count, const Helpers &helpers, const std::function<void(int64_t)> &block) {
    const int threads = int(std::min<int64_t>(helpers.threads, count));
    Call call(block, count, std::max(threads, 1));
    // A forked child has not the threads of its parent's OpenMP, which doesn't know.
    if (helpers.team && threads > 1 && generation == 1 && can_start(threads - 1)) return in_team(call, helpers);
    return in_pool(call, helpers.interrupted);
}

}  // namespace mml
