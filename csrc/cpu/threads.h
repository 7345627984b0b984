// Parts of a job on some threads, without a pool: a pool's threads do not survive a fork.
#pragma once
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace ppap {

// A thread is worth starting for this many products.
constexpr double PRODUCTS_PER_THREAD = 1e6;

// Threads that a job of so many products keeps busy.
inline int busy_threads(int threads, double products) {
    const double worth = products / PRODUCTS_PER_THREAD;
    return worth < threads ? static_cast<int>(worth) + 1 : threads;
}

// run(part) for every part 0..parts-1, on at most `threads` threads, in no fixed order. The first exception of a part
// ends the job and is thrown here, when all threads have ended.
template <class Run>
void parallel(int threads, int64_t parts, Run&& run) {
    std::atomic<int64_t> next{0};
    std::exception_ptr failure;
    std::mutex failing;
    auto work = [&] {
        try {
            for (int64_t part; (part = next.fetch_add(1)) < parts;) run(part);
        } catch (...) {
            std::lock_guard<std::mutex> lock(failing);
            if (!failure) failure = std::current_exception();
            next = parts;
        }
    };
    std::vector<std::thread> others;
    try {
        for (int64_t i = 1; i < threads && i < parts; ++i) others.emplace_back(work);
    } catch (...) {
        // No more threads or no memory for them: those that run do it all.
    }
    work();
    for (auto& other : others) other.join();
    if (failure) std::rethrow_exception(failure);
}

}  // namespace ppap
