// The implementation for CPUs with AVX-VNNI but without AVX-512, such as Intel's Alder Lake: that of avx2 with products
// of bytes.
#include <cpuid.h>
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

#include "avx_vnni_products.inc"

#include "tiled_linear.inc"

#include "avx2_attention.inc"

#include "tiled_attention.inc"

#include "avx2_layer_norm.inc"

// The first check also asks the operating system, through xgetbv. Only recent compilers know the second check.
bool runnable() {
    unsigned features[4] = {};
    const bool found = __get_cpuid_count(7, 1, &features[0], &features[1], &features[2], &features[3]) != 0;
    return __builtin_cpu_supports("avx2") && found && (features[0] >> 4 & 1) != 0;
}

}  // namespace

const Kernels avx_vnni_kernels = {
    "avx_vnni",
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
};

}  // namespace swincompress
