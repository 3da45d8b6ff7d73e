// The implementation for CPUs with AVX-VNNI but without AVX-512, such as Intel's Alder Lake: that of avx2 with products
// of bytes.
#include <cpuid.h>
#include <immintrin.h>

#include "kernels/kernels.h"

namespace swincompress {
namespace {

#include "kernels/generic/kernels.inc"

#include "kernels/x86/avx2_registers.inc"

#include "kernels/x86/avx2_table.inc"

#include "kernels/generic/tiled_requantize_channels.inc"

#include "kernels/x86/avx2_store_spikes.inc"

#include "kernels/x86/words.inc"

#include "kernels/x86/add.inc"

#include "kernels/generic/spiking.inc"

#include "kernels/x86/avx2_add_weights.inc"

#include "kernels/generic/events.inc"

#include "kernels/generic/attention.inc"

#include "kernels/generic/tile.inc"

#include "kernels/x86/avx_vnni_products.inc"

#include "kernels/generic/tiled_linear.inc"

#include "kernels/generic/attention_parts.inc"

#include "kernels/x86/avx2_attention.inc"

#include "kernels/generic/tiled_softmax.inc"

#include "kernels/generic/tiled_attention.inc"

#include "kernels/x86/avx2_layer_norm.inc"

// The first check also asks the operating system, through xgetbv. Only recent compilers know the second check.
bool runnable() {
    unsigned features[4] = {};
    const bool found = __get_cpuid_count(7, 1, &features[0], &features[1], &features[2], &features[3]) != 0;
    return __builtin_cpu_supports("avx2") && found && (features[0] >> 4 & 1) != 0;
}

#include "kernels/generic/table.inc"

constexpr Kernels made() {
    Kernels kernels = table_of("avx_vnni", runnable, kPanelColumns, tiled_peak_products<ValueProduct, kFactors>);
    kernels.attention_scratch_bytes = attention_scratch_bytes;
    kernels.attention = attention;
    kernels.layer_norm = layer_norm;
    kernels.table = table;
    kernels.add = add;
    return kernels;
}

}  // namespace

constexpr Kernels avx_vnni_kernels = made();

}  // namespace swincompress
