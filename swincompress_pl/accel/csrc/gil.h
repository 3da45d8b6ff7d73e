// Work without Python's global interpreter lock (GIL) that survives signals and the end of the interpreter.
#pragma once

#include <pybind11/pybind11.h>
#include <unistd.h>

#include <chrono>

#ifdef __linux__
#include <sys/syscall.h>
#endif

namespace swincompress {

// The handler of a signal raised, as that of Ctrl-C does; Python has the exception.
struct Interrupted {};

// Releases the GIL while it lives. An interpreter that ends kills the threads that ask for the GIL by unwinding their
// stacks, and a C++ destructor then aborts the process. So such a thread stays here until the process has ended, as it
// does anyway since Python 3.14.
class GilRelease {
public:
    GilRelease() : state_(PyEval_SaveThread()) {}
    ~GilRelease() { acquire(); }
    GilRelease(const GilRelease&) = delete;
    GilRelease& operator=(const GilRelease&) = delete;

    // Lets Python run the handlers of pending signals, at most every 100 ms, so that shorter calls never wait for the
    // GIL. Only the main thread runs handlers. Throws Interrupted.
    void check_signals() {
        const auto now = Clock::now();
        if (now - checked_ < kInterval || !on_main_thread()) return;
        checked_ = now;
        acquire();
        const bool raised = PyErr_CheckSignals() != 0;
        state_ = PyEval_SaveThread();
        if (raised) throw Interrupted{};
    }

private:
    using Clock = std::chrono::steady_clock;
    static constexpr auto kInterval = std::chrono::milliseconds(100);

    void acquire() noexcept {
        try {
            PyEval_RestoreThread(state_);
        } catch (...) {
            while (true) pause();
        }
    }

    static bool on_main_thread() {
#ifdef __linux__
        return syscall(SYS_gettid) == getpid();
#else
        return true;  // Python checks itself
#endif
    }

    PyThreadState* state_;
    Clock::time_point checked_ = Clock::now();
};

// Runs work(release) without the GIL; an exception from the handler of a signal goes on to Python.
template <typename Work>
void without_gil(const Work& work) {
    try {
        GilRelease release;
        work(release);
    } catch (const Interrupted&) {
        throw pybind11::error_already_set();
    }
}

}  // namespace swincompress
