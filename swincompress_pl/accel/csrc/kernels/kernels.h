// The contract between the engine and its kernels: one `Kernels` object per implementation, plain structs as arguments.
//
// Kernels trust their arguments, which the plan has checked. They allocate nothing, and equal the specification
// (spec.md) to the bit. This header is compiled with the flags of every ISA, so it has no functions: an inline function
// compiled for AVX-512 could be the copy that the linker keeps for all.
#pragma once

#include <cstdint>

namespace swincompress {

using Size = std::int64_t;

enum class Type : std::uint8_t { int8, uint8, int16, int32, int64 };

// A linear layer of the specification. |bias| + a_max * sum |weight| < 2^31 for every channel, so no sum overflows.
struct LinearLayer {
    Size channels;
    Size depth;
    Size bias_rows;             // 1, or one row of biases for every output position of a convolution
    Type input;                 // int8 or uint8
    Type output;                // int8, uint8, int16 or int32
    Size largest;               // the largest uint8 input
    Size below;                 // no int8 input is less than -below, which is at most 128
    Size result_largest;        // uint8 results saturate at it; 255 otherwise
    Size block_bytes;           // of a second-level cache for inputs and results of rows that run together
    const std::int8_t* weight;  // (channels, depth), in [-127, 127]
    const std::int32_t* bias;   // (bias_rows, channels)
    const std::int32_t* mult;   // (channels), in [0, 2^22)
    const std::uint8_t* shift;  // (channels), in [1, 52]
};

// y[:, first_channel:last_channel] = after(requantize(x weight^T + bias)) for `rows` rows.
struct LinearCall {
    const void* packed;  // what pack_linear of the same implementation wrote
    const void* x;       // (rows, depth)
    Size x_stride;       // between rows: depth, or for uint8 row_stride(depth), with any bytes behind a row
    void* y;             // (rows, channels)
    Size rows;
    Size first_channel;         // a multiple of column_unit
    Size last_channel;          // a multiple of column_unit, or all channels
    Size bias_row;              // bias row of the first row, where there is more than one
    const std::uint8_t* table;  // nullptr, or 256 bytes that map an int8 result
    const void* residual;       // nullptr, or (rows, channels) of the output type, added with saturation
    void* scratch;              // LinearBytes::scratch, 64-byte aligned
};

// What a layer takes in the form that its kernels need, and what a call of it writes besides its results.
struct LinearBytes {
    Size packed, scratch;
};

// softmax(q k^T + bias) v of the queries [first_query, last_query) of one image, counted head by head in each window:
// query = (window * heads + head) * length + token. 127 * 127 * qk_dim + |bias| < 2^30, 255 * 127 * length < 2^31.
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
    Size first_query, last_query;
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

// Neurons over time (spec.md, "Spiking"): rows [first_row, last_row) of one image, at every time step. As |bias| <=
// 2^27, threshold is in [1, 2^28] and |reset| <= 2^28, everything but the product with decay fits int32.
struct LifCall {
    const std::int32_t* x;  // (steps, rows, channels), or (rows, channels), the same at every step
    std::uint8_t* y;        // (steps, rows, channels), 0 or 1
    Size steps, rows, channels;
    bool repeated, input_decay, soft_reset;
    std::int32_t decay;  // in [0, 2^16]
    int fraction_bits;   // in [0, 15]
    const std::int32_t* threshold;
    const std::int32_t* reset;
    const std::int32_t* bias;
    Size first_row, last_row;
};

// Windows that slide over `images` images; a row is an output position.
struct WindowCall {
    const void* x;  // (images, in_height, in_width, in_channels)
    void* y;        // (images, height, width, channels)
    Size in_height, in_width, in_channels, height, width, channels;
    Size kernel_height, kernel_width, stride_height, stride_width, padding_height, padding_width;
    Size first_row, last_row;
};

constexpr Size kEventStepsMax = 32;  // time steps of neurons that run with their layer

// A convolution whose inputs are spikes or small counts: uint8 of at most `largest` <= 127. A linear layer is one of
// kernel (1, 1) over a column of pixels. It runs rows [first_row, last_row) of the window. If neurons of at most 32
// time steps follow (lif, whose x, y and rows to run are not used), the rows are positions at all time steps.
struct EventCall {
    const void* packed;  // what pack_events of the same implementation wrote
    WindowCall window;
    Size largest;
    const LifCall* lif;  // or nullptr
    void* scratch;       // event_scratch_bytes, 64-byte aligned
};

constexpr Size kEventsOnly = 1000;  // percent: the most that inputs of up to 10 can reach

// A convolution whose groups have few channels; bounds as in LinearLayer.
struct GroupedConvolution {
    Type input, output;
    Size groups;
    const std::int8_t* weight;  // (channels, kernel_height, kernel_width, in_channels / groups)
    const std::int8_t* by_tap;  // nullptr, or, of a depthwise convolution, (kernel_height, kernel_width, channels)
    const std::int16_t* words_by_tap;  // the same, where 16 bits hold all sums of products; or nullptr
    const std::int32_t* bias;          // (channels), or (height, width, channels)
    bool bias_map;
    const std::int32_t* mult;
    const std::uint8_t* shift;
    Size result_largest;  // as in LinearLayer
};

// y[r, c] = sum of x over `rows_joined` rows and `channels_joined` channels; output rows [first_row, last_row).
struct BlockSumCall {
    const void* x;
    void* y;
    Type input, output;  // uint8 or int32
    Size channels, rows_joined, channels_joined;
    Size first_row, last_row;
};

// y[r, c] = a[r, c] * b[r / rows_joined, c / channels_joined]; rows [first_row, last_row) of a.
struct MultiplyCall {
    const std::uint8_t* a;
    const std::uint8_t* b;
    std::uint8_t* y;
    Size channels, rows_joined, channels_joined;
    Size first_row, last_row;
};

// y = q (k^T v) of one head of one window of counts; no sum passes int32. Rows lie `*_stride` elements apart.
struct SpikeAttentionCall {
    const std::uint8_t* q;
    const std::uint8_t* k;
    const std::uint8_t* v;
    std::int32_t* y;
    Size length, qk_dim, v_dim, qk_stride, v_stride;
    Size q_largest, kv_largest;  // no count of q, and no element of k^T v, is larger
    std::int32_t* scratch;       // SpikeAttentionStep::scratch_bytes
};

// y[r, c] = requantize(x[r, c], mult[c], shift[c])
struct RequantizeCall {
    const void* x;
    void* y;
    Type input, output;  // int16 or int32; int8, uint8, int16 or int32
    Size rows, channels;
    const std::int32_t* mult;
    const std::uint8_t* shift;
    Size result_largest;  // as in LinearLayer
};

// y[r, c] = requantize(sum of x[t, r, c] over `steps` <= 255 time steps + bias[c]); rows [first_row, last_row) of one
// image. The sum stays below 2^39 + 2^31, and its product with mult below 2^62.
struct IntegrateCall {
    const void* x;  // (steps, rows, channels) uint8 or int32
    void* y;        // (rows, channels)
    Type input, output;
    Size steps, rows, channels;
    const std::int32_t* bias;
    const std::int32_t* mult;
    const std::uint8_t* shift;
    Size result_largest;  // as in LinearLayer
    Size first_row, last_row;
};

// Neurons without leak that are charged once: y[t, r, c] = requantize(x[r, c]) > t, for `steps` <= 255 time steps; rows
// [first_row, last_row) of one image.
struct FireCall {
    const void* x;  // (rows, channels) int16 or int32
    void* y;        // (steps, rows, channels) uint8, 0 or 1
    Type input;
    Size steps, rows, channels;
    const std::int32_t* mult;
    const std::uint8_t* shift;
    Size first_row, last_row;
};

// y = 255 * softmax(x) over the channels, whose differences mult / 2^shift turns into 32nds of an octave.
struct SoftmaxCall {
    const void* x;
    std::uint8_t* y;
    Type input;           // int8, uint8, int16 or int32
    Size rows, channels;  // channels <= 2^16
    std::int32_t mult;
    int shift;
    std::uint16_t* scratch;  // channels
};

struct Kernels {
    const char* name;
    bool (*runnable)();  // whether this CPU and operating system can run it

