// How fast this CPU can multiply and add at most, to hold a layer's speed against.
#pragma once

#include "kernels.h"

namespace swincompress {

// Billions of int8 multiply-accumulates a second that `threads` threads reach together with operands in registers,
// measured now, in about 10 ms; threads beyond the CPUs add nothing.
double measure_peak_gmacs(const Kernels& kernels, int threads);

}  // namespace swincompress
