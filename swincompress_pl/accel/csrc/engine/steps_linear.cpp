// Linear layers, and convolutions as linear layers of their receptive fields.
#include <algorithm>
#include <cstring>

#include "engine/process.h"
#include "engine/steps.h"
#include "kernels/buffer.h"

namespace swincompress {
namespace {

// Below this many rows per thread, a layer is split by channels: each thread then reads only its own weights.
constexpr Size kRowsPerPart = 64;

// Most of the second-level cache, as weights only pass through it. The bounds are those of what was tried: 256 kB to
// 1 MB.
Size block_bytes() { return std::clamp<Size>(second_level_cache_bytes() / 4 * 3, Size{192} * 1024, Size{768} * 1024); }

// A layer in the form that its kernels need.
class PackedLayer {
public:
    PackedLayer(const LinearLayer& layer, const Kernels& kernels)
        : kernels_(kernels), channels_(layer.channels), bytes_(kernels.linear_bytes(layer)), packed_(bytes_.packed) {
        kernels.pack_linear(layer, bytes_.packed, packed_.data());
    }

    Size scratch_bytes() const { return bytes_.scratch; }
    Size column_unit() const { return kernels_.column_unit; }
    Size channels() const { return channels_; }

    void run(LinearCall call) const {
        call.packed = packed_.data();
        if (call.rows > 0 && call.first_channel < call.last_channel) kernels_.linear(call);
    }

private:
    const Kernels& kernels_;
    Size channels_;
    LinearBytes bytes_;
    Buffer packed_;
};

LinearLayer read_layer(const OperationView& view) {
    LinearLayer layer{};
    layer.channels = view.attribute("channels");
    layer.depth = view.tensor("weight").elements() / layer.channels;
    layer.bias_rows = view.tensor("bias").elements() / layer.channels;
    layer.input = view.input(0).type();
    layer.output = view.output().type();
    layer.largest = view.input(0).largest;
    layer.below = view.input(0).below;
    layer.result_largest = layer.output == Type::uint8 ? view.output().largest : 255;
    const Size tuned = view.operation().tuning.block_bytes;
    layer.block_bytes = tuned > 0 ? tuned : block_bytes();
    layer.weight = view.elements<std::int8_t>("weight");
    layer.bias = view.elements<std::int32_t>("bias");
    layer.mult = view.elements<std::int32_t>("mult");
    layer.shift = view.elements<std::uint8_t>("shift");
    return layer;
}

class LinearStep : public RowStep {
public:
    LinearStep(const LinearLayer& layer, Size rows, const Kernels& kernels)
        : layer_(layer, kernels), output_(layer.output), in_row_(layer.depth), rows_(rows), kernels_(kernels) {}

    Size row_scratch_bytes() const override { return layer_.scratch_bytes(); }

    Size scratch_bytes() const override {
        return neurons_ == nullptr ? row_scratch_bytes() : neurons_scratch_bytes(*this, neurons_->call());
    }

    void run_rows(const std::byte* x, Range rows, std::byte* y, std::byte* scratch) const override {
        LinearCall call{};
        call.x = x + rows.first * in_row_;
        call.x_stride = in_row_;
        call.y = y;
        call.rows = rows.last - rows.first;
        call.last_channel = layer_.channels();
        call.scratch = scratch;
        layer_.run(call);
    }

