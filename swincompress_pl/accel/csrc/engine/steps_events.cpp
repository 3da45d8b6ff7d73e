// Layers over spikes and small counts, which are listed or multiplied, and layers with neurons behind them.
#include <algorithm>
#include <cstring>

#include "engine/steps.h"
#include "kernels/buffer.h"

namespace swincompress {
namespace {

constexpr Size kDepthMax = 65535;  // rows of weights are numbered in 16 bits

// The part of a second-level cache for currents and spikes of neurons; positions that are worth a call.
constexpr Size kNeuronBytes = Size{256} * 1024;
constexpr Size kPositionsMin = 8, kPositionsMax = 256;

// Positions whose neurons are charged together.
Size positions_of(const LifCall& lif) {
    const Size fitting = kNeuronBytes / (lif.steps * lif.channels * 5);
    return std::clamp(fitting / kPositionsMin * kPositionsMin, kPositionsMin, kPositionsMax);
}

// Counts below 128, eight at a time: a byte holds the sum of two.
Size sum_of_counts(const std::uint8_t* x, Size count) {
    constexpr std::uint64_t evens = 0x00FF00FF00FF00FF, ones = 0x0001000100010001;
    Size sum = 0, at = 0;
    for (; at + 16 <= count; at += 16) {
        std::uint64_t a, b;
        std::memcpy(&a, x + at, 8);
        std::memcpy(&b, x + at + 8, 8);
        const std::uint64_t both = a + b;
        sum += static_cast<Size>((((both & evens) + ((both >> 8) & evens)) * ones) >> 48);
    }
    for (; at < count; ++at) sum += x[at];
    return sum;
}

class EventStep : public Step {
public:
    EventStep(const LinearLayer& layer, const WindowCall& window, Size largest, Size rows, Size percent_max,
              std::unique_ptr<RowStep> dense, const Kernels& kernels)
        : call_{},
          output_(layer.output),
          rows_(rows),
          percent_max_(percent_max),
          packed_(kernels.packed_events_bytes(layer)),
          dense_(std::move(dense)),
          kernels_(kernels) {
        kernels.pack_events(layer, packed_.data());
        call_.packed = packed_.data();
        call_.window = window;
        call_.largest = largest;
    }

    Size scratch_bytes() const override {
        const Size listed = kernels_.event_scratch_bytes(call_);
        if (dense_ == nullptr) return listed;
        return std::max(
            listed, call_.lif == nullptr ? dense_->row_scratch_bytes() : neurons_scratch_bytes(*dense_, *call_.lif));
    }

    void run(const Work& work) const override {
        const Size rows = neurons_ == nullptr ? rows_ : call_.lif->rows;
        const Range range = share(work.images * rows, 1, work.part, work.parts);
        if (range.first == range.last) return;
        const bool multiplies = dense_ != nullptr && percent(work.inputs[0], range) > percent_max_;
        if (multiplies && neurons_ != nullptr) return run_with_neurons(*dense_, *call_.lif, work, range, kernels_);
        const Size at = range.first * call_.window.channels * type_bytes(output_);
        if (multiplies)
            dense_->run_rows(work.inputs[0], range, work.output + at, work.scratch);
        else
            list(work, range);
        if (!adds_residual_) return;
        kernels_.add(output_, work.output + at, work.inputs[1] + at, (range.last - range.first) * call_.window.channels,
                     work.output + at);
    }

    bool fuse(const OperationView& next) override {
        if (adds_residual_ || neurons_ != nullptr) return false;
        neurons_ = neurons_behind(next, output_);
        if (neurons_ != nullptr) {
            call_.lif = &neurons_->call();
            return true;
        }
        adds_residual_ = next.operation().kind == "add" && next.output().type() == output_ && output_ != Type::uint8;
        return adds_residual_;
    }

private:
    void list(const Work& work, Range range) const {
        EventCall call = call_;
        call.window.x = work.inputs[0];
        call.window.y = work.output;
        call.window.first_row = range.first;
        call.window.last_row = range.last;
        call.scratch = work.scratch;
        kernels_.events(call);
    }

