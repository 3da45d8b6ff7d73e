#include "engine/thread_pool.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <system_error>

#include "engine/process.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace swincompress {
namespace {

// How long a thread spins. After that, others can use the core better.
constexpr auto kWorkerSpins = std::chrono::microseconds(50);   // more than the time between two calls in a loop
constexpr auto kCallerSpins = std::chrono::microseconds(200);  // more than parts of equal size differ by
constexpr auto kRetreatMax = std::chrono::milliseconds(100);

void relax() {
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#else
    std::this_thread::yield();
#endif
}

// Whether `ready` came true within `time`.
template <typename Condition>
bool spin(std::chrono::microseconds time, const Condition& ready) {
    const auto end = std::chrono::steady_clock::now() + time;
    do {
        for (int i = 0; i < 16; ++i) {
            if (ready()) return true;
            relax();
        }
    } while (std::chrono::steady_clock::now() < end);
    return false;
}

// The pool of a process. A forked child can use neither the lock nor the pool of its parent.
struct Holder {
    explicit Holder(unsigned forks) : forks(forks) {}

    const unsigned forks;
    std::mutex mutex;
    std::weak_ptr<ThreadPool> pool;
};

Holder& holder() {
    static std::atomic<Holder*> current{nullptr};
    Holder* found = current.load();
    const unsigned forks = fork_generation();
    if (found != nullptr && found->forks == forks) return *found;
    auto fresh = std::make_unique<Holder>(forks);
    if (!current.compare_exchange_strong(found, fresh.get())) return *found;
    return *fresh.release();
}

}  // namespace

std::shared_ptr<ThreadPool> ThreadPool::of_process(int threads) {
    const int cpus = usable_cpus();
    Holder& here = holder();
    const std::lock_guard<std::mutex> lock(here.mutex);
    std::shared_ptr<ThreadPool> pool = here.pool.lock();
    if (pool == nullptr) here.pool = pool = std::make_shared<ThreadPool>(cpus);
    pool->grow(cpus, std::min(threads, cpus) - 1);
    return pool;
}

void ThreadPool::grow(int cpus, int workers) {
    const std::lock_guard<std::mutex> lock(mutex_);
    cpus_ = cpus;
    try {
        while (static_cast<int>(workers_.size()) < workers) {
            const int number = static_cast<int>(workers_.size()) + 1;
            workers_.emplace_back([this, number] { work(number); });
            ++awake_;
        }
    } catch (const std::system_error& error) {
        throw std::runtime_error("only " + std::to_string(workers_.size() + 1) + " of " + std::to_string(workers + 1) +
                                 " threads could be started (" + error.what() + "); give fewer threads");
    }
}

ThreadPool::~ThreadPool() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
    }
    bell_.notify_all();
    for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::work(int number) {
    while (!stop_.load()) {
        const unsigned seen = posts_.load();
        while (!crowded() && help_anyone(number)) {
        }
        const bool idle = !crowded() && !spin(kWorkerSpins, [&] { return posts_.load() != seen || stop_.load(); });
        if (idle || crowded()) park(idle);
    }
}

bool ThreadPool::help_anyone(int favourite) {
    for (Desk& desk : desks_)
        if (help(desk, favourite)) return true;
    return false;
}

// Takes one part of the desk's job and does it; false if none is open. The same thread takes the same part each time
// if it can, as its caches have what it wrote.
bool ThreadPool::help(Desk& desk, int favourite) {
    for (int i = 0; i < kWords; ++i) {
        const int word = (favourite / kWordBits + i) % kWords;
        std::atomic<std::uint64_t>& open = desk.open[static_cast<std::size_t>(word)];
        for (std::uint64_t bits; (bits = open.load()) != 0;) {
            int bit = i == 0 ? favourite % kWordBits : 0;
            while ((bits >> bit & 1) == 0) bit = (bit + 1) % kWordBits;
            const std::uint64_t taken = std::uint64_t{1} << bit;
            if ((open.fetch_and(~taken) & taken) == 0) continue;
            (*desk.job)(word* kWordBits + bit);
            if (desk.left.fetch_sub(1) == 1 && desk.asleep.load()) {
                const std::lock_guard<std::mutex> lock(desk.mutex);
                desk.done.notify_one();
            }
            return true;
        }
    }
    return false;
}

