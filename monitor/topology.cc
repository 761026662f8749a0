#include "monitor/topology.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/json_reader.h"
#include "base/status_macros.h"

namespace holdfast::monitor {
namespace {

using Ports = std::shared_ptr<const std::vector<Port>>;

constexpr uint64_t kSchemaVersion = 1;
constexpr JsonLimits kLimits = {
    .bytes_max = kTopologyBytesMax, .values_max = 1'000'000, .depth_max = 8};

// A name that can stand in a sentence.
bool IsName(std::string_view text) {
  return !text.empty() && text.size() <= kTopologyNameBytesMax &&
         std::none_of(text.begin(), text.end(),
                      [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7F; });
}

absl::StatusOr<std::string> Name(const JsonValue& value) {
  ASSIGN_OR_RETURN(const std::string_view text, value.String());
  if (!IsName(text)) {
    return value.Mismatch(
        absl::StrCat("1 to ", kTopologyNameBytesMax, " bytes without control characters"));
  }
  return std::string(text);
}

// Empty where it is absent.
absl::StatusOr<std::string> OptionalName(const JsonValue& object, std::string_view key) {
  const JsonValue value = object.Find(key);
  if (!value.present()) return std::string();
  return Name(value);
}

absl::StatusOr<Port> PortOf(const JsonValue& gpu) {
  RETURN_IF_ERROR(gpu.ExpectKeys({"nic", "rail", "nic_kind", "switch"}));
  Port port;
  ASSIGN_OR_RETURN(const JsonValue nic, gpu.Get("nic"));
  ASSIGN_OR_RETURN(port.nic, Name(nic));
  if (const JsonValue rail = gpu.Find("rail"); rail.present()) {
    ASSIGN_OR_RETURN(const uint64_t number, rail.Uint64());
    if (number > kRailMax) return rail.Mismatch(absl::StrCat("a number up to ", kRailMax));
    port.rail = static_cast<uint32_t>(number);
  }
  ASSIGN_OR_RETURN(port.nic_kind, OptionalName(gpu, "nic_kind"));
  ASSIGN_OR_RETURN(port.switch_name, OptionalName(gpu, "switch"));
  return port;
}

absl::StatusOr<Ports> PortsOf(const JsonValue& gpus) {
  ASSIGN_OR_RETURN(const size_t count, gpus.ArraySize());
  if (count == 0 || count > kTopologyGpusMax) {
    return gpus.Mismatch(absl::StrCat("an array of 1 to ", kTopologyGpusMax, " GPUs"));
  }
  std::vector<Port> ports;
  for (size_t i = 0; i < count; ++i) {
    ASSIGN_OR_RETURN(Port port, PortOf(gpus[i]));
    ports.push_back(std::move(port));
  }
  return std::make_shared<const std::vector<Port>>(std::move(ports));
}

using Kinds = std::map<std::string, Ports, std::less<>>;

absl::StatusOr<Kinds> KindsOf(const JsonValue& all) {
  Kinds kinds;
  if (!all.present()) return kinds;
  ASSIGN_OR_RETURN(const std::vector<std::string_view> names, all.Keys());
  for (size_t i = 0; i < names.size(); ++i) {
    const JsonValue kind = all.Member(i);
    RETURN_IF_ERROR(kind.ExpectKeys({"gpus"}));
    ASSIGN_OR_RETURN(const JsonValue gpus, kind.Get("gpus"));
    ASSIGN_OR_RETURN(kinds[std::string(names[i])], PortsOf(gpus));
  }
  return kinds;
}

absl::StatusOr<Ports> PortsOfNode(const JsonValue& node, const Kinds& kinds) {
  RETURN_IF_ERROR(node.ExpectKeys({"kind", "gpus", "switch"}));
  const JsonValue kind = node.Find("kind");
  const JsonValue gpus = node.Find("gpus");
  if (kind.present() == gpus.present()) {
    return node.Mismatch("either a kind of node_kinds (kind) or its own GPUs (gpus)");
  }
  if (gpus.present()) return PortsOf(gpus);
  ASSIGN_OR_RETURN(const std::string_view name, kind.String());
  const auto found = kinds.find(name);
  if (found == kinds.end()) return kind.Mismatch("one of node_kinds");
  return found->second;
}

}  // namespace

absl::StatusOr<Topology> Topology::Parse(std::string text) {
  ASSIGN_OR_RETURN(const std::unique_ptr<JsonDocument> document,
                   JsonDocument::Parse(std::move(text), kLimits));
  const JsonValue root = document->root();
  RETURN_IF_ERROR(root.ExpectKeys({"schema_version", "node_kinds", "nodes"}));
  ASSIGN_OR_RETURN(const JsonValue version, root.Get("schema_version"));
  ASSIGN_OR_RETURN(const uint64_t number, version.Uint64());
  if (number != kSchemaVersion) return version.Mismatch(absl::StrCat(kSchemaVersion));
  ASSIGN_OR_RETURN(const Kinds kinds, KindsOf(root.Find("node_kinds")));
  ASSIGN_OR_RETURN(const JsonValue nodes, root.Get("nodes"));
  ASSIGN_OR_RETURN(const std::vector<std::string_view> names, nodes.Keys());
  if (names.empty() || names.size() > kTopologyNodesMax) {
    return nodes.Mismatch(absl::StrCat("1 to ", kTopologyNodesMax, " nodes"));
  }
  Topology topology;
  for (size_t i = 0; i < names.size(); ++i) {
    Node& node = topology.nodes_[std::string(names[i])];
    ASSIGN_OR_RETURN(node.ports, PortsOfNode(nodes.Member(i), kinds));
    ASSIGN_OR_RETURN(node.switch_name, OptionalName(nodes.Member(i), "switch"));
  }
  return topology;
}

std::optional<Port> Topology::Find(std::string_view node, uint32_t local_rank) const {
  const auto found = nodes_.find(node);
  if (found == nodes_.end() || local_rank >= found->second.ports->size()) return std::nullopt;
  Port port = (*found->second.ports)[local_rank];
  if (port.switch_name.empty()) port.switch_name = found->second.switch_name;
  return port;
}

}  // namespace holdfast::monitor
