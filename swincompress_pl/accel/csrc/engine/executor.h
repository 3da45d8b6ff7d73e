// Runs a Plan on batches of any size with a fixed number of threads.
#pragma once

#include <atomic>
#include <functional>
#include <mutex>

#include "engine/pace.h"
#include "engine/plan.h"
#include "engine/thread_pool.h"
#include "kernels/buffer.h"

namespace swincompress {

class Executor {
public:
    // Throws std::invalid_argument, naming the operation, for an operation that no kernel can run.
    Executor(std::vector<Value> inputs, const std::vector<Operation>& operations, const Kernels& kernels,
             const Resources& resources, std::vector<std::size_t> results = {});
    ~Executor();
    Executor(const Executor&) = delete;
    Executor& operator=(const Executor&) = delete;

    const Plan& plan() const { return plan_; }
    const char* implementation() const { return kernels_.name; }
    int threads() const { return threads_; }

    struct Watch {
        std::vector<Size>* ns = nullptr;             // if given, the time of every step is added
        std::vector<SpikeCounts>* spikes = nullptr;  // if given, the spikes of every step are added
        // Called between chunks, and at times while another caller has its turn. An exception from it ends the run. It
        // may run this executor, or fork.
        std::function<void()> pause = nullptr;
    };

    // `inputs` are arrays of `images` values each; `outputs`, one per result of the plan and aligned for its type, have
    // room for as many. Callers take turns, chunk by chunk.
    void run(const std::vector<const std::byte*>& inputs, const std::vector<std::byte*>& outputs, Size images) {
        run(inputs, outputs, images, Watch{});
    }
    void run(const std::vector<const std::byte*>& inputs, const std::vector<std::byte*>& outputs, Size images,
             const Watch& watch);

private:
    // What a forked child cannot use: a lock that a thread of the parent may hold forever, and a pool without its
    // threads.
    struct Turns {
        explicit Turns(unsigned forks) : forks(forks) {}

        const unsigned forks;
        std::timed_mutex mutex;
        Pace pace;
        std::shared_ptr<ThreadPool> pool;  // from the first run of more than one thread
    };

    Turns& turns();
    void run_chunk(Turns& turns, const std::vector<std::byte*>& places, Size images, const Watch& watch);

    const Kernels& kernels_;
    Plan plan_;
    int threads_;
    Buffer arena_;
    Buffer scratch_;
    std::atomic<Turns*> turns_;
};

}  // namespace swincompress
