// What a profile tells of spikes: how many a step wrote, and the additions that those it read cause.
#pragma once

#include "steps.h"

namespace swincompress {

// spikes: written by neurons, of so many places. operations: synaptic ones, a count of k being k additions an output.
struct SpikeCounts {
    Size spikes = 0, places = 0, operations = 0;

    void operator+=(const SpikeCounts& other) {
        spikes += other.spikes;
        places += other.places;
        operations += other.operations;
    }
};

// Counts after a step has run, from what it read and wrote, so that no kernel is slower for it.
class SpikeCounter {
public:
    explicit SpikeCounter(const OperationView& view);

    // inputs and output are whole: those of `work.images` images.
    SpikeCounts count(const Work& work) const;

private:
    Size window_operations(const std::uint8_t* x, Size images) const;

    Size places_ = 0;      // of a neuron's output
    WindowCall window_{};  // of a layer over spikes or counts
    Size fan_out_ = 0;     // 0: no such layer
    Size frames_ = 1;      // images or time steps that the windows slide over
};

}  // namespace swincompress
