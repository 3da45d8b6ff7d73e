// The steps around the matrix products: layer norm, softmax, tables, sums, means and moved rows.
#include <algorithm>
#include <cstring>

#include "engine/steps.h"

namespace swincompress {
namespace {

std::size_t unsigned_size(Size size) { return static_cast<std::size_t>(size); }

class LayerNormStep : public Step {
public:
    LayerNormStep(const LayerNormCall& call, std::vector<std::int32_t> gain, std::vector<std::int64_t> offset,
                  const Kernels& kernels)
        : call_(call), gain_(std::move(gain)), offset_(std::move(offset)), kernels_(kernels) {
        for (std::int64_t& value : offset_) value += std::int64_t{1} << (call.shift - 1);
        call_.gain = gain_.data();
        call_.offset = offset_.data();
    }

    void run(const Work& work) const override {
        const Range range = share(work.images * call_.rows, 1, work.part, work.parts);
        LayerNormCall call = call_;
        call.x = work.inputs[0] + range.first * call.channels * type_bytes(call.input);
        call.y = work.output + range.first * call.channels * type_bytes(call.output);
        call.rows = range.last - range.first;
        kernels_.layer_norm(call);
    }

private:
    LayerNormCall call_;
    std::vector<std::int32_t> gain_;
    std::vector<std::int64_t> offset_;
    const Kernels& kernels_;
};

class SoftmaxStep : public Step {
public:
    SoftmaxStep(const SoftmaxCall& call, const Kernels& kernels) : call_(call), kernels_(kernels) {}

    Size scratch_bytes() const override { return call_.channels * static_cast<Size>(sizeof(std::uint16_t)); }

    void run(const Work& work) const override {
        const Range range = share(work.images * call_.rows, 1, work.part, work.parts);
        SoftmaxCall call = call_;
        call.x = work.inputs[0] + range.first * call.channels * type_bytes(call.input);
        call.y = reinterpret_cast<std::uint8_t*>(work.output) + range.first * call.channels;
        call.rows = range.last - range.first;
        call.scratch = reinterpret_cast<std::uint16_t*>(work.scratch);
        kernels_.softmax(call);
    }

private:
    SoftmaxCall call_;
    const Kernels& kernels_;
};

class TableStep : public Step {
public:
    TableStep(const void* values, Size entry_bytes, Size elements, const Kernels& kernels)
        : values_(copied(static_cast<const std::byte*>(values), 256 * entry_bytes)),
          entry_bytes_(entry_bytes),
          elements_(elements),
          kernels_(kernels) {}

    void run(const Work& work) const override {
        const Range range = share(work.images * elements_, 64, work.part, work.parts);
        const auto* x = reinterpret_cast<const std::uint8_t*>(work.inputs[0]) + range.first;
        std::byte* y = work.output + range.first * entry_bytes_;
        kernels_.table(x, range.last - range.first, values_.data(), entry_bytes_, y);
    }

private:
    std::vector<std::byte> values_;
    Size entry_bytes_, elements_;
    const Kernels& kernels_;
};

class AddStep : public Step {
public:
    // The second summand has `repeated` elements, and is the same for every such run of the first.
    AddStep(Type type, Size elements, Size repeated, const Kernels& kernels)
        : type_(type), elements_(elements), repeated_(repeated), kernels_(kernels) {}

    void run(const Work& work) const override {
        if (repeated_ == elements_) return add(work, 0, 0, share(work.images * elements_, 64, work.part, work.parts));
        const Range range = share(repeated_, 64, work.part, work.parts);
        for (Size at = 0; at < work.images * elements_; at += repeated_)
            add(work, at, at / elements_ * repeated_, range);
    }

private:
    void add(const Work& work, Size at, Size other, Range range) const {
        const Size size = type_bytes(type_), first = (at + range.first) * size;
        kernels_.add(type_, work.inputs[0] + first, work.inputs[1] + (other + range.first) * size,
                     range.last - range.first, work.output + first);
    }

    Type type_;
    Size elements_, repeated_;
    const Kernels& kernels_;
};

class AddConstantStep : public Step {
public:
    AddConstantStep(Type type, const void* constant, Size elements, const Kernels& kernels)
        : type_(type),
          constant_(copied(static_cast<const std::byte*>(constant), elements * type_bytes(type))),
          elements_(elements),
          kernels_(kernels) {}

    void run(const Work& work) const override {
        const Range range = share(elements_, 64, work.part, work.parts);
        const Size size = type_bytes(type_);
        for (Size image = 0; image < work.images; ++image) {
            const Size at = (image * elements_ + range.first) * size;
            kernels_.add(type_, work.inputs[0] + at, constant_.data() + range.first * size, range.last - range.first,
                         work.output + at);
        }
    }

private:
    Type type_;
    std::vector<std::byte> constant_;
    Size elements_;
    const Kernels& kernels_;
};

class PrependStep : public Step {
public:
    PrependStep(const void* rows, Size rows_bytes, Size in_bytes)
        : rows_(copied(static_cast<const std::byte*>(rows), rows_bytes)), in_bytes_(in_bytes) {}

