#include "engine/thread_pool.h"

#include <stdexcept>
#include <string>
#include <system_error>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace swincompress {
namespace {

// About 50 microseconds; after that, others can use the core better.
constexpr int kSpins = 2000;

void relax(int spin) {
    if (spin > kSpins) {
        std::this_thread::yield();
        return;
    }
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#endif
}

}  // namespace

ThreadPool::ThreadPool(int size) {
    workers_.reserve(static_cast<std::size_t>(size > 1 ? size - 1 : 0));
    try {
        for (int part = 1; part < size; ++part) workers_.emplace_back([this, part] { work(part); });
    } catch (const std::system_error& error) {
        stop();
        throw std::runtime_error("only " + std::to_string(this->size()) + " of " + std::to_string(size) +
                                 " threads could be started (" + error.what() + "); give fewer threads");
    }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
        generation_.fetch_add(1);
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(const std::function<void(int)>& job) {
    if (workers_.empty()) return job(0);
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        job_ = &job;
        pending_.store(static_cast<int>(workers_.size()));
        generation_.fetch_add(1);
    }
    wake_.notify_all();
    job(0);
    for (int spin = 0; pending_.load() != 0; ++spin) relax(spin);
}

unsigned ThreadPool::wait_for_job(unsigned seen) {
    for (int spin = 0; spin < kSpins; ++spin) {
        if (generation_.load() != seen) return generation_.load();
        relax(spin);
    }
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [&] { return generation_.load() != seen; });
    return generation_.load();
}

void ThreadPool::work(int part) {
    unsigned seen = 0;
    while (true) {
        seen = wait_for_job(seen);
        if (stop_) return;
        (*job_)(part);
        pending_.fetch_sub(1);
    }
}

}  // namespace swincompress
