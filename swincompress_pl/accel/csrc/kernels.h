// The contract between the engine and its kernels: one `Kernels` object an implementation, plain structs as arguments.
//
// Kernels trust their arguments (the plan has checked them), allocate nothing, and equal the norm (docs/norm.md) to the
// bit. This header is compiled under the flags of every ISA, so it holds no function: an inline function compiled with
// AVX-512 could be the copy that the linker keeps for everybody.
#pragma once

#include <cstdint>

namespace swincompress {

using Size = std::int64_t;

enum class Type : std::uint8_t { int8, uint8, int16, int32, int64 };

// A linear layer as the norm gives it. |bias| + a_max * sum |weight| < 2^31 for every channel, hence no sum overflows.
struct LinearLayer {
    Size channels;
    Size depth;
    Size bias_rows;             // 1, or one row of biases for every output position of a convolution
    Type input;                 // int8 or uint8
    Type output;                // int8, uint8, int16 or int32
    const std::int8_t* weight;  // (channels, depth), in [-127, 127]
    const std::int32_t* bias;   // (bias_rows, channels)
    const std::int32_t* mult;   // (channels), in [0, 2^22)
    const std::uint8_t* shift;  // (channels), in [1, 52]
};

// y[:, first_channel:last_channel] = after(requantize(x weight^T + bias)) for `rows` rows.
struct LinearCall {
    const void* packed;  // what pack_linear of the same implementation wrote
    const void* x;       // (rows, depth), contiguous rows
    void* y;             // (rows, channels)
    Size rows;
    Size first_channel;         // a multiple of column_unit
    Size last_channel;          // a multiple of column_unit, or all channels
    Size bias_row;              // bias row of the first row, where there is more than one
    const std::uint8_t* table;  // nullptr, or 256 bytes looked up by an int8 result
    const void* residual;       // nullptr, or (rows, channels) of the output type, added with saturation
    void* scratch;              // linear_scratch_bytes, 64-byte aligned
};

// softmax(q k^T + bias) v of the (window, head) pairs [first_unit, last_unit) of one image; unit = window * heads +
// head. 127 * 127 * qk_dim + |bias| < 2^30, 255 * 127 * length < 2^31.
struct AttentionCall {
    const std::int8_t* qkv;  // (windows * length, heads * (2 * qk_dim + v_dim)): q | k | v, head, dimension
    std::int8_t* y;          // (windows * length, heads * v_dim)
    Size length, heads, qk_dim, v_dim;
    const std::int32_t* exp_mult;   // (heads)
    const std::uint8_t* exp_shift;  // (heads), in [1, 52]
    const std::int32_t* out_mult;   // (heads)
    const std::uint8_t* out_shift;  // (heads), in [1, 38]
    const std::int32_t* bias;       // nullptr, or (heads, length, bias_stride) in accumulator units
    Size bias_stride;               // length rounded up to 16
    const std::uint8_t* region;     // nullptr, or (windows, length)
    Size first_unit, last_unit;
    void* scratch;  // attention_scratch_bytes, 64-byte aligned
};

struct LayerNormCall {
    const void* x;  // (rows, channels) int8 or int16, channels <= 4096
    void* y;        // (rows, channels) int8 or int16
    Type input, output;
    Size rows, channels;
    const std::int32_t* gain;    // (channels), |gain| < 2^22
    const std::int64_t* offset;  // (channels), |offset| <= 2^60, the rounding 2^(shift - 1) included
    std::int64_t epsilon;        // in [0, 2^58]
    int shift;                   // in [1, 52]
};

// Sums over `tokens` rows for the channels [first_channel, last_channel) of one image.
struct MeanCall {
    const void* x;  // (tokens, channels) int8, uint8 or int16
    void* y;        // (channels)
    Type input, output;
    Size tokens, channels, first_channel, last_channel;
    const std::int32_t* mult;
    const std::uint8_t* shift;
};

struct Kernels {
    const char* name;
    bool (*runnable)();  // whether this CPU and operating system can run it

    Size column_unit;  // threads split a layer's channels at multiples of this
    Size (*packed_linear_bytes)(const LinearLayer&);
    void (*pack_linear)(const LinearLayer&, void* packed);
    Size (*linear_scratch_bytes)(const LinearLayer&);
    void (*linear)(const LinearCall&);

    Size (*attention_scratch_bytes)(Size length, Size qk_dim, Size v_dim);
    void (*attention)(const AttentionCall&);

    void (*layer_norm)(const LayerNormCall&);
    void (*mean)(const MeanCall&);
    // y may be a or b. Types int8, int16 and int32.
    void (*add)(Type type, const void* a, const void* b, Size count, void* y);
    // y may be x where entries are one byte. entry_bytes 1 or 2.
    void (*table)(const std::uint8_t* x, Size count, const void* values, Size entry_bytes, void* y);
    // y[i] = x[index[i]], zeros for -1; rows of row_bytes.
    void (*gather)(const std::uint8_t* x, Size row_bytes, const std::int32_t* index, Size count, std::uint8_t* y);
};

// One object an implementation; dispatch.cpp lists them in order of preference.
extern const Kernels scalar_kernels;
#ifdef SWINCOMPRESS_WITH_AVX512_VNNI
extern const Kernels avx512_vnni_kernels;
#endif

}  // namespace swincompress