    void run(const Work& work) const override {
        const Range range = share(work.images, 1, work.part, work.parts);
        for (Size image = range.first; image < range.last; ++image) {
            std::byte* y = work.output + image * (static_cast<Size>(rows_.size()) + in_bytes_);
            std::memcpy(y, rows_.data(), rows_.size());
            std::memcpy(y + rows_.size(), work.inputs[0] + image * in_bytes_, unsigned_size(in_bytes_));
        }
    }

private:
    std::vector<std::byte> rows_;
    Size in_bytes_;
};

class GatherStep : public Step {
public:
    GatherStep(std::vector<std::int32_t> index, Size row_bytes, Size in_rows, const Kernels& kernels)
        : index_(std::move(index)), row_bytes_(row_bytes), in_rows_(in_rows), kernels_(kernels) {}

    void run(const Work& work) const override {
        const auto count = static_cast<Size>(index_.size());
        const Range range = share(count, 1, work.part, work.parts);
        for (Size image = 0; image < work.images; ++image) {
            const auto* x = reinterpret_cast<const std::uint8_t*>(work.inputs[0]) + image * in_rows_ * row_bytes_;
            auto* y = reinterpret_cast<std::uint8_t*>(work.output) + (image * count + range.first) * row_bytes_;
            kernels_.gather(x, row_bytes_, index_.data() + range.first, range.last - range.first, y);
        }
    }

private:
    std::vector<std::int32_t> index_;
    Size row_bytes_, in_rows_;
    const Kernels& kernels_;
};

class MeanStep : public Step {
public:
    MeanStep(const MeanCall& call, const Kernels& kernels)
        : call_(call),
          mult_(copied(call.mult, call.channels)),
          shift_(copied(call.shift, call.channels)),
          kernels_(kernels) {
        call_.mult = mult_.data();
        call_.shift = shift_.data();
    }

    void run(const Work& work) const override {
        const Range range = share(call_.channels, 64, work.part, work.parts);
        for (Size image = 0; image < work.images; ++image) {
            MeanCall call = call_;
            call.x = work.inputs[0] + image * call.tokens * call.channels * type_bytes(call.input);
            call.y = work.output + image * call.channels * type_bytes(call.output);
            call.first_channel = range.first;
            call.last_channel = range.last;
            kernels_.mean(call);
        }
    }

private:
    MeanCall call_;
    std::vector<std::int32_t> mult_;
    std::vector<std::uint8_t> shift_;
    const Kernels& kernels_;
};

}  // namespace

std::unique_ptr<Step> make_layer_norm(const OperationView& view, const Kernels& kernels) {
    const Value& x = view.input(0);
    const Size channels = x.channels();
    LayerNormCall call{};
    call.input = x.type();
    call.output = view.output().type();
    call.rows = x.rows();
    call.channels = channels;
    call.epsilon = view.attribute("epsilon");
    call.shift = static_cast<int>(view.attribute("shift"));
    return std::make_unique<LayerNormStep>(call, copied(view.elements<std::int32_t>("gain"), channels),
                                           copied(view.elements<std::int64_t>("offset"), channels), kernels);
}

std::unique_ptr<Step> make_softmax(const OperationView& view, const Kernels& kernels) {
    const Value& x = view.input(0);
    SoftmaxCall call{};
    call.input = x.type();
    call.rows = x.rows();
    call.channels = x.channels();
    call.mult = static_cast<std::int32_t>(view.attribute("mult"));
    call.shift = static_cast<int>(view.attribute("shift"));
    return std::make_unique<SoftmaxStep>(call, kernels);
}

std::unique_ptr<Step> make_table(const OperationView& view, const Kernels& kernels) {
    const Tensor& values = view.tensor("values");
    return std::make_unique<TableStep>(values.data, type_bytes(values.type), view.input(0).elements(), kernels);
}

std::unique_ptr<Step> make_add(const OperationView& view, const Kernels& kernels) {
    const Value &a = view.input(0), &b = view.input(1);
    return std::make_unique<AddStep>(a.type(), a.elements(), b.elements(), kernels);
}

std::unique_ptr<Step> make_add_constant(const OperationView& view, const Kernels& kernels) {
    const Value& x = view.input(0);
    return std::make_unique<AddConstantStep>(x.type(), view.tensor("constant").data, x.elements(), kernels);
}

std::unique_ptr<Step> make_prepend(const OperationView& view, const Kernels& /*kernels*/) {
    const Tensor& rows = view.tensor("rows");
    return std::make_unique<PrependStep>(rows.data, rows.bytes(), view.input(0).bytes());
}

std::unique_ptr<Step> make_gather(const OperationView& view, const Kernels& kernels) {
    const Value& x = view.input(0);
    const Tensor& index = view.tensor("index");
    return std::make_unique<GatherStep>(copied(view.elements<std::int32_t>("index"), index.elements()),
                                        x.channels() * type_bytes(x.type()), x.rows(), kernels);
}

std::unique_ptr<Step> make_mean(const OperationView& view, const Kernels& kernels) {
    const Value& x = view.input(0);
    MeanCall call{};
    call.input = x.type();
    call.output = view.output().type();
    call.tokens = x.rows();
    call.channels = x.channels();
    call.mult = view.elements<std::int32_t>("mult");
    call.shift = view.elements<std::uint8_t>("shift");
    return std::make_unique<MeanStep>(call, kernels);
}

}  // namespace swincompress
