// Which implementation runs: a list in order of preference and one short loop.
#pragma once

#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace swincompress {

// Names of the implementations that this CPU can run, the best first.
std::vector<std::string> implementations();

// The implementation called `name`. An empty name stands for the one in SWINCOMPRESS_IMPLEMENTATION, or for the best.
// Throws std::invalid_argument, listing the choices, for a name that is unknown or cannot run here.
const Kernels& select_kernels(const std::string& name);

}  // namespace swincompress
