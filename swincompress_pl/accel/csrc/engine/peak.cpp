#include "engine/peak.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <numeric>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "engine/process.h"

namespace swincompress {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kWhole = std::chrono::milliseconds(10);
constexpr auto kTurn = std::chrono::microseconds(200);  // shorter than a time slice of the operating system

// The best turn of a thread, in multiply-accumulates per nanosecond.
double best_rate(const Kernels& kernels) {
    double best = 0;
    const auto end = Clock::now() + kWhole;
    for (Size rounds = 1;;) {
        const auto start = Clock::now();
        const Size products = kernels.peak_products(rounds);
        const auto stop = Clock::now();
        if (stop - start < kTurn)
            rounds *= 2;
        else
            best = std::max(
                best, static_cast<double>(products) / std::chrono::duration<double, std::nano>(stop - start).count());
        if (stop >= end && best > 0) return best;
    }
}

}  // namespace

// With threads of its own: each must run at the same time as the others, as workers of a pool need not.
double measure_peak_gmacs(const Kernels& kernels, int threads) {
    const int count = std::min(threads, usable_cpus());
    std::vector<double> rates(static_cast<std::size_t>(count));
    std::vector<std::thread> others;
    std::atomic<int> missing{count};
    const auto measure = [&](int number) {
        for (--missing; missing.load() > 0;) std::this_thread::yield();
        rates[static_cast<std::size_t>(number)] = best_rate(kernels);
    };
    const auto join = [&] {
        for (std::thread& other : others) other.join();
    };
    try {
        for (int number = 1; number < count; ++number) others.emplace_back(measure, number);
    } catch (const std::system_error& error) {
        missing = 0;
        join();
        throw std::runtime_error("only " + std::to_string(others.size() + 1) + " of " + std::to_string(count) +
                                 " threads could be started (" + error.what() + "); give fewer threads");
    }
    measure(0);
    join();
    return std::accumulate(rates.begin(), rates.end(), 0.0);
}

}  // namespace swincompress
