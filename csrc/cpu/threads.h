// Parts of a job on some threads, without a pool: a pool's threads do not survive a fork.
#pragma once
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace ppap {

// run(part) for every part 0..parts-1, on at most `threads` threads, in no fixed order.
template <class Run>
void parallel(int threads, int64_t parts, Run&& run) {
    std::atomic<int64_t> next{0};
    auto work = [&] {
        for (int64_t part; (part = next.fetch_add(1)) < parts;) run(part);
    };
    std::vector<std::thread> others;
    for (int64_t i = 1; i < threads && i < parts; ++i) {
        try {
            others.emplace_back(work);
        } catch (const std::system_error&) {
            break;  // no more threads to be had: those that run do it all
        }
    }
    work();
    for (auto& other : others) other.join();
}

}  // namespace ppap
