// Work for several threads: torch's own OpenMP threads where Python found them, threads made for the call otherwise.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace kv {

// GOMP_parallel(function, data, threads, flags), which libgomp and LLVM's libomp export.
typedef void Fork(void (*)(void*), void*, unsigned, unsigned);

// Calls `work(item)` for each item below `items`, on up to `threads` threads; who is free takes the next one.
template <class Work>
void for_each_item(int64_t items, int threads, void* fork, const Work& work) {
    struct Shared {
        std::atomic<int64_t> next{0};
        int64_t items;
        const Work* work;
        static void run(void* data) {
            Shared& shared = *(Shared*)data;
            for (int64_t item; (item = shared.next.fetch_add(1)) < shared.items;) (*shared.work)(item);
        }
    } shared;
    shared.items = items;
    shared.work = &work;
    if (threads > items) threads = int(items);
    if (threads <= 1) return Shared::run(&shared);
    // Inside of a parallel region OpenMP gives one thread, which then does everything.
    if (fork) return ((Fork*)fork)(&Shared::run, &shared, unsigned(threads), 0);
    std::vector<std::thread> others;
    for (int i = 1; i < threads; i++) others.emplace_back(&Shared::run, (void*)&shared);
    Shared::run(&shared);
    for (std::thread& other : others) other.join();
}

}  // namespace kv