    void run(const Work& work) const override {
        if (neurons_ != nullptr) {
            const LifCall& lif = neurons_->call();
            return run_with_neurons(*this, lif, work, share(work.images * lif.rows, 1, work.part, work.parts),
                                    kernels_);
        }
        const Size rows = work.images * rows_;
        const bool by_channel = work.parts > 1 && rows < kRowsPerPart * work.parts;
        const Range all_rows{0, rows}, all_channels{0, layer_.channels()};
        const Range r = by_channel ? all_rows : share(rows, 1, work.part, work.parts);
        const Range c =
            by_channel ? share(layer_.channels(), layer_.column_unit(), work.part, work.parts) : all_channels;
        const Size out_row = layer_.channels() * type_bytes(output_);
        LinearCall call{};
        call.x = work.inputs[0] + r.first * in_row_;
        call.x_stride = in_row_;
        call.y = work.output + r.first * out_row;
        call.rows = r.last - r.first;
        call.first_channel = c.first;
        call.last_channel = c.last;
        call.table = table_.empty() ? nullptr : table_.data();
        call.residual = adds_residual_ ? work.inputs[1] + r.first * out_row : nullptr;
        call.scratch = work.scratch;
        layer_.run(call);
    }

    bool fuse(const OperationView& next) override {
        if (!table_.empty() || adds_residual_ || neurons_ != nullptr) return false;
        neurons_ = neurons_behind(next, output_);
        if (neurons_ != nullptr) return true;
        const bool takes_table = next.operation().kind == "table" && output_ == Type::int8;
        if (takes_table && type_bytes(next.output().type()) == 1) {
            table_ = copied(next.elements<std::uint8_t>("values"), 256);
            return true;
        }
        adds_residual_ = next.operation().kind == "add" && next.output().type() == output_ && output_ != Type::uint8;
        return adds_residual_;
    }

private:
    PackedLayer layer_;
    Type output_;
    Size in_row_, rows_;
    const Kernels& kernels_;
    std::vector<std::uint8_t> table_;
    bool adds_residual_ = false;
    std::unique_ptr<Neurons> neurons_;
};

class Conv2dStep : public RowStep {
public:
    // images: of one image, its time steps
    Conv2dStep(const LinearLayer& layer, const WindowShape& shape, Size images, Size in_channels,
               const Kernels& kernels)
        : layer_(layer, kernels),
          shape_(shape),
          images_(images),
          in_channels_(in_channels),
          field_bytes_(layer.input == Type::uint8 ? kernels.row_stride(layer.depth) : layer.depth),
          output_(layer.output),
          kernels_(kernels) {}

    Size row_scratch_bytes() const override { return fields_bytes() + layer_.scratch_bytes(); }

    Size scratch_bytes() const override {
        return neurons_ == nullptr ? row_scratch_bytes() : neurons_scratch_bytes(*this, neurons_->call());
    }

    void run(const Work& work) const override {
        const Size rows = neurons_ == nullptr ? images_ * shape_.height * shape_.width : neurons_->call().rows;
        const Range range = share(work.images * rows, 1, work.part, work.parts);
        if (neurons_ != nullptr) return run_with_neurons(*this, neurons_->call(), work, range, kernels_);
        const Size out_row = layer_.channels() * type_bytes(output_);
        run_rows(work.inputs[0], range, work.output + range.first * out_row, work.scratch);
    }

    void run_rows(const std::byte* x, Range range, std::byte* y, std::byte* scratch) const override {
        const Size positions = shape_.height * shape_.width;
        const Size in_bytes = shape_.in_height * shape_.in_width * in_channels_;
        const Size out_row = layer_.channels() * type_bytes(output_);
        for (Size first = range.first; first < range.last;) {
            const Size image = first / positions, position = first % positions;
            const Size rows = std::min({kBlock, range.last - first, positions - position});
            collect(x + image * in_bytes, position, rows, scratch);
            LinearCall call{};
            call.x = scratch;
            call.x_stride = field_bytes_;
            call.y = y + (first - range.first) * out_row;
            call.rows = rows;
            call.last_channel = layer_.channels();
            call.bias_row = position;
            call.scratch = scratch + fields_bytes();
            layer_.run(call);
            first += rows;
        }
    }

    bool fuse(const OperationView& next) override {
        if (neurons_ == nullptr)
            neurons_ = neurons_behind(next, output_);
        else
            return false;
        return neurons_ != nullptr;
    }

private:
    static constexpr Size kBlock = 64;
    static constexpr Size kCopied = 16, kShortLine = 512;  // bytes at once; longer lines are left to memcpy