    Size column_unit;  // threads split a layer's channels at multiples of this
    LinearBytes (*linear_bytes)(const LinearLayer&);
    void (*pack_linear)(const LinearLayer&, Size packed_bytes, void* to);
    // Between rows of uint8 that `linear` reads where they are; depth if it copies them.
    Size (*row_stride)(Size depth);
    void (*linear)(const LinearCall&);

    Size (*attention_scratch_bytes)(Size length, Size qk_dim, Size v_dim);
    void (*attention)(const AttentionCall&);

    void (*layer_norm)(const LayerNormCall&);
    void (*softmax)(const SoftmaxCall&);
    void (*mean)(const MeanCall&);
    // y may be a or b. Types int8, uint8, int16 and int32.
    void (*add)(Type type, const void* a, const void* b, Size count, void* y);
    // y may be x where entries are one byte. entry_bytes 1 or 2.
    void (*table)(const std::uint8_t* x, Size count, const void* values, Size entry_bytes, void* y);
    // y[i] = x[index[i]], zeros for -1; rows of row_bytes.
    void (*gather)(const std::uint8_t* x, Size row_bytes, const std::int32_t* index, Size count, std::uint8_t* y);

    // `events` instead of `linear` runs layers whose inputs never exceed event_largest (0: none).
    Size event_largest;
    Size (*packed_events_bytes)(const LinearLayer&);
    void (*pack_events)(const LinearLayer&, void* packed);
    Size (*event_scratch_bytes)(const EventCall&);
    void (*events)(const EventCall&);

    void (*lif)(const LifCall&);
    void (*max_pool)(Type type, const WindowCall&);
    void (*grouped_conv)(const GroupedConvolution&, const WindowCall&);
    void (*block_sum)(const BlockSumCall&);
    void (*multiply)(const MultiplyCall&);
    void (*spike_attention)(const SpikeAttentionCall&);
    void (*requantize)(const RequantizeCall&);
    void (*integrate)(const IntegrateCall&);
    void (*fire)(const FireCall&);

    // Runs `rounds` of the products of `linear` on operands in registers (for `scalar`, in the first-level cache), and
    // returns the number of multiply-accumulates. Their rate is the upper limit of a layer's.
    Size (*peak_products)(Size rounds);

    // `events` runs a layer's rows if at most this percentage of the inputs are spikes (a count of two is two), and
    // `linear` runs them otherwise.
    Size events_max_percent = kEventsOnly;
};

// One object per implementation; dispatch.cpp lists them in order of preference.
extern const Kernels scalar_kernels;
#ifdef SWINCOMPRESS_WITH_AVX2
extern const Kernels avx2_kernels;
#endif
#ifdef SWINCOMPRESS_WITH_AVX_VNNI
extern const Kernels avx_vnni_kernels;
#endif
#ifdef SWINCOMPRESS_WITH_AVX512_VNNI
extern const Kernels avx512_vnni_kernels;
#endif
#ifdef SWINCOMPRESS_WITH_AMX_INT8
extern const Kernels amx_int8_kernels;
#endif
#ifdef SWINCOMPRESS_WITH_NEON_DOTPROD
extern const Kernels neon_dotprod_kernels;
#endif

}  // namespace swincompress
