// The implementation for CPUs with AVX2 (Intel from Haswell, AMD from Excavator): linear layers and attention on
// register tiles, layer norms and requantization in 256-bit registers, the rest in plain C++ that the compiler
// vectorizes.
#include <immintrin.h>

#include "kernels.h"

namespace swincompress {
namespace {

#include "generic_kernels.inc"

#include "avx2_registers.inc"

#include "tiled_requantize_channels.inc"

#include "avx2_store_spikes.inc"

#include "generic_spiking.inc"

#include "avx2_add_weights.inc"

#include "generic_events.inc"

#include "generic_attention.inc"

#include "tile.inc"

#include "avx2_products.inc"

#include "tiled_linear.inc"

#include "avx2_attention.inc"

#include "tiled_attention.inc"

#include "avx2_layer_norm.inc"

// Measured as in kernels_avx512_vnni.cpp, on the same CPU, before products ran on tiled_linear.inc: both took the same
// time at 40 to 55 % of spikes.
constexpr Size kEventsMaxPercent = 45;

// This also asks the operating system, through xgetbv, whether it saves the wide registers.
bool runnable() { return __builtin_cpu_supports("avx2"); }

}  // namespace

const Kernels avx2_kernels = {
    "avx2",
    runnable,
    kPanelColumns,
    packed_linear_bytes,
    pack_linear,
    linear_scratch_bytes,
    linear,
    attention_scratch_bytes,
    attention,
    layer_norm,
    generic_softmax,
    generic_mean,
    generic_add,
    generic_table,
    generic_gather,
    kEventLargest,
    generic_packed_events_bytes,
    generic_pack_events,
    generic_event_scratch_bytes,
    generic_events,
    generic_lif,
    generic_max_pool,
    generic_grouped_conv,
    generic_block_sum,
    generic_multiply,
    generic_spike_attention,
    generic_requantize,
    tiled_peak_products<ValueProduct, kFactors>,
    kEventsMaxPercent,
};

}  // namespace swincompress
