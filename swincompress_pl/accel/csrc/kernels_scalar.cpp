// The implementation that runs anywhere: the norm in plain C++, vectorized by the compiler for the baseline of the
// platform.
#include "kernels.h"

namespace swincompress {
namespace {

#include "generic_kernels.inc"

#include "generic_spiking.inc"

// The layer itself follows this header in the packed bytes: weight, bias, mult, shift.
struct PackedLinear {
    Size channels, depth, bias_rows;
    Type input, output;
    Size weight_at, bias_at, mult_at, shift_at, bytes;
};

PackedLinear layout(const LinearLayer& layer) {
    PackedLinear packed{};
    packed.channels = layer.channels;
    packed.depth = layer.depth;
    packed.bias_rows = layer.bias_rows;
    packed.input = layer.input;
    packed.output = layer.output;
    packed.weight_at = round_up(static_cast<Size>(sizeof(PackedLinear)), 64);
    packed.bias_at = packed.weight_at + round_up(layer.channels * layer.depth, 64);
    packed.mult_at = packed.bias_at + round_up(layer.bias_rows * layer.channels * 4, 64);
    packed.shift_at = packed.mult_at + round_up(layer.channels * 4, 64);
    packed.bytes = packed.shift_at + round_up(layer.channels, 64);
    return packed;
}

Size packed_linear_bytes(const LinearLayer& layer) { return layout(layer).bytes; }

void copy(void* to, Size at, const void* from, Size bytes) {
    __builtin_memcpy(static_cast<char*>(to) + at, from, static_cast<unsigned long>(bytes));
}

void pack_linear(const LinearLayer& layer, void* packed) {
    const PackedLinear header = layout(layer);
    copy(packed, 0, &header, static_cast<Size>(sizeof(header)));
    copy(packed, header.weight_at, layer.weight, layer.channels * layer.depth);
    copy(packed, header.bias_at, layer.bias, layer.bias_rows * layer.channels * 4);
    copy(packed, header.mult_at, layer.mult, layer.channels * 4);
    copy(packed, header.shift_at, layer.shift, layer.channels);
}

Size linear_scratch_bytes(const LinearLayer&) { return 0; }

// 16-bit factors, because that is what the baseline's pair products (pmaddwd, smlal) take.
template <typename Input>
std::int32_t dot(const Input* x, const std::int8_t* weight, Size depth) {
    std::int32_t sum = 0;
    for (Size k = 0; k < depth; ++k) sum += static_cast<std::int16_t>(x[k]) * static_cast<std::int16_t>(weight[k]);
    return sum;
}

template <Type input, Type output>
void linear_rows(const LinearCall& call) {
    using Out = typename Stored<output>::Element;
    const auto& packed = *static_cast<const PackedLinear*>(call.packed);
    const char* base = static_cast<const char*>(call.packed);
    const auto* weight = reinterpret_cast<const std::int8_t*>(base + packed.weight_at);
    const auto* biases = reinterpret_cast<const std::int32_t*>(base + packed.bias_at);
    const auto* mult = reinterpret_cast<const std::int32_t*>(base + packed.mult_at);
    const auto* shift = reinterpret_cast<const std::uint8_t*>(base + packed.shift_at);
    for (Size row = 0; row < call.rows; ++row) {
        const auto* x = static_cast<const typename Stored<input>::Element*>(call.x) + row * packed.depth;
        Out* y = static_cast<Out*>(call.y) + row * packed.channels;
        const std::int32_t* bias = packed.bias_rows == 1 ? biases : biases + (call.bias_row + row) * packed.channels;
        for (Size c = call.first_channel; c < call.last_channel; ++c)
            y[c] = requantize<output>(bias[c] + dot(x, weight + c * packed.depth, packed.depth), mult[c], shift[c]);
    }
}

template <Type input>
void linear_into(const LinearCall& call, Type output) {
    if (output == Type::int8)
        linear_rows<input, Type::int8>(call);
    else if (output == Type::uint8)
        linear_rows<input, Type::uint8>(call);
    else if (output == Type::int16)
        linear_rows<input, Type::int16>(call);
    else
        linear_rows<input, Type::int32>(call);
}

void linear(const LinearCall& call) {
    const auto& packed = *static_cast<const PackedLinear*>(call.packed);
    if (packed.input == Type::int8)
        linear_into<Type::int8>(call, packed.output);
    else
        linear_into<Type::uint8>(call, packed.output);
    const Size bytes = element_bytes(packed.output), width = call.last_channel - call.first_channel;
    for (Size row = 0; row < call.rows; ++row) {
        const Size at = (row * packed.channels + call.first_channel) * bytes;
        char* y = static_cast<char*>(call.y) + at;
        if (call.table != nullptr) generic_table(reinterpret_cast<std::uint8_t*>(y), width, call.table, 1, y);
        if (call.residual != nullptr)
            generic_add(packed.output, y, static_cast<const char*>(call.residual) + at, width, y);
    }
}

// A row of logits, one of exponentials and one of sums.
Size attention_scratch_bytes(Size length, Size /*qk_dim*/, Size v_dim) {
    return round_up(length * 4, 64) + round_up(length * 4, 64) + round_up(v_dim * 4, 64);
}

// Logits of one query, then their exponentials; returns the sum. Tokens of other regions count as 0.
std::int32_t softmax_row(const AttentionCall& call, const AttentionUnit& unit, Size row, std::int32_t* logits,
                         std::int32_t* e) {
    const std::int32_t* bias =
        call.bias == nullptr ? nullptr : call.bias + (unit.head * call.length + row) * call.bias_stride;
    std::int32_t highest = -2147483647 - 1;
    for (Size j = 0; j < call.length; ++j) {
        logits[j] = dot(unit.q + row * unit.in_stride, unit.k + j * unit.in_stride, call.qk_dim);
        if (bias != nullptr) logits[j] += bias[j];
        const bool allowed = unit.region == nullptr || unit.region[j] == unit.region[row];
        if (allowed && logits[j] > highest) highest = logits[j];
    }
    std::int32_t total = 0;
    for (Size j = 0; j < call.length; ++j) {
        const bool allowed = unit.region == nullptr || unit.region[j] == unit.region[row];
        const std::int64_t distance = static_cast<std::int64_t>(highest) - logits[j];
        e[j] = allowed ? exponential(distance, call.exp_mult[unit.head], call.exp_shift[unit.head]) : 0;
        total += e[j];
    }
    return total;
}

void attention(const AttentionCall& call) {
    auto* logits = static_cast<std::int32_t*>(call.scratch);
    auto* e = logits + round_up(call.length, 16);
    auto* sums = e + round_up(call.length, 16);
    for (Size number = call.first_unit; number < call.last_unit; ++number) {
        const AttentionUnit unit = attention_unit(call, number);
        const int shift = call.out_shift[unit.head] + kReciprocalBits;
        for (Size row = 0; row < call.length; ++row) {
            const std::int32_t total = softmax_row(call, unit, row, logits, e);
            for (Size c = 0; c < call.v_dim; ++c) sums[c] = 0;
            for (Size j = 0; j < call.length; ++j)
                for (Size c = 0; c < call.v_dim; ++c) sums[c] += e[j] * unit.v[j * unit.in_stride + c];
            const std::int64_t reciprocal = reciprocal_of(total, call.out_mult[unit.head]);
            for (Size c = 0; c < call.v_dim; ++c)
                unit.y[row * unit.out_stride + c] =
                    saturate<Type::int8>((sums[c] * reciprocal + (std::int64_t{1} << (shift - 1))) >> shift);
        }
    }
}

bool runnable() { return true; }

}  // namespace

const Kernels scalar_kernels = {
    "scalar",
    runnable,
    16,
    packed_linear_bytes,
    pack_linear,
    linear_scratch_bytes,
    linear,
    attention_scratch_bytes,
    attention,
    generic_layer_norm,
    generic_mean,
    generic_add,
    generic_table,
    generic_gather,
    generic_lif,
    generic_max_pool,
    generic_grouped_conv,
    generic_block_sum,
    generic_multiply,
    generic_spike_attention,
    generic_requantize,
};

}  // namespace swincompress
