// The implementation that runs anywhere: the specification in plain C++, vectorized by the compiler for the baseline of
// the platform.
#include "kernels/kernels.h"

namespace swincompress {
namespace {

#include "kernels/generic/kernels.inc"

#include "kernels/generic/requantize_channels.inc"

#include "kernels/generic/store_spikes.inc"

#include "kernels/generic/words.inc"

#include "kernels/generic/spiking.inc"

#include "kernels/generic/add_weights.inc"

#include "kernels/generic/events.inc"

#include "kernels/generic/attention.inc"

// The layer itself follows this header in the packed bytes: weight, bias, mult, shift.
struct PackedLinear {
    Size channels, depth, bias_rows;
    Type input, output;
    Size result_largest;
    Size weight_at, bias_at, mult_at, shift_at, bytes;
};

PackedLinear layout(const LinearLayer& layer) {
    PackedLinear packed{};
    packed.channels = layer.channels;
    packed.depth = layer.depth;
    packed.bias_rows = layer.bias_rows;
    packed.input = layer.input;
    packed.output = layer.output;
    packed.result_largest = layer.result_largest;
    packed.weight_at = round_up(static_cast<Size>(sizeof(PackedLinear)), 64);
    packed.bias_at = packed.weight_at + round_up(layer.channels * layer.depth, 64);
    packed.mult_at = packed.bias_at + round_up(layer.bias_rows * layer.channels * 4, 64);
    packed.shift_at = packed.mult_at + round_up(layer.channels * 4, 64);
    packed.bytes = packed.shift_at + round_up(layer.channels, 64);
    return packed;
}

LinearBytes linear_bytes(const LinearLayer& layer) { return {layout(layer).bytes, 0}; }

void copy(void* to, Size at, const void* from, Size bytes) {
    __builtin_memcpy(static_cast<char*>(to) + at, from, static_cast<unsigned long>(bytes));
}

void pack_linear(const LinearLayer& layer, Size /*bytes*/, void* packed) {
    const PackedLinear header = layout(layer);
    copy(packed, 0, &header, static_cast<Size>(sizeof(header)));
    copy(packed, header.weight_at, layer.weight, layer.channels * layer.depth);
    copy(packed, header.bias_at, layer.bias, layer.bias_rows * layer.channels * 4);
    copy(packed, header.mult_at, layer.mult, layer.channels * 4);
    copy(packed, header.shift_at, layer.shift, layer.channels);
}

Size row_stride(Size depth) { return depth; }

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
        const auto* x = static_cast<const typename Stored<input>::Element*>(call.x) + row * call.x_stride;
        Out* y = static_cast<Out*>(call.y) + row * packed.channels;
        const std::int32_t* bias = packed.bias_rows == 1 ? biases : biases + (call.bias_row + row) * packed.channels;
        for (Size c = call.first_channel; c < call.last_channel; ++c)
            y[c] = requantize<output>(bias[c] + dot(x, weight + c * packed.depth, packed.depth), mult[c], shift[c]);
    }
}

void linear(const LinearCall& call) {
    const auto& packed = *static_cast<const PackedLinear*>(call.packed);
    with_one_of<Type::int8, Type::uint8>(packed.input, [&](auto in) {
        with_type(packed.output, [&](auto out) { linear_rows<in.type, out.type>(call); });
    });
    finish_rows(call, packed.output, packed.channels, packed.result_largest, 0, call.rows);
}

Size peak_products(Size rounds) {
    constexpr Size kDepth = 1024, kRows = 8;
    std::int8_t x[kDepth], weight[kRows * kDepth];
    for (Size k = 0; k < kDepth; ++k) x[k] = static_cast<std::int8_t>(k % 100);
    for (Size k = 0; k < kRows * kDepth; ++k) weight[k] = static_cast<std::int8_t>(k % 90);
    for (Size round = 0; round < rounds; ++round) {
        std::int32_t sum = 0;
        for (Size row = 0; row < kRows; ++row) sum += dot(x, weight + row * kDepth, kDepth);
        x[0] = static_cast<std::int8_t>(sum % 100);  // so that the compiler cannot skip a round
        __asm__ volatile("" : : "r"(x) : "memory");
    }
    return rounds * kRows * kDepth;
}

bool runnable() { return true; }

#include "kernels/generic/table.inc"

constexpr Kernels made() {
    Kernels kernels = table_of("scalar", runnable, 16, peak_products);
    return kernels;
}

}  // namespace

constexpr Kernels scalar_kernels = made();

}  // namespace swincompress
