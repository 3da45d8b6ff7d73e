#include "engine/pace.h"

#include <algorithm>

namespace swincompress {
namespace {

constexpr auto kLong = std::chrono::milliseconds(2);  // of a run with help: waiting is little beside it
// Runs from one trial of the other way to the next, at most: usually, and where the other way is far slower.
constexpr unsigned kTrial = 32, kRareTrial = 128;
constexpr int kMemory = 8, kTrialMemory = 2;  // about how many runs the usual time leans on

}  // namespace

bool Pace::alone(Size images) {
    if (images != images_) *this = Pace();
    images_ = images;
    const bool best = alone_is_faster();
    if (best != best_) until_trial_ = interval_ = kFirstTrial;
    best_ = alone_ = best;
    const bool is_short = ways_[0].known() && ways_[0].usual < kLong;
    if ((best || is_short) && --until_trial_ == 0) {
        alone_ = !best;
        until_trial_ = interval_;
    }
    return alone_;
}

void Pace::took(Duration time) {
    Way &way = ways_[alone_ ? 1 : 0], &other = ways_[alone_ ? 0 : 1];
    const bool trial = alone_ != best_;
    if (way.known()) time = std::min(time, 2 * way.usual);  // other work on the CPUs disturbs single runs
    way.usual = way.known() ? way.usual + (time - way.usual) / (trial ? kTrialMemory : kMemory) : time;
    if (!trial) return;
    const bool clear = way.usual > other.usual + other.usual / 2;
    interval_ = time < other.usual ? kFirstTrial : std::min(4 * interval_, clear ? kRareTrial : kTrial);
    until_trial_ = interval_;
}

}  // namespace swincompress
