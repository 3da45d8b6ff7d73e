#include "engine/spike_counter.h"

#include <algorithm>

namespace swincompress {
namespace {

// The windows along one axis that cover a position.
Size covering(Size position, Size padding, Size kernel, Size stride, Size windows) {
    const Size at = position + padding;  // windows begin at multiples of the stride
    const Size last = std::min(at / stride, windows - 1);
    const Size first = at < kernel ? 0 : (at - kernel) / stride + 1;
    return std::max<Size>(last - first + 1, 0);
}

Size sum(const std::uint8_t* x, Size count) {
    Size total = 0;
    for (Size i = 0; i < count; ++i) total += x[i];
    return total;
}

}  // namespace

SpikeCounter::SpikeCounter(const OperationView& view) {
    const std::string& kind = view.operation().kind;
    const bool counts = kind != "integrate" && view.operation().attributes.count("largest") != 0;
    if (kind == "lif" || kind == "fire" || counts) places_ = view.output().elements();
    if (counts) steps_ = view.output().largest;
    if (kind != "linear" && kind != "conv2d") return;
    const Value& x = view.input(0);
    if (x.type() != Type::uint8 || x.largest >= 255) return;  // pixels or other numbers
    fan_out_ = view.output().channels() / view.attribute_or("groups", 1);
    const WindowShape shape =
        kind == "linear" ? WindowShape{x.rows(), 1, x.rows(), 1, {1, 1}, {1, 1}, {0, 0}} : window_shape(view);
    window_ = window_call(view, shape, view.output().channels());
    frames_ = x.rows() / (shape.in_height * shape.in_width);
}

SpikeCounts SpikeCounter::count(const Work& work) const {
    SpikeCounts found;
    if (places_ != 0) {
        const Size values = work.images * places_;
        found.places = values * steps_;
        found.spikes = sum(reinterpret_cast<const std::uint8_t*>(work.output), values);
    }
    if (fan_out_ != 0)
        found.operations =
            fan_out_ * window_operations(reinterpret_cast<const std::uint8_t*>(work.inputs[0]), work.images * frames_);
    return found;
}

Size SpikeCounter::window_operations(const std::uint8_t* x, Size images) const {
    const WindowCall& w = window_;
    Size total = 0;
    for (Size image = 0; image < images; ++image)
        for (Size y = 0; y < w.in_height; ++y) {
            const Size lines = covering(y, w.padding_height, w.kernel_height, w.stride_height, w.height);
            for (Size column = 0; column < w.in_width; ++column, x += w.in_channels)
                total += lines * covering(column, w.padding_width, w.kernel_width, w.stride_width, w.width) *
                         sum(x, w.in_channels);
        }
    return total;
}

}  // namespace swincompress
