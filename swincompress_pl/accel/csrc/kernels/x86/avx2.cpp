// The implementation for CPUs with AVX2 (Intel from Haswell, AMD from Excavator): linear layers and attention on
// register tiles, layer norms and requantization in 256-bit registers, the rest in plain C++ that the compiler
// vectorizes.
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

#include "kernels/x86/avx2_products.inc"

#include "kernels/generic/tiled_linear.inc"

#include "kernels/generic/attention_parts.inc"

#include "kernels/x86/avx2_attention.inc"

#include "kernels/x86/avx2_softmax.inc"

#include "kernels/generic/tiled_attention.inc"

#include "kernels/x86/avx2_layer_norm.inc"

// Measured as in avx512_vnni.cpp, on the same CPU, before products ran on tiled_linear.inc: both took the same
// time at 40 to 55 % of spikes.
constexpr Size kEventsMaxPercent = 45;

// This also asks the operating system, through xgetbv, whether it saves the wide registers.
bool runnable() { return __builtin_cpu_supports("avx2"); }

#include "kernels/generic/table.inc"

constexpr Kernels made() {
    Kernels kernels = table_of("avx2", runnable, kPanelColumns, tiled_peak_products<ValueProduct, kFactors>);
    kernels.attention_scratch_bytes = attention_scratch_bytes;
    kernels.attention = attention;
    kernels.layer_norm = layer_norm;
    kernels.table = table;
    kernels.add = add;
    kernels.events_max_percent = kEventsMaxPercent;
    return kernels;
}

}  // namespace

constexpr Kernels avx2_kernels = made();

}  // namespace swincompress
