// What a profile says about spikes: how many a step wrote, and how many additions the spikes that it read cause.
#pragma once

#include "engine/steps.h"

namespace swincompress {

// `spikes` were written by neurons at `places`; neurons of counts up to D have D places each. `operations` are
// synaptic; a count of k is k additions per output.
struct SpikeCounts {
    Size spikes = 0, places = 0, operations = 0;

    void operator+=(const SpikeCounts& other) {
        spikes += other.spikes;
        places += other.places;
        operations += other.operations;
    }
};

// Counts after a step has run, from what it read and wrote, so that it slows no kernel.
class SpikeCounter {
public:
    explicit SpikeCounter(const OperationView& view);

    // inputs and output are whole: those of `work.images` images.
    SpikeCounts count(const Work& work) const;

private:
    Size window_operations(const std::uint8_t* x, Size images) const;

    Size places_ = 0;      // of a neuron's output
    Size steps_ = 1;       // time steps that a place of it stands for, where neurons give counts
    WindowCall window_{};  // of a layer over spikes or counts
    Size fan_out_ = 0;     // 0: no such layer
    Size frames_ = 1;      // images or time steps that the windows slide over
};

}  // namespace swincompress