    Size fields_bytes() const { return aligned(kBlock * field_bytes_ + kCopied); }

    // The receptive fields of `rows` positions, (kh, kw, C) each, zeros outside the image, and anything between them.
    void collect(const std::byte* image, Size position, Size rows, std::byte* fields) const {
        const Size line = shape_.kernel.second * in_channels_;
        for (Size row = 0; row < rows; ++row, fields += field_bytes_) {
            const Size top = (position + row) / shape_.width * shape_.stride.first - shape_.padding.first;
            const Size left = (position + row) % shape_.width * shape_.stride.second - shape_.padding.second;
            for (Size ky = 0; ky < shape_.kernel.first; ++ky) collect_line(image, top + ky, left, fields + ky * line);
        }
    }

    // May also write up to kCopied - 1 bytes behind the line.
    void collect_line(const std::byte* image, Size y, Size left, std::byte* field) const {
        const Size channels = in_channels_, width = shape_.kernel.second, bytes = width * channels;
        const Size first = y < 0 || y >= shape_.in_height ? width : std::clamp<Size>(-left, 0, width);
        const Size last = std::clamp<Size>(shape_.in_width - left, first, width);
        const Size at = (y * shape_.in_width + left) * channels, end = shape_.in_height * shape_.in_width * channels;
        if (last - first == width && bytes <= kShortLine && at + bytes + kCopied <= end) {
            for (Size b = 0; b < bytes; b += kCopied) std::memcpy(field + b, image + at + b, kCopied);
            return;
        }
        std::memset(field, 0, static_cast<std::size_t>(first * channels));
        if (first < last)
            std::memcpy(field + first * channels, image + at + first * channels,
                        static_cast<std::size_t>((last - first) * channels));
        std::memset(field + last * channels, 0, static_cast<std::size_t>((width - last) * channels));
    }

    PackedLayer layer_;
    WindowShape shape_;
    Size images_, in_channels_;
    Size field_bytes_;  // between receptive fields
    Type output_;
    const Kernels& kernels_;
    std::unique_ptr<Neurons> neurons_;
};

// Whether a layer of spikes is also packed for products.
bool multiplies_too(const OperationView& view, const Kernels& kernels) {
    return events_max_percent(view, kernels) < kEventsOnly;
}

}  // namespace

std::unique_ptr<Step> make_linear(const OperationView& view, const Kernels& kernels) {
    const Value& x = view.input(0);
    const LinearLayer layer = read_layer(view);
    const bool events = takes_events(x, layer, kernels);
    std::unique_ptr<RowStep> dense;
    if (!events || multiplies_too(view, kernels)) dense = std::make_unique<LinearStep>(layer, x.rows(), kernels);
    if (!events) return dense;
    const WindowShape column{x.rows(), 1, x.rows(), 1, {1, 1}, {1, 1}, {0, 0}};
    return make_events(view, layer, column, std::move(dense), kernels);
}

std::unique_ptr<Step> make_conv2d(const OperationView& view, const Kernels& kernels) {
    const WindowShape shape = window_shape(view);
    const Value& x = view.input(0);
    const LinearLayer layer = read_layer(view);
    const Size groups = view.attribute_or("groups", 1);
    if (groups > 1) return make_grouped_conv2d(view, layer, shape, groups, kernels);
    const bool events = takes_events(x, layer, kernels);
    const Size images = view.output().rows() / (shape.height * shape.width);
    std::unique_ptr<RowStep> dense;
    if (!events || multiplies_too(view, kernels))
        dense = std::make_unique<Conv2dStep>(layer, shape, images, x.channels(), kernels);
    if (!events) return dense;
    return make_events(view, layer, shape, std::move(dense), kernels);
}

}  // namespace swincompress
