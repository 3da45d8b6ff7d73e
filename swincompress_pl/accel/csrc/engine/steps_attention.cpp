// Windowed attention: a head of a window is one thread's, or if there are few of them, some of its queries are.
#include <algorithm>

#include "engine/steps.h"

namespace swincompress {
namespace {

struct AttentionTables {
    std::vector<std::int32_t> exp_mult, out_mult, bias;
    std::vector<std::uint8_t> exp_shift, out_shift, region;
};

// From so many (window, head) pairs per thread on, none is split: both threads would prepare its keys and values.
constexpr Size kWholePairs = 8;

class AttentionStep : public Step {
public:
    AttentionStep(const AttentionCall& shape, Size windows, AttentionTables tables, const Kernels& kernels)
        : shape_(shape), windows_(windows), tables_(std::move(tables)), kernels_(kernels) {
        shape_.exp_mult = tables_.exp_mult.data();
        shape_.exp_shift = tables_.exp_shift.data();
        shape_.out_mult = tables_.out_mult.data();
        shape_.out_shift = tables_.out_shift.data();
        shape_.bias = tables_.bias.empty() ? nullptr : tables_.bias.data();
        shape_.region = tables_.region.empty() ? nullptr : tables_.region.data();
    }

    Size scratch_bytes() const override {
        return kernels_.attention_scratch_bytes(shape_.length, shape_.qk_dim, shape_.v_dim);
    }

    void run(const Work& work) const override {
        const Size rows = windows_ * shape_.length, queries = rows * shape_.heads;
        const Size in_bytes = rows * shape_.heads * (2 * shape_.qk_dim + shape_.v_dim);
        const Size out_bytes = rows * shape_.heads * shape_.v_dim;
        const Size pairs = work.images * windows_ * shape_.heads;
        const bool whole = pairs % work.parts == 0 || pairs >= kWholePairs * work.parts;
        const Range range = share(work.images * queries, whole ? shape_.length : 1, work.part, work.parts);
        if (range.first == range.last) return;
        for (Size image = range.first / queries; image * queries < range.last; ++image) {
            AttentionCall call = shape_;
            call.qkv = reinterpret_cast<const std::int8_t*>(work.inputs[0] + image * in_bytes);
            call.y = reinterpret_cast<std::int8_t*>(work.output + image * out_bytes);
            call.first_query = std::max<Size>(range.first - image * queries, 0);
            call.last_query = std::min(range.last - image * queries, queries);
            call.scratch = work.scratch;
            kernels_.attention(call);
        }
    }

private:
    AttentionCall shape_;
    Size windows_;
    AttentionTables tables_;
    const Kernels& kernels_;
};

// The table spread to one bias per pair of tokens, in rows that whole registers can read.
std::vector<std::int32_t> spread_bias(const OperationView& view, const AttentionCall& shape) {
    const Size biases = view.attribute("biases");
    const auto* table = view.elements<std::int32_t>("bias_table");
    const auto* index = view.elements<std::int32_t>("bias_index");
    std::vector<std::int32_t> bias(
        static_cast<std::size_t>(element_count({shape.heads, shape.length, shape.bias_stride})));
    std::int32_t* row = bias.data();
    for (Size head = 0; head < shape.heads; ++head)
        for (Size i = 0; i < shape.length; ++i, row += shape.bias_stride)
            for (Size j = 0; j < shape.length; ++j) row[j] = table[head * biases + index[i * shape.length + j]];
    return bias;
}

}  // namespace

std::unique_ptr<Step> make_attention(const OperationView& view, const Kernels& kernels) {
    const Size windows = view.attribute("windows");
    AttentionCall shape{};
    shape.heads = view.attribute("heads");
    shape.qk_dim = view.attribute("qk_dim");
    shape.v_dim = view.attribute("v_dim");
    shape.length = view.input(0).rows() / windows;
    shape.bias_stride = (shape.length + 15) / 16 * 16;

    AttentionTables tables;
    tables.exp_mult = copied(view.elements<std::int32_t>("exp_mult"), shape.heads);
    tables.exp_shift = copied(view.elements<std::uint8_t>("exp_shift"), shape.heads);
    tables.out_mult = copied(view.elements<std::int32_t>("out_mult"), shape.heads);
    tables.out_shift = copied(view.elements<std::uint8_t>("out_shift"), shape.heads);
    if (view.has("bias_table")) tables.bias = spread_bias(view, shape);
    if (view.has("region")) tables.region = copied(view.elements<std::uint8_t>("region"), windows * shape.length);
    return std::make_unique<AttentionStep>(shape, windows, std::move(tables), kernels);
}

}  // namespace swincompress
