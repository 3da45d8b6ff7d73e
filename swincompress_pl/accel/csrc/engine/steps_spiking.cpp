// The steps of spiking networks: neurons, windows, counts. A value with time has it as first axis.
#include <algorithm>

#include "engine/steps.h"
#include "kernels/buffer.h"

namespace swincompress {
namespace {

// This thread's share of the output rows of all images.
template <typename Call>
Call with_share(Call call, const Work& work, Size rows) {
    const Range range = share(work.images * rows, 1, work.part, work.parts);
    call.first_row = range.first;
    call.last_row = range.last;
    return call;
}

// The same for a call from x to y.
template <typename Call>
Call placed(const Call& call, const Work& work, Size rows) {
    Call mine = with_share(call, work, rows);
    mine.x = work.inputs[0];
    mine.y = work.output;
    return mine;
}

class LifStep : public Step {
public:
    LifStep(const OperationView& view, const Kernels& kernels) : neurons_(view), kernels_(kernels) {}

    void run(const Work& work) const override {
        LifCall call = neurons_.call();
        const Range range = share(call.rows, 1, work.part, work.parts);
        const Size step = call.rows * call.channels, in_steps = call.repeated ? 1 : call.steps;
        call.first_row = range.first;
        call.last_row = range.last;
        for (Size image = 0; image < work.images; ++image) {
            call.x = reinterpret_cast<const std::int32_t*>(work.inputs[0]) + image * in_steps * step;
            call.y = reinterpret_cast<std::uint8_t*>(work.output) + image * call.steps * step;
            kernels_.lif(call);
        }
    }

private:
    Neurons neurons_;
    const Kernels& kernels_;
};

class MaxPoolStep : public Step {
public:
    MaxPoolStep(const WindowCall& call, Type type, Size rows, const Kernels& kernels)
        : call_(call), type_(type), rows_(rows), kernels_(kernels) {}

    void run(const Work& work) const override { kernels_.max_pool(type_, placed(call_, work, rows_)); }

private:
    WindowCall call_;
    Type type_;
    Size rows_;
    const Kernels& kernels_;
};

class GroupedConvStep : public Step {
public:
    // largest: of the inputs
    GroupedConvStep(const GroupedConvolution& layer, const WindowCall& call, Size rows, Size largest,
                    const Kernels& kernels)
        : layer_(layer),
          call_(call),
          rows_(rows),
          weight_(copied(layer.weight,
                         call.channels * call.kernel_height * call.kernel_width * call.in_channels / layer.groups)),
          bias_(copied(layer.bias, (layer.bias_map ? call.height * call.width : 1) * call.channels)),
          mult_(copied(layer.mult, call.channels)),
          shift_(copied(layer.shift, call.channels)),
          kernels_(kernels) {
        layer_.weight = weight_.data();
        if (layer.groups == call.channels && layer.groups == call.in_channels) {
            const Size taps = call.kernel_height * call.kernel_width;
            by_tap_.resize(weight_.size());
            for (Size c = 0; c < call.channels; ++c)
                for (Size tap = 0; tap < taps; ++tap)
                    by_tap_[static_cast<std::size_t>(tap * call.channels + c)] = layer.weight[c * taps + tap];
            layer_.by_tap = by_tap_.data();
            // small counts
            if (layer.input == Type::uint8 && largest * 127 * taps <= 32767) {
                words_by_tap_.assign(by_tap_.begin(), by_tap_.end());
                layer_.words_by_tap = words_by_tap_.data();
            }
        }
        layer_.bias = bias_.data();
        layer_.mult = mult_.data();
        layer_.shift = shift_.data();
    }

