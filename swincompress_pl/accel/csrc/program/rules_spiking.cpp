#include "program/rules.h"

namespace swincompress {
namespace {

constexpr Size kCurrentMax = Size{1} << 27, kThresholdMax = Size{1} << 28;
constexpr Size kStepsMax = 255;  // binary time steps that stand for a count

}  // namespace

Value check_lif(Call& call) {
    const Value& x = call.source(0, {Type::int32});
    const Size steps = call.integer("steps", 1, 1 << 16);
    const bool repeated = call.integer("repeated", 0, 1) != 0;
    call.require(repeated || x.rows() % steps == 0,
                 std::to_string(x.rows()) + " rows do not split into " + std::to_string(steps) + " time steps");
    call.integer("decay", 0, 1 << 16);
    call.integer("input_decay", 0, 1);
    const Size reset_max = call.integer("soft_reset", 0, 1) != 0 ? 0 : kThresholdMax;
    call.integer("fraction_bits", 0, 15);
    call.elements<std::int32_t>("threshold", {x.channels()}, 1, kThresholdMax);
    call.elements<std::int32_t>("reset", {x.channels()}, -reset_max, reset_max);
    call.elements<std::int32_t>("bias", {x.channels()}, -kCurrentMax, kCurrentMax);
    std::vector<Size> shape = x.shape;
    if (repeated) shape.insert(shape.begin(), steps);
    const ValueType spikes{Type::uint8, 1};
    call.require(call.operation().output == spikes, "output is " + call.operation().output.name());
    return call.counts(shape, "a spike", 1);
}

Value check_max_pool(Call& call) {
    const Value& x = call.source(0, {Type::int8, Type::uint8, Type::int16, Type::int32});
    const auto [height, width] = call.positions(x, call.pair("kernel", 1, 1024));
    std::vector<Size> shape(x.shape.begin(), x.shape.end() - 3);
    shape.insert(shape.end(), {height, width, x.channels()});
    return call.selection(shape, x);
}

Value check_block_sum(Call& call) {
    const Value& x = call.source(0, {Type::uint8, Type::int32});
    const Size rows = call.integer("rows", 1, 1 << 24), channels = call.integer("channels", 1, 1 << 20);
    call.require(x.rows() % rows == 0 && x.channels() % channels == 0,
                 "input of " + std::to_string(x.rows()) + " rows and " + std::to_string(x.channels()) +
                     " channels does not split into " + std::to_string(rows) + " x " + std::to_string(channels) +
                     " blocks");
    std::vector<Size> shape = {rows, channels};
    if (rows == x.rows()) {
        shape = x.shape;
        shape.back() = channels;
    }
    if (x.type() == Type::int32) return call.output(shape, {Type::int32});
    const Size reach = x.largest * (x.rows() / rows) * (x.channels() / channels);
    return call.counts(shape, "a sum", reach, {Type::int32});
}

Value check_multiply(Call& call) {
    const Value &a = call.source(0, {Type::uint8}), &b = call.source(1, {Type::uint8});
    call.require(a.rows() % b.rows() == 0 && a.channels() % b.channels() == 0,
                 "shapes " + shape_text(a.shape) + " and " + shape_text(b.shape) +
                     "; the second's rows and channels must divide the first's");
    return call.counts(a.shape, "a product", a.largest * b.largest);
}

Value check_spike_attention(Call& call) {
    const Value &q = call.source(0, {Type::uint8}), &k = call.source(1, {Type::uint8}),
                &v = call.source(2, {Type::uint8});
    const Size windows = call.integer("windows", 1, 1 << 20), heads = call.integer("heads", 1, 1 << 12);
    call.require(q.rows() == k.rows() && q.rows() == v.rows() && q.rows() % windows == 0,
                 "tokens of q, k and v must agree and split into " + std::to_string(windows) + " windows");
    call.require(q.channels() == k.channels() && q.channels() % heads == 0 && v.channels() % heads == 0,
                 "channels of q and k must agree, and all split into " + std::to_string(heads) + " heads");
    const Size terms = (q.rows() / windows) * (q.channels() / heads);  // at most 2^32, times 2^24
    Value output = call.output(v.shape, {Type::int32});
    const Size reach = terms * q.largest * k.largest * v.largest;
    call.require(reach <= kInt32Max, "a count may reach " + std::to_string(reach) + ", beyond int32");
    output.largest = reach;
    return output;
}

Value check_requantize(Call& call) {
    const Value& x = call.source(0, {Type::int16, Type::int32});
    call.requantization(x.channels());
    return call.bounded(x.shape, {Type::int8, Type::uint8, Type::int16, Type::int32});
}

Value check_integrate(Call& call) {
    const Value& x = call.source(0, {Type::uint8, Type::int32});
    const Size steps = call.integer("steps", 1, kStepsMax);
    call.require(
        x.shape.size() > 1 && x.shape[0] == steps,
        "input has shape " + shape_text(x.shape) + "; its first axis must have " + std::to_string(steps) + " steps");
    call.elements<std::int32_t>("bias", {x.channels()}, -kInt32Max - 1, kInt32Max);
    call.requantization(x.channels());
    return call.bounded({x.shape.begin() + 1, x.shape.end()}, {Type::int8, Type::uint8, Type::int16, Type::int32});
}

Value check_fire(Call& call) {
    const Value& x = call.source(0, {Type::int16, Type::int32});
    std::vector<Size> shape = x.shape;
    shape.insert(shape.begin(), call.integer("steps", 1, kStepsMax));
    call.requantization(x.channels());
    const ValueType spikes{Type::uint8, 1};
    call.require(call.operation().output == spikes, "output is " + call.operation().output.name());
    return call.counts(shape, "a spike", 1);
}

}  // namespace swincompress
