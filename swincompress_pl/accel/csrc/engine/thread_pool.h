// The threads of a process, which all its engines share.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace swincompress {

constexpr int kThreadsMax = 256;

// Shares jobs out in parts. Whoever is there first takes a part, the caller too, so that a caller never waits for a
// worker that has not begun: a core that another process keeps busy costs the help of one worker, and no more. Callers
// and workers that are awake are no more than the CPUs.
class ThreadPool {
public:
    // The pool of this process (a forked child has its own), with as many workers as `threads` can use on its CPUs
    // besides a caller. It lives as long as someone holds it. Throws std::runtime_error if the system does not give
    // the threads.
    static std::shared_ptr<ThreadPool> of_process(int threads);

    explicit ThreadPool(int cpus) : cpus_(cpus) {}
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    class Caller;

private:
    using Clock = std::chrono::steady_clock;

    // Parts are bits in words, so that to take one is one atomic operation.
    static constexpr int kWordBits = 64;
    static constexpr int kWords = kThreadsMax / kWordBits;
    static constexpr int kDesks = 16;  // of callers at the same time; others do all their parts themselves

    // Where a caller lays out its jobs, one after the other.
    struct alignas(64) Desk {
        std::atomic<bool> taken{false};
        const std::function<void(int)>* job = nullptr;  // written while no part is open or under way
        alignas(64) std::array<std::atomic<std::uint64_t>, kWords> open{};
        alignas(64) std::atomic<int> left{0};  // parts that are open or under way
        std::atomic<bool> asleep{false};       // the caller, until `left` is 0
        std::mutex mutex;
        std::condition_variable done;
        // While others keep the CPUs busy, the caller works alone, longer each time that it has lost by help.
        Clock::time_point alone_until;
        Clock::duration retreat{0};
    };

    void grow(int cpus, int workers);
    void work(int number);
    bool crowded() const { return callers_.load() + awake_.load() > cpus_.load(); }
    bool help_anyone(int favourite);
    static bool help(Desk& desk, int favourite);
    bool has_open_part() const;
    void park(bool idle);
    void wake();
    static void await(Desk& desk, Clock::time_point start);
    static void retreat(Desk& desk, Clock::duration lost);

    std::array<Desk, kDesks> desks_;
    alignas(64) std::atomic<unsigned> posts_{0};  // jobs ever laid out: all that a spinning worker looks at
    alignas(64) std::atomic<int> cpus_;
    std::atomic<int> callers_{0};
    std::atomic<int> wanted_{0};  // workers that the callers can use
    std::atomic<int> awake_{0};   // workers that spin or work, or have been told to
    std::atomic<bool> stop_{false};
    std::mutex mutex_;  // of the rest
    std::condition_variable bell_;
    int rung_ = 0;  // workers that `bell_` calls and that have not come yet
    std::vector<std::thread> workers_;
};

// A thread that runs several jobs, microseconds apart: workers stay awake for it.
class ThreadPool::Caller {
public:
    // Every job has `parts` parts, 1 to kThreadsMax. Without a pool the caller does them all.
    Caller(ThreadPool* pool, int parts);
    ~Caller();
    Caller(const Caller&) = delete;
    Caller& operator=(const Caller&) = delete;

    // Runs job(part) for part in [0, parts), and returns when all are done. A job must not throw, nor wait for another
    // part.
    void run(const std::function<void(int)>& job);

private:
    ThreadPool* pool_;
    int parts_;
    Desk* desk_ = nullptr;
};

}  // namespace swincompress
