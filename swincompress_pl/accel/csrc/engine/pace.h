// Whether a network that takes less than a few milliseconds is faster with help or alone.
#pragma once

#include <chrono>

#include "program/operation.h"

namespace swincompress {

// Between two steps, threads wait for each other. That takes a microsecond or ten, by how the system places them, and
// longer beside other work; steps of a small network take no more. So the times of both ways are measured in use.
class Pace {
public:
    using Duration = std::chrono::steady_clock::duration;

    // Which way the next run on so many images goes.
    bool alone(Size images);

    // What that run took.
    void took(Duration time);

private:
    static constexpr unsigned kFirstTrial = 8;  // runs from one trial of the other way to the next, at first

    struct Way {
        Duration usual{0};  // of recent runs; 0 before the first
        bool known() const { return usual.count() != 0; }
    };

    bool alone_is_faster() const { return ways_[1].known() && ways_[1].usual < ways_[0].usual; }

    Way ways_[2];         // with help, alone
    bool best_ = false;   // whether alone is the faster way
    bool alone_ = false;  // whether this run is alone: the other way in a trial
    Size images_ = 0;
    unsigned interval_ = kFirstTrial, until_trial_ = kFirstTrial;  // of trials, in runs
};

}  // namespace swincompress
