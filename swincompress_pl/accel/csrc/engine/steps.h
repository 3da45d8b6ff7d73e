// What the engine runs: one step per operation (or fused pair), prepared once and split statically between threads.
#pragma once

#include <array>
#include <memory>

#include "program/operation.h"

namespace swincompress {

// One thread's share of a step on a chunk of images.
struct Work {
    std::array<const std::byte*, 3> inputs;
    std::byte* output;
    Size images;
    int part, parts;
    std::byte* scratch;
};

struct Range {
    Size first, last;
};

// The share of `part`: whole multiples of `unit`, whose sizes differ by at most one unit.
Range share(Size total, Size unit, int part, int parts);

class Step {
public:
    virtual ~Step() = default;

    // Bytes that every thread needs for itself.
    virtual Size scratch_bytes() const { return 0; }

    virtual void run(const Work& work) const = 0;

    // Takes `next`, the only reader of this step's output, into this step; false if it cannot. A step that is fused
    // with a sum gets the other summand as its last input.
    virtual bool fuse(const OperationView& /*next*/) { return false; }
};

std::unique_ptr<Step> make_step(const OperationView& view, const Kernels& kernels);

// One maker per kind; make_step looks them up by name.
std::unique_ptr<Step> make_linear(const OperationView& view, const Kernels& kernels);
std::unique_ptr<Step> make_conv2d(const OperationView& view, const Kernels& kernels);
std::unique_ptr<Step> make_attention(const OperationView& view, const Kernels& kernels);
std::unique_ptr<Step> make_layer_norm(const OperationView& view, const Kernels& kernels);
std::unique_ptr<Step> make_softmax(const OperationView& view, const Kernels& kernels);
std::unique_ptr<Step> make_table(const OperationView& view, const Kernels& kernels);
std::unique_ptr<Step> make_add(const OperationView& view, const Kernels& kernels);
std::unique_ptr<Step> make_add_constant(const OperationView& view, const Kernels& kernels);
std::unique_ptr<Step> make_prepend(const OperationView& view, const Kernels& kernels);
std::unique_ptr<Step> make_gather(const OperationView& view, const Kernels& kernels);
std::unique_ptr<Step> make_mean(const OperationView& view, const Kernels& kernels);
std::unique_ptr<Step> make_lif(const OperationView& view, const Kernels& kernels);
std::unique_ptr<Step> make_max_pool(const OperationView& view, const Kernels& kernels);
std::unique_ptr<Step> make_block_sum(const OperationView& view, const Kernels& kernels);
std::unique_ptr<Step> make_multiply(const OperationView& view, const Kernels& kernels);
std::unique_ptr<Step> make_spike_attention(const OperationView& view, const Kernels& kernels);
std::unique_ptr<Step> make_requantize(const OperationView& view, const Kernels& kernels);
std::unique_ptr<Step> make_integrate(const OperationView& view, const Kernels& kernels);
std::unique_ptr<Step> make_fire(const OperationView& view, const Kernels& kernels);

// How a kernel slides over images (height, width, channels), with time steps or without.
struct WindowShape {
    Size in_height, in_width, height, width;
    std::pair<Size, Size> kernel, stride, padding;
};
WindowShape window_shape(const OperationView& view);

std::unique_ptr<Step> make_grouped_conv2d(const OperationView& view, const LinearLayer& layer, const WindowShape& shape,
                                          Size groups, const Kernels& kernels);

// The neurons of a "lif" operation.
class Neurons {
public:
    explicit Neurons(const OperationView& view);
    Neurons(const Neurons&) = delete;
    Neurons& operator=(const Neurons&) = delete;

    const LifCall& call() const { return call_; }  // without x, y and the rows to run

private:
    LifCall call_{};
    std::vector<std::int32_t> threshold_, reset_, bias_;
};

// The neurons of `next` if they can run with the layer before them, whose output has type `output`; or nullptr.
std::unique_ptr<Neurons> neurons_behind(const OperationView& next, Type output);

// A layer that multiplies; it runs any rows of its output, over all images and time steps.
class RowStep : public Step {
public:
    // Rows [first, last), the first at y.
    virtual void run_rows(const std::byte* x, Range rows, std::byte* y, std::byte* scratch) const = 0;
    virtual Size row_scratch_bytes() const = 0;
};

// `layer` and the neurons that alone read it, a few positions at a time, so that their currents stay in the cache.
Size neurons_scratch_bytes(const RowStep& layer, const LifCall& lif);
void run_with_neurons(const RowStep& layer, const LifCall& lif, const Work& work, Range positions,
                      const Kernels& kernels);

// Whether a layer may run by its input's spikes, and the step that does so. `dense`, if there is one, runs it if there
// are many spikes.
bool takes_events(const Value& x, const LinearLayer& layer, const Kernels& kernels);
Size events_max_percent(const OperationView& view, const Kernels& kernels);
std::unique_ptr<Step> make_events(const OperationView& view, const LinearLayer& layer, const WindowShape& shape,
                                  std::unique_ptr<RowStep> dense, const Kernels& kernels);
WindowCall window_call(const OperationView& view, const WindowShape& shape, Size channels);

// A copy of a tensor's elements that the step owns.
template <typename Element>
std::vector<Element> copied(const Element* elements, Size count) {
    return {elements, elements + count};
}

}  // namespace swincompress
