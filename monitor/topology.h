// Which NIC each GPU of each node sends through, and where that NIC is plugged in: what no
// collective library tells. A cluster's operator writes it once, as a JSON document
// (docs/MONITOR.md has the reference, and an example that a test reads):
//
//   {"schema_version": 1,
//    "node_kinds": {"h100": {"gpus": [{"nic": "mlx5_0", "rail": 0, "nic_kind": "400G"}, ...]}},
//    "nodes": {"n0": {"kind": "h100", "switch": "leaf-1"}, ...}}
//
// `gpus[i]` is the GPU of local rank i. The analysis uses it twice: connections are compared only
// with those of the same rail, hop and kinds of NIC, and what it finds at an end names the NIC.
#ifndef HOLDFAST_MONITOR_TOPOLOGY_H_
#define HOLDFAST_MONITOR_TOPOLOGY_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace holdfast::monitor {

// Limits. Parse refuses what is above them.
inline constexpr size_t kTopologyBytesMax = size_t{4} << 20;
inline constexpr size_t kTopologyNodesMax = 65'536;
inline constexpr size_t kTopologyGpusMax = 64;       // of a node
inline constexpr size_t kTopologyNameBytesMax = 64;  // of a NIC, a kind, a switch
inline constexpr uint32_t kRailMax = 1023;

// Where a GPU's traffic leaves its node.
struct Port {
  std::string nic;
  uint32_t rail = 0;
  std::string nic_kind;     // empty: not told; NICs of one kind are as fast as each other
  std::string switch_name;  // that it is plugged into; empty: not told
  friend bool operator==(const Port&, const Port&) = default;
};

// Threads: any, once parsed.
class Topology {
 public:
  // Errors: kInvalidArgument: line and column of what is no JSON, or the path of the value
  // (`nodes.n3.gpus[2].rail`), what was expected and what was found.
  static absl::StatusOr<Topology> Parse(std::string text);

  // Nothing: it is not in the document.
  std::optional<Port> Find(std::string_view node, uint32_t local_rank) const;

  size_t node_count() const { return nodes_.size(); }

 private:
  struct Node {
    std::shared_ptr<const std::vector<Port>> ports;  // by local rank; nodes of one kind share them
    std::string switch_name;                         // of those that do not say another one
  };

  std::map<std::string, Node, std::less<>> nodes_;
};

}  // namespace holdfast::monitor

#endif  // HOLDFAST_MONITOR_TOPOLOGY_H_
