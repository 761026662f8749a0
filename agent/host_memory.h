// How much memory this process may count on: the least of the machine's and of every limit of its
// control group (v1 or v2) and that group's parents.
#ifndef HOLDFAST_AGENT_HOST_MEMORY_H_
#define HOLDFAST_AGENT_HOST_MEMORY_H_

#include <cstdint>
#include <string>

namespace holdfast {

struct HostMemory {
  uint64_t bytes = 0;  // 0: not even the machine's size can be read
  std::string limit;   // what set it: "machine" or the limit's path
};

// `root` is put before /proc and /sys: empty in the product, a made-up tree in tests.
HostMemory ReadHostMemory(const std::string& root = "");

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_HOST_MEMORY_H_