    void run(const Work& work) const override { kernels_.grouped_conv(layer_, placed(call_, work, rows_)); }

private:
    GroupedConvolution layer_;
    WindowCall call_;
    Size rows_;
    std::vector<std::int8_t> weight_, by_tap_;
    std::vector<std::int16_t> words_by_tap_;
    std::vector<std::int32_t> bias_, mult_;
    std::vector<std::uint8_t> shift_;
    const Kernels& kernels_;
};

class BlockSumStep : public Step {
public:
    BlockSumStep(const BlockSumCall& call, Size rows, const Kernels& kernels)
        : call_(call), rows_(rows), kernels_(kernels) {}

    void run(const Work& work) const override { kernels_.block_sum(placed(call_, work, rows_)); }

private:
    BlockSumCall call_;
    Size rows_;
    const Kernels& kernels_;
};

class MultiplyStep : public Step {
public:
    MultiplyStep(const MultiplyCall& call, Size rows, const Kernels& kernels)
        : call_(call), rows_(rows), kernels_(kernels) {}

    void run(const Work& work) const override {
        MultiplyCall call = with_share(call_, work, rows_);
        call.a = reinterpret_cast<const std::uint8_t*>(work.inputs[0]);
        call.b = reinterpret_cast<const std::uint8_t*>(work.inputs[1]);
        call.y = reinterpret_cast<std::uint8_t*>(work.output);
        kernels_.multiply(call);
    }

private:
    MultiplyCall call_;
    Size rows_;
    const Kernels& kernels_;
};

class SpikeAttentionStep : public Step {
public:
    SpikeAttentionStep(const SpikeAttentionCall& call, Size windows, Size heads, const Kernels& kernels)
        : call_(call), windows_(windows), heads_(heads), kernels_(kernels) {}

    // k^T v in 32 bits, or a row of sums in 32 bits, and v and k^T v in 16, in rows of whole vectors.
    Size scratch_bytes() const override {
        const Size row = (call_.v_dim + 31) / 32 * 32;
        return std::max(call_.qk_dim * call_.v_dim * type_bytes(Type::int32),
                        (call_.length + call_.qk_dim + 2) * row * type_bytes(Type::int16));
    }

    void run(const Work& work) const override {
        // Parts take turns, since the first time steps have fewest spikes, and what is 0 is skipped.
        for (Size unit = work.part; unit < work.images * windows_ * heads_; unit += work.parts) {
            const Size row = unit / heads_ * call_.length, head = unit % heads_;
            const auto part = [&](int input, Size stride, Size dim) {
                return reinterpret_cast<const std::uint8_t*>(work.inputs[static_cast<std::size_t>(input)]) +
                       row * stride + head * dim;
            };
            SpikeAttentionCall call = call_;
            call.q = part(0, call.qk_stride, call.qk_dim);
            call.k = part(1, call.qk_stride, call.qk_dim);
            call.v = part(2, call.v_stride, call.v_dim);
            call.y = reinterpret_cast<std::int32_t*>(work.output) + row * call.v_stride + head * call.v_dim;
            call.scratch = reinterpret_cast<std::int32_t*>(work.scratch);
            kernels_.spike_attention(call);
        }
    }

private:
    SpikeAttentionCall call_;
    Size windows_, heads_;
    const Kernels& kernels_;
};

// The tensors of a requantization, which a step owns.
struct Factors {
    Factors(const OperationView& view, Size channels)
        : mult(copied(view.elements<std::int32_t>("mult"), channels)),
          shift(copied(view.elements<std::uint8_t>("shift"), channels)) {}

    std::vector<std::int32_t> mult;
    std::vector<std::uint8_t> shift;
};

class RequantizeStep : public Step {
public:
    RequantizeStep(const OperationView& view, const RequantizeCall& call, const Kernels& kernels)
        : call_(call), factors_(view, call.channels), kernels_(kernels) {
        call_.mult = factors_.mult.data();
        call_.shift = factors_.shift.data();
    }

