// A few threads that wait for the next operation.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace swincompress {

// Runs one job in `size` parts; the caller runs part 0. Jobs come microseconds apart while a network runs, so a worker
// spins for a short while before it sleeps. One caller at a time.
class ThreadPool {
public:
    // Throws std::runtime_error if the system does not give that many threads.
    explicit ThreadPool(int size);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int size() const { return static_cast<int>(workers_.size()) + 1; }

    // Runs job(part) for part in [0, size()), and returns when all are done. A job must not throw.
    void run(const std::function<void(int)>& job);

private:
    void stop();
    void work(int part);
    unsigned wait_for_job(unsigned seen);

    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable wake_;
    const std::function<void(int)>* job_ = nullptr;
    std::atomic<unsigned> generation_{0};
    std::atomic<int> pending_{0};
    std::atomic<bool> stop_{false};
};

}  // namespace swincompress
