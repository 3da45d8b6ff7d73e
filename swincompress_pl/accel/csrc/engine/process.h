// What an engine asks about the process that it runs in.
#pragma once

#include <cstdint>
#include <string>

namespace swincompress {

// The number of forks that led to this process; a child has another number than its parent.
unsigned fork_generation();

// Gives the whole pages of private memory back to the system; nothing may read them afterwards.
void give_back(const void* data, std::int64_t bytes);

// The number of CPUs that this process may use, at least 1: those of its affinity mask, but no more than the whole CPUs
// in the quotas of its control groups and of those above them (cgroup v1 and v2). `root` is a prefix of /proc and of
// mount points.
int usable_cpus(const std::string& root = "");

// Bytes of a core's second-level cache; 256 kB where the system does not say.
std::int64_t second_level_cache_bytes();

}  // namespace swincompress