    // Spikes in a hundred of the inputs that the range reads: rows, or positions of all time steps of the neurons. No
    // window lies in the padding alone: the plan refuses paddings as large as the kernel.
    Size percent(const std::byte* x, Range range) const {
        Size spikes = 0, inputs = 0;
        if (neurons_ == nullptr) {
            add_counts(x, range, spikes, inputs);
            return spikes * 100 / inputs;
        }
        const Size steps = call_.lif->steps, rows = call_.lif->rows;
        for (Size first = range.first; first < range.last;) {
            const Size image = first / rows, last = std::min(range.last, (image + 1) * rows);
            for (Size step = 0; step < steps; ++step) {
                const Size before = (image * (steps - 1) + step) * rows;
                add_counts(x, {first + before, last + before}, spikes, inputs);
            }
            first = last;
        }
        return spikes * 100 / inputs;
    }

    // Of the lines of images under these output rows.
    void add_counts(const std::byte* x, Range rows, Size& spikes, Size& inputs) const {
        const WindowCall& w = call_.window;
        const auto line_of = [&w](Size row, Size beyond) {
            const Size positions = w.height * w.width, top = row % positions / w.width * w.stride_height;
            const Size inside = std::clamp<Size>(top - w.padding_height + beyond, 0, w.in_height);
            return row / positions * w.in_height + inside;
        };
        const Size first = line_of(rows.first, 0), last = line_of(rows.last - 1, w.kernel_height);
        const Size line = w.in_width * w.in_channels;
        spikes += sum_of_counts(reinterpret_cast<const std::uint8_t*>(x) + first * line, (last - first) * line);
        inputs += (last - first) * line;
    }

    EventCall call_;
    Type output_;
    Size rows_, percent_max_;
    Buffer packed_;
    std::unique_ptr<RowStep> dense_;
    const Kernels& kernels_;
    bool adds_residual_ = false;
    std::unique_ptr<Neurons> neurons_;
};

}  // namespace

std::unique_ptr<Neurons> neurons_behind(const OperationView& next, Type output) {
    if (next.operation().kind != "lif" || output != Type::int32) return nullptr;
    auto neurons = std::make_unique<Neurons>(next);
    return neurons->call().repeated || neurons->call().steps > kEventStepsMax ? nullptr : std::move(neurons);
}

Size neurons_scratch_bytes(const RowStep& layer, const LifCall& lif) {
    return aligned(positions_of(lif) * lif.steps * lif.channels * 5) + layer.row_scratch_bytes();
}

void run_with_neurons(const RowStep& layer, const LifCall& lif, const Work& work, Range positions,
                      const Kernels& kernels) {
    const Size most = positions_of(lif), places = most * lif.steps * lif.channels;
    auto* currents = reinterpret_cast<std::int32_t*>(work.scratch);
    auto* spikes = reinterpret_cast<std::uint8_t*>(work.scratch + places * 4);
    std::byte* rest = work.scratch + aligned(places * 5);
    for (Size first = positions.first; first < positions.last;) {
        const Size image = first / lif.rows;
        const Size count = std::min({most, positions.last - first, (image + 1) * lif.rows - first});
        LifCall block = lif;
        block.x = currents;
        block.y = spikes;
        block.rows = block.last_row = count;
        const Size step = count * lif.channels, row = image * lif.steps * lif.rows + first - image * lif.rows;
        for (Size t = 0; t < lif.steps; ++t)
            layer.run_rows(work.inputs[0], {row + t * lif.rows, row + t * lif.rows + count},
                           reinterpret_cast<std::byte*>(currents + t * step), rest);
        kernels.lif(block);
        for (Size t = 0; t < lif.steps; ++t)
            std::memcpy(work.output + (row + t * lif.rows) * lif.channels, spikes + t * step,
                        static_cast<std::size_t>(step));
        first += count;
    }
}

bool takes_events(const Value& x, const LinearLayer& layer, const Kernels& kernels) {
    return x.type() == Type::uint8 && x.largest <= kernels.event_largest && layer.depth <= kDepthMax;
}

Size events_max_percent(const OperationView& view, const Kernels& kernels) {
    const Size tuned = view.operation().tuning.events_max_percent;
    return tuned < 0 ? kernels.events_max_percent : tuned;
}

std::unique_ptr<Step> make_events(const OperationView& view, const LinearLayer& layer, const WindowShape& shape,
                                  std::unique_ptr<RowStep> dense, const Kernels& kernels) {
    const Size largest = std::max<Size>(view.input(0).largest, 1);
    return std::make_unique<EventStep>(layer, window_call(view, shape, layer.channels), largest, view.output().rows(),
                                       events_max_percent(view, kernels), std::move(dense), kernels);
}

}  // namespace swincompress
