// Which implementation runs: a list in order of preference and one short loop.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace swincompress {

// Names of the implementations that this CPU can run, best first.
std::vector<std::string> implementations();

// The implementation called `name`; with an empty name the one that SWINCOMPRESS_IMPLEMENTATION names, else the best.
// Throws std::invalid_argument, listing the choices, for a name that is unknown or cannot run here.
const Kernels& select_kernels(const std::string& name);

}  // namespace swincompress
