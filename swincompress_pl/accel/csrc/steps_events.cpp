// Linear layers and convolutions over spikes and small counts.
#include <algorithm>

#include "buffer.h"
#include "steps.h"

namespace swincompress {
namespace {

constexpr Size kDepthMax = 65535;  // rows of weights are numbered in 16 bits

class EventStep : public Step {
public:
    EventStep(const LinearLayer& layer, const WindowCall& window, Size largest, Size rows, const Kernels& kernels)
        : call_{}, output_(layer.output), rows_(rows), packed_(kernels.packed_events_bytes(layer)), kernels_(kernels) {
        kernels.pack_events(layer, packed_.data());
        call_.packed = packed_.data();
        call_.window = window;
        call_.largest = largest;
    }

    Size scratch_bytes() const override { return kernels_.event_scratch_bytes(call_); }

    void run(const Work& work) const override {
        const Size rows = neurons_ == nullptr ? rows_ : call_.lif->rows;
        const Range range = share(work.images * rows, 1, work.part, work.parts);
        if (range.first == range.last) return;
        EventCall call = call_;
        call.window.x = work.inputs[0];
        call.window.y = work.output;
        call.window.first_row = range.first;
        call.window.last_row = range.last;
        call.scratch = work.scratch;
        kernels_.events(call);
        if (!adds_residual_) return;
        const Size at = range.first * call.window.channels * type_bytes(output_);
        kernels_.add(output_, work.output + at, work.inputs[1] + at, (range.last - range.first) * call.window.channels,
                     work.output + at);
    }

    bool fuse(const OperationView& next) override {
        if (adds_residual_ || neurons_ != nullptr) return false;
        if (next.operation().kind == "lif" && output_ == Type::int32) {
            auto neurons = std::make_unique<Neurons>(next);
            if (neurons->call().repeated || neurons->call().steps > kEventStepsMax) return false;
            neurons_ = std::move(neurons);
            call_.lif = &neurons_->call();
            return true;
        }
        adds_residual_ = next.operation().kind == "add" && next.output().type() == output_ && output_ != Type::uint8;
        return adds_residual_;
    }

private:
    EventCall call_;
    Type output_;
    Size rows_;
    Buffer packed_;
    const Kernels& kernels_;
    bool adds_residual_ = false;
    std::unique_ptr<Neurons> neurons_;
};

}  // namespace

bool takes_events(const Value& x, const LinearLayer& layer, const Kernels& kernels) {
    return x.type() == Type::uint8 && x.largest <= kernels.event_largest && layer.depth <= kDepthMax;
}

std::unique_ptr<Step> make_events(const OperationView& view, const LinearLayer& layer, const WindowShape& shape,
                                  const Kernels& kernels) {
    const Size largest = std::max<Size>(view.input(0).largest, 1);
    return std::make_unique<EventStep>(layer, window_call(view, shape, layer.channels), largest, view.output().rows(),
                                       kernels);
}

}  // namespace swincompress