    void run(const Work& work) const override {
        const Range range = share(work.images * call_.rows, 1, work.part, work.parts);
        RequantizeCall call = call_;
        call.x = work.inputs[0] + range.first * call.channels * type_bytes(call.input);
        call.y = work.output + range.first * call.channels * type_bytes(call.output);
        call.rows = range.last - range.first;
        kernels_.requantize(call);
    }

private:
    RequantizeCall call_;
    Factors factors_;
    const Kernels& kernels_;
};

// This thread's share of the rows of each image, one image after another; their inputs and results lie so many bytes
// apart.
template <typename Call>
void run_by_image(void (*kernel)(const Call&), Call call, const Work& work, Size in_bytes, Size out_bytes) {
    const Range range = share(call.rows, 1, work.part, work.parts);
    call.first_row = range.first;
    call.last_row = range.last;
    for (Size image = 0; image < work.images; ++image) {
        call.x = work.inputs[0] + image * in_bytes;
        call.y = work.output + image * out_bytes;
        kernel(call);
    }
}

class IntegrateStep : public Step {
public:
    IntegrateStep(const OperationView& view, const IntegrateCall& call, const Kernels& kernels)
        : call_(call),
          bias_(copied(view.elements<std::int32_t>("bias"), call.channels)),
          factors_(view, call.channels),
          kernels_(kernels) {
        call_.bias = bias_.data();
        call_.mult = factors_.mult.data();
        call_.shift = factors_.shift.data();
    }

    void run(const Work& work) const override {
        const Size elements = call_.rows * call_.channels;
        run_by_image(kernels_.integrate, call_, work, call_.steps * elements * type_bytes(call_.input),
                     elements * type_bytes(call_.output));
    }

private:
    IntegrateCall call_;
    std::vector<std::int32_t> bias_;
    Factors factors_;
    const Kernels& kernels_;
};

class FireStep : public Step {
public:
    FireStep(const OperationView& view, const FireCall& call, const Kernels& kernels)
        : call_(call), factors_(view, call.channels), kernels_(kernels) {
        call_.mult = factors_.mult.data();
        call_.shift = factors_.shift.data();
    }