bool ThreadPool::has_open_part() const {
    for (const Desk& desk : desks_)
        for (const std::atomic<std::uint64_t>& open : desk.open)
            if (open.load() != 0) return true;
    return false;
}

// A worker sleeps if it is `idle`, or else if there is a crowd, until it is called. A job laid out before `awake_` fell
// is seen here; the caller of a later one calls.
void ThreadPool::park(bool idle) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (!idle && !crowded()) return;  // another has left
    --awake_;
    if (idle && !crowded() && has_open_part()) {
        ++awake_;
        return;
    }
    bell_.wait(lock, [&] { return stop_.load() || rung_ > 0; });
    if (rung_ > 0) --rung_;  // who rang has counted this one as awake
}

// Calls as many workers as the callers can use and as have a CPU.
void ThreadPool::wake() {
    const auto missing = [&] { return std::min(wanted_.load(), cpus_.load() - callers_.load()) - awake_.load(); };
    if (missing() <= 0) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    const int count = std::min(missing(), static_cast<int>(workers_.size()) - awake_.load());
    for (int i = 0; i < count; ++i) {
        ++rung_;
        ++awake_;
        bell_.notify_one();
    }
}

// Waits for the parts that workers have under way. The caller's own took from `start` until now.
void ThreadPool::await(Desk& desk, Clock::time_point start) {
    const auto done = [&] { return desk.left.load() == 0; };
    const Clock::time_point finished = Clock::now();
    if (spin(kCallerSpins, done)) return;
    {
        // Asleep, the caller leaves its core to the worker that has lost its own.
        std::unique_lock<std::mutex> lock(desk.mutex);
        desk.asleep = true;
        desk.done.wait(lock, done);
        desk.asleep = false;
    }
    const Clock::duration lost = Clock::now() - finished;
    if (lost > finished - start) retreat(desk, lost);  // alone it would have been as fast
}

void ThreadPool::retreat(Desk& desk, Clock::duration lost) {
    const Clock::time_point now = Clock::now();
    const bool again = now - lost < desk.alone_until + desk.retreat;
    desk.retreat = std::min<Clock::duration>(again ? 2 * desk.retreat : lost, kRetreatMax);
    desk.alone_until = now + desk.retreat;
}

ThreadPool::Caller::Caller(ThreadPool* pool, int parts) : pool_(pool), parts_(parts) {
    if (pool_ == nullptr) return;
    for (Desk& desk : pool_->desks_) {
        if (desk.taken.exchange(true)) continue;
        desk_ = &desk;
        pool_->callers_ += 1;
        pool_->wanted_ += parts_ - 1;
        return;
    }
}

ThreadPool::Caller::~Caller() {
    if (desk_ == nullptr) return;
    pool_->callers_ -= 1;
    pool_->wanted_ -= parts_ - 1;
    desk_->taken = false;
}

void ThreadPool::Caller::run(const std::function<void(int)>& job) {
    const Clock::time_point start = Clock::now();
    if (desk_ == nullptr || start < desk_->alone_until) {
        for (int part = 0; part < parts_; ++part) job(part);
        return;
    }
    desk_->job = &job;
    desk_->left = parts_;
    for (int word = 0; word * kWordBits < parts_; ++word) {
        const int bits = std::min(parts_ - word * kWordBits, kWordBits);
        desk_->open[static_cast<std::size_t>(word)] = ~std::uint64_t{0} >> (kWordBits - bits);
    }
    ++pool_->posts_;
    pool_->wake();
    while (help(*desk_, 0)) {
    }
    await(*desk_, start);
}

}  // namespace swincompress
