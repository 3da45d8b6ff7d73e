// The implementation for 64-bit ARM with the dot product extension (Cortex-A55 and A75, Neoverse N1, Apple M1 and
// later): linear layers and attention on register tiles, requantization in NEON, the rest in plain C++ that the
// compiler vectorizes.
#include <arm_neon.h>
#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "kernels.h"

namespace swincompress {
namespace {

#include "generic_kernels.inc"

#include "neon_registers.inc"

#include "tiled_requantize_channels.inc"

#include "generic_store_spikes.inc"

#include "generic_spiking.inc"

#include "generic_add_weights.inc"

#include "generic_events.inc"

#include "generic_attention.inc"

#include "tile.inc"

#include "neon_products.inc"

#include "tiled_linear.inc"

#include "neon_attention.inc"

#include "tiled_attention.inc"

bool runnable() {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#elif defined(__APPLE__)
    return true;  // every Mac with an ARM CPU has it
#else
    return false;
#endif
}

}  // namespace

const Kernels neon_dotprod_kernels = {
    "neon_dotprod",
    runnable,
    kPanelColumns,
    packed_linear_bytes,
    pack_linear,
    linear_scratch_bytes,
    linear,
    attention_scratch_bytes,
    attention,
    generic_layer_norm,
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