    void run(const Work& work) const override {
        const Size elements = call_.rows * call_.channels;
        run_by_image(kernels_.fire, call_, work, elements * type_bytes(call_.input), call_.steps * elements);
    }

private:
    FireCall call_;
    Factors factors_;
    const Kernels& kernels_;
};

}  // namespace

// Windows over the images of all time steps.
WindowCall window_call(const OperationView& view, const WindowShape& shape, Size channels) {
    WindowCall call{};
    call.in_height = shape.in_height;
    call.in_width = shape.in_width;
    call.in_channels = view.input(0).channels();
    call.height = shape.height;
    call.width = shape.width;
    call.channels = channels;
    call.kernel_height = shape.kernel.first;
    call.kernel_width = shape.kernel.second;
    call.stride_height = shape.stride.first;
    call.stride_width = shape.stride.second;
    call.padding_height = shape.padding.first;
    call.padding_width = shape.padding.second;
    return call;
}

Neurons::Neurons(const OperationView& view) {
    const Value& x = view.input(0);
    call_.steps = view.attribute("steps");
    call_.repeated = view.attribute("repeated") != 0;
    call_.rows = call_.repeated ? x.rows() : x.rows() / call_.steps;
    call_.channels = x.channels();
    call_.decay = static_cast<std::int32_t>(view.attribute("decay"));
    call_.input_decay = view.attribute("input_decay") != 0;
    call_.soft_reset = view.attribute("soft_reset") != 0;
    call_.fraction_bits = static_cast<int>(view.attribute("fraction_bits"));
    const auto read = [&](const char* role) { return copied(view.elements<std::int32_t>(role), call_.channels); };
    threshold_ = read("threshold");
    reset_ = read("reset");
    bias_ = read("bias");
    call_.threshold = threshold_.data();
    call_.reset = reset_.data();
    call_.bias = bias_.data();
}

std::unique_ptr<Step> make_lif(const OperationView& view, const Kernels& kernels) {
    return std::make_unique<LifStep>(view, kernels);
}

std::unique_ptr<Step> make_max_pool(const OperationView& view, const Kernels& kernels) {
    const Value& x = view.input(0);
    const WindowCall call = window_call(view, window_shape(view), x.channels());
    return std::make_unique<MaxPoolStep>(call, x.type(), view.output().rows(), kernels);
}

std::unique_ptr<Step> make_grouped_conv2d(const OperationView& view, const LinearLayer& layer, const WindowShape& shape,
                                          Size groups, const Kernels& kernels) {
    GroupedConvolution grouped{};
    grouped.input = layer.input;
    grouped.output = layer.output;
    grouped.groups = groups;
    grouped.weight = layer.weight;
    grouped.bias = layer.bias;
    grouped.bias_map = layer.bias_rows > 1;
    grouped.mult = layer.mult;
    grouped.shift = layer.shift;
    grouped.result_largest = layer.result_largest;
    return std::make_unique<GroupedConvStep>(grouped, window_call(view, shape, layer.channels), view.output().rows(),
                                             layer.largest, kernels);
}

std::unique_ptr<Step> make_block_sum(const OperationView& view, const Kernels& kernels) {
    const Value& x = view.input(0);
    const Size rows = view.attribute("rows");
    BlockSumCall call{};
    call.input = x.type();
    call.output = view.output().type();
    call.channels = x.channels();
    call.rows_joined = x.rows() / rows;
    call.channels_joined = x.channels() / view.attribute("channels");
    return std::make_unique<BlockSumStep>(call, rows, kernels);
}

std::unique_ptr<Step> make_multiply(const OperationView& view, const Kernels& kernels) {
    const Value &a = view.input(0), &b = view.input(1);
    MultiplyCall call{};
    call.channels = a.channels();
    call.rows_joined = a.rows() / b.rows();
    call.channels_joined = a.channels() / b.channels();
    return std::make_unique<MultiplyStep>(call, a.rows(), kernels);
}

std::unique_ptr<Step> make_spike_attention(const OperationView& view, const Kernels& kernels) {
    const Value &q = view.input(0), &v = view.input(2);
    const Size windows = view.attribute("windows"), heads = view.attribute("heads");
    SpikeAttentionCall call{};
    call.length = q.rows() / windows;
    call.qk_dim = q.channels() / heads;
    call.v_dim = v.channels() / heads;
    call.qk_stride = q.channels();
    call.v_stride = v.channels();
    call.q_largest = q.largest;
    call.kv_largest = call.length * view.input(1).largest * v.largest;
    return std::make_unique<SpikeAttentionStep>(call, windows, heads, kernels);
}

std::unique_ptr<Step> make_requantize(const OperationView& view, const Kernels& kernels) {
    const Value& x = view.input(0);
    RequantizeCall call{};
    call.input = x.type();
    call.output = view.output().type();
    call.rows = x.rows();
    call.channels = x.channels();
    call.result_largest = call.output == Type::uint8 ? view.output().largest : 255;
    return std::make_unique<RequantizeStep>(view, call, kernels);
}

std::unique_ptr<Step> make_integrate(const OperationView& view, const Kernels& kernels) {
    IntegrateCall call{};
    call.input = view.input(0).type();
    call.output = view.output().type();
    call.steps = view.attribute("steps");
    call.rows = view.output().rows();
    call.channels = view.output().channels();
    call.result_largest = call.output == Type::uint8 ? view.output().largest : 255;
    return std::make_unique<IntegrateStep>(view, call, kernels);
}

std::unique_ptr<Step> make_fire(const OperationView& view, const Kernels& kernels) {
    FireCall call{};
    call.input = view.input(0).type();
    call.steps = view.attribute("steps");
    call.rows = view.input(0).rows();
    call.channels = view.input(0).channels();
    return std::make_unique<FireStep>(view, call, kernels);
}

}  // namespace swincompress
