// What the steps of a plan are called, and what they cost, as spec/kinds.py and accel/profile.py have it for Python.
#pragma once

#include "engine/plan.h"

namespace swincompress {

struct StepCost {
    std::string operation, kind;  // "+" joins those of several operations that run as one
    Size macs;                    // per image
    Size image_bytes;             // values read and written per image, each once
    Size tensor_bytes;
};

// `operations` are those that the plan was made of.
std::vector<StepCost> step_costs(const Plan& plan, const std::vector<Operation>& operations);

}  // namespace swincompress
