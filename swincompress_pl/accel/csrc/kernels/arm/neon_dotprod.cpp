// The implementation for 64-bit ARM with the dot product extension (Cortex-A55 and A75, Neoverse N1, Apple M1 and
// later): linear layers and attention on register tiles, requantization in NEON, the rest in plain C++ that the
// compiler vectorizes.
#include <arm_neon.h>
#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "kernels/kernels.h"

namespace swincompress {
namespace {

#include "kernels/generic/kernels.inc"

#include "kernels/arm/neon_registers.inc"

#include "kernels/arm/neon_table.inc"

#include "kernels/generic/tiled_requantize_channels.inc"

#include "kernels/generic/store_spikes.inc"

#include "kernels/generic/words.inc"

#include "kernels/generic/spiking.inc"

#include "kernels/generic/add_weights.inc"

#include "kernels/generic/events.inc"

#include "kernels/generic/attention.inc"

#include "kernels/generic/tile.inc"

#include "kernels/arm/neon_products.inc"

#include "kernels/generic/tiled_linear.inc"

#include "kernels/generic/attention_parts.inc"

#include "kernels/arm/neon_attention.inc"

#include "kernels/generic/tiled_softmax.inc"

#include "kernels/generic/tiled_attention.inc"

bool runnable() {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#elif defined(__APPLE__)
    return true;  // every Mac with an ARM CPU has it
#else
    return false;
#endif
}

#include "kernels/generic/table.inc"

constexpr Kernels made() {
    Kernels kernels = table_of("neon_dotprod", runnable, kPanelColumns, tiled_peak_products<ValueProduct, kFactors>);
    kernels.attention_scratch_bytes = attention_scratch_bytes;
    kernels.attention = attention;
    kernels.table = table;
    return kernels;
}

}  // namespace

constexpr Kernels neon_dotprod_kernels = made();

}  // namespace swincompress
