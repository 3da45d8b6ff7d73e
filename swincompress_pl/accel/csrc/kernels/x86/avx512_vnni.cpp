// The implementation for CPUs with AVX-512 F, BW, DQ, VL and VNNI (Intel from Cascade Lake, AMD from Zen 4), and the
// same with linear layers on AMX tiles (Intel from Sapphire Rapids).
#include <cpuid.h>
#include <immintrin.h>
#ifdef SWINCOMPRESS_WITH_AMX_INT8
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstddef>

#include "kernels/kernels.h"

namespace swincompress {
namespace {

#include "kernels/generic/kernels.inc"

#include "kernels/x86/avx512_requantize_channels.inc"

#include "kernels/x86/avx512_store_spikes.inc"

#include "kernels/x86/words.inc"

#include "kernels/x86/add.inc"

#include "kernels/generic/spiking.inc"

#include "kernels/x86/avx2_add_weights.inc"

#include "kernels/generic/events.inc"

#include "kernels/generic/attention.inc"

// 64 lookups in 256 bytes: two lookups in 128 bytes each, chosen by the top bit. VBMI is not part of the baseline, as
// Cascade Lake lacks it.
__attribute__((target("avx512vbmi"))) void look_up_bytes(const std::uint8_t* x, Size count, const std::uint8_t* values,
                                                         std::uint8_t* y) {
    const __m512i v0 = _mm512_loadu_si512(values), v1 = _mm512_loadu_si512(values + 64);
    const __m512i v2 = _mm512_loadu_si512(values + 128), v3 = _mm512_loadu_si512(values + 192);
    for (Size i = 0; i < count; i += 64) {
        const __mmask64 inside = count - i >= 64 ? ~__mmask64{0} : (__mmask64{1} << (count - i)) - 1;
        const __m512i index = _mm512_maskz_loadu_epi8(inside, x + i);
        const __m512i low = _mm512_permutex2var_epi8(v0, index, v1), high = _mm512_permutex2var_epi8(v2, index, v3);
        const __m512i found = _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low, high);
        if (count - i >= 64)
            _mm512_storeu_si512(y + i, found);
        else
            _mm512_mask_storeu_epi8(y + i, inside, found);
    }
}

void table(const std::uint8_t* x, Size count, const void* values, Size entry_bytes, void* y) {
    if (entry_bytes == 1 && __builtin_cpu_supports("avx512vbmi"))
        look_up_bytes(x, count, static_cast<const std::uint8_t*>(values), static_cast<std::uint8_t*>(y));
    else
        generic_table(x, count, values, entry_bytes, y);
}

#include "kernels/x86/avx512_tile.inc"

#include "kernels/x86/avx512_linear.inc"

#include "kernels/x86/avx512_attention.inc"

#include "kernels/x86/avx512_layer_norm.inc"

// Measured on Sapphire Rapids, one layer alone at rising rates of spikes, the fastest of 12 runs: listing and products
// took the same time at 5 to 18 % of spikes (1 x 1 and 3 x 3 kernels, 48 to 1536 channels).
constexpr Size kEventsMaxPercent = 12;

// This also asks the operating system, through xgetbv, whether it saves the wide registers.
bool runnable() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}

#ifdef SWINCOMPRESS_WITH_AMX_INT8
#include "kernels/x86/amx_linear.inc"
#endif

#include "kernels/generic/table.inc"

constexpr Kernels made() {
    Kernels kernels = table_of("avx512_vnni", runnable, kPanelColumns, peak_products);
    kernels.attention_scratch_bytes = attention_scratch_bytes;
    kernels.attention = attention;
    kernels.layer_norm = layer_norm;
    kernels.table = table;
    kernels.add = add;
    kernels.events_max_percent = kEventsMaxPercent;
    return kernels;
}

#ifdef SWINCOMPRESS_WITH_AMX_INT8
// Measured as above: the crossing lies at 0 to 4 %.
constexpr Size kAmxEventsMaxPercent = 2;

constexpr Kernels made_with_amx() {
    Kernels kernels = made();
    kernels.name = "amx_int8";
    kernels.runnable = amx_runnable;
    kernels.linear_bytes = linear_bytes_for<AmxProducts>;
    kernels.pack_linear = pack_for<AmxProducts>;
    kernels.row_stride = row_stride_for<AmxProducts>;
    kernels.linear = linear_with<AmxProducts>;
    kernels.peak_products = amx_peak_products;
    kernels.events_max_percent = kAmxEventsMaxPercent;
    return kernels;
}
#endif

}  // namespace

constexpr Kernels avx512_vnni_kernels = made();
#ifdef SWINCOMPRESS_WITH_AMX_INT8
constexpr Kernels amx_int8_kernels = made_with_amx();
#endif

}  // namespace swincompress
