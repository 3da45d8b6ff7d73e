#include "engine/executor.h"

#include <algorithm>
#include <chrono>

#include "engine/process.h"

namespace swincompress {
namespace {

constexpr auto kPatience = std::chrono::milliseconds(50);

struct Share {
    const Step& step;
    const Work& all;
    std::byte* scratch;
    Size scratch_bytes;

    void run(int part) const {
        Work mine = all;
        mine.part = part;
        mine.scratch = scratch + part * scratch_bytes;
        step.run(mine);
    }
};

}  // namespace

Executor::Executor(std::vector<Value> inputs, const std::vector<Operation>& operations, const Kernels& kernels,
                   const Resources& resources, std::vector<std::size_t> results)
    : kernels_(kernels),
      plan_(std::move(inputs), operations, std::move(results), kernels, resources),
      threads_(resources.threads),
      arena_(plan_.arena_bytes()),
      scratch_(plan_.scratch_bytes() * threads_),
      turns_(new Turns(fork_generation())) {}

Executor::~Executor() {
    const Turns* turns = turns_.load();
    if (turns->forks == fork_generation()) delete turns;  // those of a parent can be neither used nor ended here
}

// Those of this process. If several threads are the first here after a fork, one of them makes new ones.
Executor::Turns& Executor::turns() {
    Turns* found = turns_.load();
    const unsigned forks = fork_generation();
    if (found->forks == forks) return *found;
    auto fresh = std::make_unique<Turns>(forks);
    if (!turns_.compare_exchange_strong(found, fresh.get())) return *found;
    return *fresh.release();
}

void Executor::run(const std::vector<const std::byte*>& inputs, const std::vector<std::byte*>& outputs, Size images,
                   const Watch& watch) {
    // Where each value lies: those between the steps in the arena, for every chunk again, the others with the caller.
    std::vector<std::byte*> places(plan_.value_count());
    for (std::size_t number = 0; number < places.size(); ++number)
        places[number] = arena_.data() + plan_.offset(number);
    for (Size first = 0; first < images; first += plan_.chunk()) {
        if (watch.pause && first > 0) watch.pause();
        for (std::size_t i = 0; i < inputs.size(); ++i)  // which no step writes
            places[i] = const_cast<std::byte*>(inputs[i]) + first * plan_.value(i).bytes();
        for (std::size_t i = 0; i < outputs.size(); ++i) {
            const std::size_t number = plan_.results()[i];
            places[number] = outputs[i] + first * plan_.value(number).bytes();
        }
        Turns& turns = this->turns();  // a pause may have forked
        std::unique_lock<std::timed_mutex> turn(turns.mutex, std::defer_lock);
        if (!watch.pause) turn.lock();
        while (!turn.owns_lock() && !turn.try_lock_for(kPatience)) watch.pause();
        if (turns.pool == nullptr && threads_ > 1) turns.pool = ThreadPool::of_process(threads_);
        run_chunk(turns, places, std::min(plan_.chunk(), images - first), watch);
    }
}

void Executor::run_chunk(Turns& turns, const std::vector<std::byte*>& places, Size images, const Watch& watch) {
    using Clock = std::chrono::steady_clock;
    const auto start_of_all = Clock::now();
    const bool alone = turns.pace.alone(images);
    const int parts = alone ? 1 : threads_;
    ThreadPool::Caller caller(alone ? nullptr : turns.pool.get(), parts);
    for (std::size_t number = 0; number < plan_.steps().size(); ++number) {
        const PlannedStep& planned = plan_.steps()[number];
        Work work{{}, places[planned.output], images, 0, parts, nullptr};
        for (std::size_t i = 0; i < planned.inputs.size(); ++i) work.inputs[i] = places[planned.inputs[i]];
        const auto start = Clock::now();
        const Share share{*planned.step, work, scratch_.data(), plan_.scratch_bytes()};
        caller.run([&share](int part) { share.run(part); });
        if (watch.ns != nullptr)
            (*watch.ns)[number] += std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start).count();
        if (watch.spikes != nullptr) {
            for (const SpikeCounter& counter : planned.counters) (*watch.spikes)[number] += counter.count(work);
        }
    }
    turns.pace.took(Clock::now() - start_of_all);
}

}  // namespace swincompress
