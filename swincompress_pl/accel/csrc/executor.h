// Runs a Plan on batches of any size with a fixed number of threads.
#pragma once

#include <mutex>

#include "buffer.h"
#include "plan.h"
#include "thread_pool.h"

namespace swincompress {

class Executor {
public:
    // Throws std::invalid_argument, naming the operation, for what no kernel may run.
    Executor(std::vector<Value> inputs, const std::vector<Operation>& operations, const Kernels& kernels,
             const Resources& resources);
    ~Executor();
    Executor(const Executor&) = delete;
    Executor& operator=(const Executor&) = delete;

    const Plan& plan() const { return plan_; }
    const char* implementation() const { return kernels_.name; }
    int threads() const { return threads_; }

    // What is added to for every step, where it is given.
    struct Watch {
        std::vector<Size>* ns = nullptr;
        std::vector<SpikeCounts>* spikes = nullptr;
    };

    // inputs: one array of `images` values each; output: room for as many results. Callers take turns.
    void run(const std::vector<const std::byte*>& inputs, std::byte* output, Size images) {
        run(inputs, output, images, Watch{});
    }
    void run(const std::vector<const std::byte*>& inputs, std::byte* output, Size images, const Watch& watch);

private:
    void run_chunk(const std::vector<const std::byte*>& inputs, std::byte* output, Size images, const Watch& watch);
    ThreadPool& pool();

    const Kernels& kernels_;
    Plan plan_;
    int threads_;
    Buffer arena_;
    Buffer scratch_;
    std::mutex mutex_;
    std::unique_ptr<ThreadPool> pool_;
    long pool_process_ = 0;
};

}  // namespace swincompress
