#include "kernels/dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace swincompress {
namespace {

constexpr const char* kVariable = "SWINCOMPRESS_IMPLEMENTATION";

const Kernels* const kInOrderOfPreference[] = {
#ifdef SWINCOMPRESS_WITH_AMX_INT8
    &amx_int8_kernels,
#endif
#ifdef SWINCOMPRESS_WITH_AVX512_VNNI
    &avx512_vnni_kernels,
#endif
#ifdef SWINCOMPRESS_WITH_AVX_VNNI
    &avx_vnni_kernels,
#endif
#ifdef SWINCOMPRESS_WITH_AVX2
    &avx2_kernels,
#endif
#ifdef SWINCOMPRESS_WITH_NEON_DOTPROD
    &neon_dotprod_kernels,
#endif
    &scalar_kernels,
};

// All names of implementations, so that the error tells one that this build lacks from one that does not exist.
bool known_elsewhere(const std::string& name) {
    for (const char* other : {"avx2", "avx_vnni", "avx512_vnni", "amx_int8", "neon_dotprod"})
        if (name == other) return true;
    return false;
}

std::string choices() {
    std::string text;
    for (const std::string& name : implementations()) text += (text.empty() ? "" : ", ") + name;
    return text;
}

}  // namespace

std::vector<std::string> implementations() {
    std::vector<std::string> names;
    for (const Kernels* kernels : kInOrderOfPreference)
        if (kernels->runnable()) names.emplace_back(kernels->name);
    return names;
}

const Kernels& select_kernels(const std::string& name) {
    std::string wanted = name, source = "implementation";
    const char* forced = std::getenv(kVariable);
    if (wanted.empty() && forced != nullptr) {
        wanted = forced;
        source = kVariable;
    }
    bool built = false;
    for (const Kernels* kernels : kInOrderOfPreference) {
        const bool chosen = wanted.empty() || wanted == kernels->name;
        if (chosen && kernels->runnable()) return *kernels;
        built = built || chosen;
    }
    const std::string reason = built                     ? "cannot run on this CPU"
                               : known_elsewhere(wanted) ? "is not part of this build"
                                                         : "is unknown";
    throw std::invalid_argument(source + " '" + wanted + "' " + reason + "; this CPU can run: " + choices());
}

}  // namespace swincompress
