#include "engine/process.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <fstream>
#include <limits>
#include <sstream>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace swincompress {
namespace {

std::atomic<unsigned> forks{0};
[[maybe_unused]] const int watches_forks = pthread_atfork(nullptr, nullptr, [] { ++forks; });

constexpr double kUnlimited = std::numeric_limits<double>::infinity();

int cpus_of_affinity() {
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
    return static_cast<int>(std::thread::hardware_concurrency());
}

std::vector<std::string> split(const std::string& text, char separator) {
    std::vector<std::string> parts;
    std::istringstream stream(text);
    for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
    return parts;
}

bool lists_cpu(const std::string& controllers) {
    const std::vector<std::string> names = split(controllers, ',');
    return std::find(names.begin(), names.end(), "cpu") != names.end();
}

// CPUs that a control group's own files give. cpu.max says "QUOTA PERIOD", and the quota is a number or "max". Version
// 1 has a file for each, and -1 for no quota.
double quota_of(const std::string& group) {
    double quota = -1, period = 0;
    if (std::ifstream file(group + "/cpu.max"); file) {
        file >> quota >> period;
    } else {
        std::ifstream(group + "/cpu.cfs_quota_us") >> quota;
        std::ifstream(group + "/cpu.cfs_period_us") >> period;
    }
    return quota > 0 && period > 0 ? quota / period : kUnlimited;
}

// The mount points of control groups that may have a CPU quota, and the group that is mounted there.
struct Mount {
    std::string point, group;
    bool unified;  // version 2
};

std::vector<Mount> cgroup_mounts(const std::string& root) {
    std::vector<Mount> mounts;
    std::ifstream file(root + "/proc/self/mountinfo");
    for (std::string line; std::getline(file, line);) {
        const std::size_t dash = line.find(" - ");
        if (dash == std::string::npos) continue;
        const std::vector<std::string> mount = split(line.substr(0, dash), ' ');
        const std::vector<std::string> system = split(line.substr(dash + 3), ' ');
        if (mount.size() < 5 || system.size() < 3) continue;
        const bool unified = system[0] == "cgroup2";
        if (unified || (system[0] == "cgroup" && lists_cpu(system[2]))) mounts.push_back({mount[4], mount[3], unified});
    }
    return mounts;
}

// This process's group in the hierarchy of a mount; empty if there is none. Lines are "number:controllers:group".
std::string own_group(const std::string& root, bool unified) {
    std::ifstream file(root + "/proc/self/cgroup");
    for (std::string line; std::getline(file, line);) {
        const std::size_t first = line.find(':'), second = line.find(':', first + 1);
        if (second == std::string::npos) continue;
        const std::string controllers = line.substr(first + 1, second - first - 1);
        if (unified ? controllers.empty() : lists_cpu(controllers)) return line.substr(second + 1);
    }
    return "";
}

// The folder of this process's group below the mount point: a container may see its own group as the root.
std::string group_below(const Mount& mount, const std::string& group) {
    const std::string top = mount.group == "/" ? "" : mount.group;
    const bool inside = group.compare(0, top.size(), top) == 0 && group.find("/..") == std::string::npos;
    return inside ? group.substr(top.size()) : "";
}

double cpus_of_quota(const std::string& root) {
    double least = kUnlimited;
    for (const Mount& mount : cgroup_mounts(root)) {
        std::string group = group_below(mount, own_group(root, mount.unified));
        while (true) {
            least = std::min(least, quota_of(root + mount.point + group));
            const std::size_t parent = group.rfind('/');
            if (parent == std::string::npos) break;
            group.resize(parent);
        }
    }
    return least;
}

}  // namespace

void give_back([[maybe_unused]] const void* data, [[maybe_unused]] std::int64_t bytes) {
#ifdef __linux__
    const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto start = reinterpret_cast<std::uintptr_t>(data);
    const std::uintptr_t first = (start + page - 1) / page * page;
    const std::uintptr_t last = (start + static_cast<std::uintptr_t>(bytes)) / page * page;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
#endif
}

std::int64_t second_level_cache_bytes() {
#if defined(__linux__) && defined(_SC_LEVEL2_CACHE_SIZE)
    const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (bytes > 0) return bytes;
#endif
    return std::int64_t{256} * 1024;
}

unsigned fork_generation() { return forks.load(); }

int usable_cpus(const std::string& root) {
    // Only whole CPUs count: threads that spin on a part of one are stopped in the middle of a step.
    const int cpus = cpus_of_affinity();
    return std::max(1, static_cast<int>(std::min<double>(cpus, cpus_of_quota(root))));
}

}  // namespace swincompress
