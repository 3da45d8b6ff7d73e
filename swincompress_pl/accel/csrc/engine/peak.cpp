#include "engine/peak.h"

#include <algorithm>
#include <chrono>
#include <numeric>
#include <thread>
#include <vector>

#include "engine/thread_pool.h"

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

double measure_peak_gmacs(const Kernels& kernels, int threads) {
    const unsigned cpus = std::thread::hardware_concurrency();  // 0 if the system does not say
    ThreadPool pool(cpus == 0 ? threads : std::min(threads, static_cast<int>(cpus)));
    std::vector<double> rates(static_cast<std::size_t>(pool.size()));
    pool.run([&](int part) { rates[static_cast<std::size_t>(part)] = best_rate(kernels); });
    return std::accumulate(rates.begin(), rates.end(), 0.0);
}

}  // namespace swincompress
