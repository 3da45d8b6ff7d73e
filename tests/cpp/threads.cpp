// Runs the engine's threads and its choice between help and no help through cases with one right outcome; returns 0 if
// all have it. What a case waits for comes without the clock, so that a wrong outcome hangs or is told, on any machine.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <thread>
#include <vector>

#include "engine/pace.h"
#include "engine/thread_pool.h"

namespace {

using std::chrono::microseconds;
using swincompress::Pace;
using swincompress::ThreadPool;

void require(bool right, const char* what) {
    if (right) return;
    std::printf("wrong: %s\n", what);
    std::exit(1);
}

// Every part of every job runs once, whatever their number, and none after its job.
void each_part_once() {
    const auto pool = ThreadPool::of_process(4);
    for (const int parts : {1, 2, 3, 63, 64, 65, 200, 256}) {
        ThreadPool::Caller caller(pool.get(), parts);
        std::vector<int> counts(static_cast<std::size_t>(parts));
        for (int round = 1; round <= 300; ++round) {
            caller.run([&](int part) { ++counts[static_cast<std::size_t>(part)]; });
            for (const int count : counts) require(count == round, "each part once");
        }
    }
}

// More callers than desks, at the same time.
void many_callers() {
    const auto pool = ThreadPool::of_process(2);
    std::vector<std::thread> threads;
    std::atomic<long> sum{0};
    for (int i = 0; i < 40; ++i)
        threads.emplace_back([&] {
            for (int round = 0; round < 20; ++round) {
                ThreadPool::Caller caller(pool.get(), 3);
                for (int job = 0; job < 10; ++job) caller.run([&](int part) { sum += part + 1; });
            }
        });
    for (std::thread& thread : threads) thread.join();
    require(sum == 40L * 20 * 10 * 6, "many callers");
}

// The only worker is held by one caller; another does all of its parts itself instead of waiting.
void nobody_waits_for_a_worker() {
    const auto pool = ThreadPool::of_process(2);
    std::atomic<int> started{0};
    std::atomic<bool> other_is_done{false};
    std::thread first([&] {
        ThreadPool::Caller caller(pool.get(), 2);
        caller.run([&](int) {
            ++started;
            while (!other_is_done) std::this_thread::yield();
        });
    });
    while (started == 0) std::this_thread::yield();
    ThreadPool::Caller caller(pool.get(), 2);
    std::atomic<int> ran{0};
    caller.run([&](int) { ++ran; });
    other_is_done = true;
    first.join();
    require(ran == 2, "nobody waits for a worker");
}

void shared_while_held() {
    const auto first = ThreadPool::of_process(2), second = ThreadPool::of_process(2);
    require(first == second, "one pool per process");
}

// Runs `count` times, of which each takes what its way does; how many ran alone.
int runs_alone(Pace& pace, int count, microseconds with_help, microseconds alone) {
    int found = 0;
    for (int i = 0; i < count; ++i) {
        const bool is_alone = pace.alone(1);
        found += is_alone ? 1 : 0;
        pace.took(is_alone ? alone : with_help);
    }
    return found;
}

void the_faster_way() {
    Pace short_steps;
    runs_alone(short_steps, 200, microseconds(240), microseconds(150));
    require(runs_alone(short_steps, 1000, microseconds(240), microseconds(150)) > 950, "alone where that is faster");
    runs_alone(short_steps, 1000, microseconds(110), microseconds(150));  // the system has moved the threads
    require(runs_alone(short_steps, 1000, microseconds(110), microseconds(150)) < 50, "and together again");
    Pace clear;
    require(runs_alone(clear, 1280, microseconds(500), microseconds(900)) <= 11, "few trials of what is far slower");
    Pace disturbed;  // for one run by other work, then for twenty
    runs_alone(disturbed, 200, microseconds(1800), microseconds(3000));
    runs_alone(disturbed, 1, microseconds(25000), microseconds(25000));
    require(runs_alone(disturbed, 1000, microseconds(1800), microseconds(3000)) < 50, "one slow run changes nothing");
    runs_alone(disturbed, 20, microseconds(25000), microseconds(25000));
    require(runs_alone(disturbed, 1000, microseconds(1800), microseconds(3000)) < 80, "together again after twenty");
    Pace network;
    require(runs_alone(network, 1000, microseconds(2500), microseconds(1)) == 0, "no trials of long runs");
}

}  // namespace

int main() {
    each_part_once();
    many_callers();
    nobody_waits_for_a_worker();
    shared_while_held();
    the_faster_way();
    std::puts("right");
    return 0;
}
