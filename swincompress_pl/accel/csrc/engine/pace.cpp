#include "engine/pace.h"

#include <algorithm>

namespace swincompress {
namespace {

constexpr auto kLong = std::chrono::milliseconds(2);  // of a run with help: waiting is little beside it
constexpr unsigned kTrial = 32, kRareTrial = 128;     // runs from one trial of the other way to the next
constexpr int kMemory = 8, kTrialMemory = 2;          // about how many runs the usual time leans on

}  // namespace

bool Pace::alone(Size images) {
    if (images != images_) *this = Pace();
    images_ = images;
    ++runs_;
    const bool best = alone_is_faster();
    alone_ = best;
    if (best || (ways_[0].known() && ways_[0].usual < kLong)) {
        const Way &faster = ways_[best ? 1 : 0], &slower = ways_[best ? 0 : 1];
        const bool clear = slower.usual > faster.usual + faster.usual / 2;
        if (runs_ % (clear ? kRareTrial : kTrial) == 0) alone_ = !best;
    }
    return alone_;
}

void Pace::took(Duration time) {
    Way& way = ways_[alone_ ? 1 : 0];
    const int memory = alone_ == alone_is_faster() ? kMemory : kTrialMemory;
    if (way.known()) time = std::min(time, 2 * way.usual);  // other work on the CPUs disturbs single runs
    way.usual = way.known() ? way.usual + (time - way.usual) / memory : time;
}

}  // namespace swincompress
