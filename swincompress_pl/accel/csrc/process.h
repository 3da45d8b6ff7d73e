// What an engine asks about the process that it runs in.
#pragma once

#include <string>

namespace swincompress {

// How often this process and those that it descends from were forked, as seen from here: another number in a child than
// in its parent.
unsigned fork_generation();

// CPUs that this process may use, at least 1: those of its affinity mask, no more than the CPU quotas of its control
// groups and of those above them (cgroup v1 and v2) give whole CPUs. root: in front of /proc and of mount points.
int usable_cpus(const std::string& root = "");

}  // namespace swincompress
