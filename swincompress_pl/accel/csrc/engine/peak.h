// How fast this CPU can multiply and add at most, to compare a layer's speed with.
#pragma once

#include "kernels/kernels.h"

namespace swincompress {

// Billions of int8 multiply-accumulates per second that `threads` threads reach together with operands in registers.
// The measurement takes about 10 ms. More threads than CPUs add nothing.
double measure_peak_gmacs(const Kernels& kernels, int threads);

}  // namespace swincompress
