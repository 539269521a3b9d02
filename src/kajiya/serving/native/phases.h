// Work shared out among threads, phase after phase.
//
// A phase is over when its items are done, not when all threads have come by: on a busy machine, a thread that is not
// running holds nobody up unless it was in the middle of an item.
#pragma once
#include <atomic>
#include <thread>
#include <vector>

namespace kajiya {

struct Phases {
    struct alignas(64) Phase {
        std::atomic<int64_t> next{0}, done{0};
    };
    std::vector<Phase> all;
    explicit Phases(int64_t n) : all(n) {}

    // Runs body(i) for 0 ≤ i < n once among all threads that call this with the same phase, `chunk` items at a time.
    template <class Body>
    void share(int64_t& phase, int64_t n, int64_t chunk, Body body) {
        share_ranges(phase, n, chunk, [&](int64_t first, int64_t end) {
            for (int64_t i = first; i < end; ++i) body(i);
        });
    }

    // The same with body(first, end).
    template <class Body>
    void share_ranges(int64_t& phase, int64_t n, int64_t chunk, Body body) {
        Phase& mine = all[phase++];
        for (;;) {
            int64_t first = mine.next.fetch_add(chunk, std::memory_order_relaxed);
            if (first >= n) break;
            int64_t end = std::min(n, first + chunk);
            body(first, end);
            mine.done.fetch_add(end - first, std::memory_order_release);
        }
        for (int64_t spins = 0; mine.done.load(std::memory_order_acquire) < n; ++spins) {
            if (spins > 2000)
                std::this_thread::yield();
#ifdef __x86_64__
            else
                __builtin_ia32_pause();
#endif
        }
    }
};

}  // namespace kajiya
