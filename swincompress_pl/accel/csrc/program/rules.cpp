#include "program/rules.h"

#include <algorithm>

namespace swincompress {
namespace {

constexpr Size kLayerNormChannelsMax = 4096, kWindowLengthMax = Size{1} << 16, kSoftmaxChannelsMax = Size{1} << 16;

// Elements within the range of the output's type, of the element type that holds it.
void in_type(Call& call, const char* role, ValueType type, const std::vector<Size>& shape) {
    const std::int64_t low = type.type == Type::uint8 ? 0 : -type.limit;
    switch (type.type) {
        case Type::int8: call.elements<std::int8_t>(role, shape, low, type.limit); return;
        case Type::uint8: call.elements<std::uint8_t>(role, shape, low, type.limit); return;
        case Type::int16: call.elements<std::int16_t>(role, shape, low, type.limit); return;
        default: call.require(false, std::string("tensor '") + role + "' cannot be of such a type");
    }
}

Value check_linear(Call& call) {
    const Value& x = call.source(0, {Type::int8, Type::uint8});
    const Size channels = call.integer("channels", 1, 1 << 20);
    call.accumulator(x, {channels, x.channels()}, {channels});
    call.requantization(channels);
    std::vector<Size> shape = x.shape;
    shape.back() = channels;
    return call.bounded(shape, {Type::int8, Type::uint8, Type::int16, Type::int32});
}

Value check_conv2d(Call& call) {
    const Value& x = call.source(0, {Type::int8, Type::uint8});
    const Size channels = call.integer("channels", 1, 1 << 20), groups = call.integer_or("groups", 1, 1 << 20, 1);
    call.require(x.channels() % groups == 0 && channels % groups == 0,
                 std::to_string(x.channels()) + " inputs and " + std::to_string(channels) +
                     " outputs do not split into " + std::to_string(groups) + " groups");
    const auto kernel = call.pair("kernel", 1, 1024);
    const auto [height, width] = call.positions(x, kernel);
    const std::vector<Size> weight = {channels, kernel.first, kernel.second, x.channels() / groups};
    const std::vector<Size> map = {height, width, channels};
    call.accumulator(x, weight, call.has_axes("bias", 3) ? map : std::vector<Size>{channels});
    call.requantization(channels);
    std::vector<Size> shape(x.shape.begin(), x.shape.end() - 3);
    shape.insert(shape.end(), map.begin(), map.end());
    return call.bounded(shape, {Type::int8, Type::uint8, Type::int16, Type::int32});
}

Value check_layer_norm(Call& call) {
    const Value& x = call.source(0, {Type::int8, Type::int16});
    const Size channels = x.channels(), gain_max = (Size{1} << 22) - 1, offset_max = Size{1} << 60;
    call.require(channels <= kLayerNormChannelsMax, std::to_string(channels) + " channels; at most " +
                                                        std::to_string(kLayerNormChannelsMax) + " keep the bounds");
    call.integer("epsilon", 0, Size{1} << 58);
    call.integer("shift", 1, 52);
    call.elements<std::int32_t>("gain", {channels}, -gain_max, gain_max);
    call.elements<std::int64_t>("offset", {channels}, -offset_max, offset_max);
    return call.output(x.shape, {Type::int8, Type::int16});
}

Value check_softmax(Call& call) {
    const Value& x = call.source(0, {Type::int8, Type::uint8, Type::int16, Type::int32});
    call.require(x.channels() <= kSoftmaxChannelsMax, std::to_string(x.channels()) + " channels; at most " +
                                                          std::to_string(kSoftmaxChannelsMax) + " keep the bounds");
    call.integer("mult", 0, (Size{1} << 22) - 1);
    call.integer("shift", 1, 52);
    return call.output(x.shape, {Type::uint8});
}

Value check_table(Call& call) {
    const Value& x = call.source(0, {Type::int8});
    Value output = call.output(x.shape, {Type::int8, Type::uint8, Type::int16});
    in_type(call, "values", output.declared, {256});
    if (output.type() == Type::int8) {
        const auto* values = static_cast<const std::int8_t*>(call.operation().tensors.at("values").data);
        output.below = std::max(0, -*std::min_element(values, values + 256));
    }
    return output;
}

Value check_add(Call& call) {
    const Value& a = call.source(0, {Type::int8, Type::uint8, Type::int16, Type::int32});
    const Value& b = call.source(1, {Type::int8, Type::uint8, Type::int16, Type::int32});
    call.require(a.rows() % b.rows() == 0 && a.channels() == b.channels(),
                 "adds shapes " + shape_text(a.shape) + " and " + shape_text(b.shape) +
                     "; rows and channels must agree, or the second's rows divide the first's");
    const ValueType type = call.operation().output;
    if (a.type() == Type::uint8 && b.type() == Type::uint8 && type.type == Type::uint8)
        return call.counts(a.shape, "the sum", a.largest + b.largest);
    call.require(
        a.declared == b.declared && a.declared == type,
        "adds " + a.declared.name() + " and " + b.declared.name() + " into " + type.name() + "; they must agree");
    return call.output(a.shape, {type.type});
}

Value check_add_constant(Call& call) {
    const Value& x = call.source(0, {Type::int8, Type::int16});
    const std::vector<Size> shape = {x.rows(), x.channels()};
    in_type(call, "constant", x.declared, shape);
    return {call.selection(shape, x).declared, shape, x.declared.limit};
}

Value check_prepend(Call& call) {
    const Value& x = call.source(0, {Type::int8, Type::int16});
    const Size count = call.integer("rows", 1, 1 << 16);
    in_type(call, "rows", x.declared, {count, x.channels()});
    return {call.selection({}, x).declared, {count + x.rows(), x.channels()}, x.declared.limit};
}

Value check_gather(Call& call) {
    const Value& x = call.source(0, {Type::int8, Type::uint8, Type::int16});
    const Size rows = call.integer("rows", 1, 1 << 24), joined = call.integer("joined", 1, 1 << 10);
    const Size last = std::min<Size>(x.rows() - 1, kInt32Max);
    call.elements<std::int32_t>("index", {rows, joined}, -1, last);
    return call.selection({rows, joined * x.channels()}, x);
}

Value check_mean(Call& call) {
    const Value& x = call.source(0, {Type::int8, Type::uint8, Type::int16});
    const Size reach = x.rows() * x.largest;
    call.require(reach <= kInt32Max, "the sum over " + std::to_string(x.rows()) + " tokens may reach " +
                                         std::to_string(reach) + ", beyond int32");
    call.requantization(x.channels());
    return call.output({x.channels()}, {Type::int8, Type::uint8, Type::int16});
}

// The largest bias of an attention; 0 without a table of them.
Size attention_bias(Call& call, Size heads, Size length) {
    if (!call.has("bias_table")) return 0;
    const Size biases = call.integer("biases", 1, 1 << 24);
    const auto* table = call.elements<std::int32_t>("bias_table", {heads, biases}, -kInt32Max - 1, kInt32Max);
    call.elements<std::int32_t>("bias_index", {length, length}, 0, biases - 1);
    Size largest = 0;
    for (Size i = 0; i < heads * biases; ++i) largest = std::max(largest, std::abs(static_cast<Size>(table[i])));
    return largest;
}

Value check_attention(Call& call) {
    const Value& x = call.source(0, {Type::int8});
    const Size windows = call.integer("windows", 1, 1 << 20), heads = call.integer("heads", 1, 1 << 12);
    const Size qk_dim = call.integer("qk_dim", 1, 1 << 12), v_dim = call.integer("v_dim", 1, 1 << 12);
    call.require(x.rows() % windows == 0,
                 std::to_string(x.rows()) + " tokens do not split into " + std::to_string(windows) + " windows");
    const Size length = x.rows() / windows, channels = heads * (2 * qk_dim + v_dim);
    call.require(x.channels() == channels, "input has " + std::to_string(x.channels()) + " channels; " +
                                               std::to_string(heads) + " heads need " + std::to_string(channels));
    call.require(length <= kWindowLengthMax, "windows of " + std::to_string(length) + " tokens; at most " +
                                                 std::to_string(kWindowLengthMax) + " keep the bounds");
    // By the type, and not by what is known about the values, as in the specification.
    const Size reach = x.declared.limit * x.declared.limit * qk_dim + attention_bias(call, heads, length);
    call.require(2 * reach <= kInt32Max, "logits may differ by " + std::to_string(2 * reach) + ", beyond int32");
    if (call.has("region")) call.elements<std::uint8_t>("region", {windows, length}, 0, 255);
    call.requantization(heads, "exp_mult", "exp_shift");
    call.requantization(heads, "out_mult", "out_shift", 38);
    return call.output({x.rows(), heads * v_dim}, {Type::int8});
}

// Only the NumPy reference runs signed activations below 8 bits, and saturation to fewer than 8 unsigned bits.
void require_engine_types(const Call& call, const std::vector<Value>& inputs) {
    const Operation& operation = call.operation();
    const auto refuse = [&](const ValueType& type) {
        call.require(false, "type " + type.name() +
                                "; the C++ engine runs 8-bit activations (int8, uint8) beside int16, int32 and counts "
                                "of spikes, with weights of any width: swincompress_pl.accel.reference(path) runs this "
                                "one");
    };
    for (const Value& input : inputs)
        if (input.declared.narrow() && input.type() != Type::uint8) refuse(input.declared);
    if (!operation.output.narrow()) return;
    for (const char* runs : {"add", "block_sum", "gather", "lif", "max_pool", "multiply", "fire", "integrate", "linear",
                             "conv2d", "requantize"})
        if (operation.kind == runs && operation.output.type == Type::uint8) return;
    refuse(operation.output);
}

using Check = Value (*)(Call&);

struct Kind {
    std::size_t arity;
    Check check;
};

const std::map<std::string, Kind>& kinds() {
    // Never destroyed, because a thread may load while the process ends.
    static const auto& known = *new std::map<std::string, Kind>{
        {"linear", {1, check_linear}},
        {"conv2d", {1, check_conv2d}},
        {"layer_norm", {1, check_layer_norm}},
        {"softmax", {1, check_softmax}},
        {"table", {1, check_table}},
        {"add", {2, check_add}},
        {"add_constant", {1, check_add_constant}},
        {"prepend", {1, check_prepend}},
        {"gather", {1, check_gather}},
        {"mean", {1, check_mean}},
        {"attention", {1, check_attention}},
        {"lif", {1, check_lif}},
        {"max_pool", {1, check_max_pool}},
        {"block_sum", {1, check_block_sum}},
        {"multiply", {2, check_multiply}},
        {"spike_attention", {3, check_spike_attention}},
        {"requantize", {1, check_requantize}},
        {"integrate", {1, check_integrate}},
        {"fire", {1, check_fire}},
    };
    return known;
}

}  // namespace

Value check_operation(const Operation& operation, const std::vector<Value>& inputs) {
    Call call(operation, inputs);
    const auto kind = kinds().find(operation.kind);
    call.require(kind != kinds().end(), "unknown kind; this engine may be older than the artifact");
    call.require(inputs.size() == kind->second.arity,
                 "takes " + std::to_string(kind->second.arity) + " inputs, got " + std::to_string(inputs.size()));
    try {
        require_engine_types(call, inputs);
        Value output = kind->second.check(call);
        call.nothing_else();
        output.elements();  // refuses what is too large
        return output;
    } catch (const OperationError&) {
        throw;
    } catch (const std::invalid_argument& error) {
        throw OperationError(operation, error.what());
    }
}

}  // namespace swincompress
