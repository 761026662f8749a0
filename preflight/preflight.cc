#include "preflight/preflight.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <memory>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "io/tcp.h"

namespace holdfast::preflight {
namespace {

using GetVariable = std::function<const char*(const char*)>;

// The first of `names` that is set, as a number up to `max`; absent if none is.
absl::StatusOr<std::optional<uint32_t>> NumberIn(const GetVariable& get,
                                                 const std::vector<const char*>& names,
                                                 uint32_t max) {
  for (const char* name : names) {
    const char* text = get(name);
    if (text == nullptr) continue;
    uint32_t number = 0;
    if (!absl::SimpleAtoi(text, &number) || number > max) {
      return absl::InvalidArgumentError(
          absl::StrFormat("%s: expected a number from 0 to %d, found '%s'", name, max, text));
    }
    return std::optional<uint32_t>(number);
  }
  return std::optional<uint32_t>();
}

absl::StatusOr<uint32_t> NeededNumber(const GetVariable& get, const std::vector<const char*>& names,
                                      uint32_t max) {
  ASSIGN_OR_RETURN(const std::optional<uint32_t> number, NumberIn(get, names, max));
  if (number.has_value()) return *number;
  return absl::InvalidArgumentError(absl::StrFormat(
      "%s is not set: run one process per node under torchrun, or set RANK, WORLD_SIZE, "
      "MASTER_ADDR and MASTER_PORT",
      names[0]));
}

absl::StatusOr<std::string> NeededText(const GetVariable& get, const char* name) {
  const char* text = get(name);
  if (text != nullptr && text[0] != '\0') return std::string(text);
  return absl::InvalidArgumentError(absl::StrFormat("%s is not set", name));
}

// Processes that share a node would measure each other.
absl::Status CheckOnePerNode(const GetVariable& get, uint32_t rank) {
  const auto several = [](const char* name, uint32_t found) {
    return absl::InvalidArgumentError(
        absl::StrFormat("%s is %d: several processes on a node; run one per node (torchrun "
                        "--nproc-per-node 1, srun --ntasks-per-node 1)",
                        name, found));
  };
  for (const char* name : {"LOCAL_RANK", "SLURM_LOCALID"}) {
    ASSIGN_OR_RETURN(const std::optional<uint32_t> local, NumberIn(get, {name}, UINT32_MAX));
    if (local.value_or(0) != 0) return several(name, *local);
  }
  ASSIGN_OR_RETURN(const std::optional<uint32_t> local_size,
                   NumberIn(get, {"LOCAL_WORLD_SIZE"}, UINT32_MAX));
  if (local_size.value_or(1) != 1) return several("LOCAL_WORLD_SIZE", *local_size);
  // torchrun numbers nodes and, with one process on each, ranks alike.
  ASSIGN_OR_RETURN(const std::optional<uint32_t> group, NumberIn(get, {"GROUP_RANK"}, UINT32_MAX));
  if (group.value_or(rank) != rank) return several("GROUP_RANK", *group);
  return absl::OkStatus();
}

std::string HostName() {
  std::array<char, 256> name = {};
  if (gethostname(name.data(), name.size() - 1) != 0) return "unknown";
  return name.data();
}

// What all need to know of how to reach rank 0.
struct Meeting {
  std::vector<Endpoint> places;
  bool loopback_only = false;
};

absl::StatusOr<Meeting> MeetingOf(const Place& place) {
  ASSIGN_OR_RETURN(const std::vector<Endpoint> addresses,
                   ResolveHost(place.master_host, place.master_port));
  Meeting meeting;
  meeting.loopback_only =
      std::all_of(addresses.begin(), addresses.end(),
                  [](const Endpoint& endpoint) { return endpoint.is_loopback(); });
  if (!meeting.loopback_only || !place.token.empty()) {
    if (place.token.size() < kTokenBytesMin) {
      return absl::InvalidArgumentError(
          absl::StrFormat("HOLDFAST_PREFLIGHT_TOKEN: expected at least %d characters, the same on "
                          "all nodes (MASTER_ADDR "
                          "is %s), found %d; for example: openssl rand -hex 16",
                          kTokenBytesMin, place.master_host, place.token.size()));
    }
  }
  for (uint16_t offset = 0; offset < kPortCount; ++offset) {
    const int port = place.master_port + offset;
    if (port > UINT16_MAX) break;
    for (const Endpoint& address : addresses) {
      meeting.places.push_back(address.WithPort(static_cast<uint16_t>(port)));
    }
  }
  return meeting;
}

absl::StatusOr<std::unique_ptr<Listener>> ListenAsRank0(const Identity& self,
                                                        const Meeting& meeting,
                                                        uint16_t first_port) {
  absl::Status last;
  for (uint16_t offset = 0; offset < kPortCount; ++offset) {
    const int port = first_port + offset;
    if (port > UINT16_MAX) break;
    const Endpoint at = meeting.loopback_only
                            ? meeting.places.front().WithPort(static_cast<uint16_t>(port))
                            : Endpoint::Any(static_cast<uint16_t>(port));
    absl::StatusOr<std::unique_ptr<Listener>> listener = Listener::Create(self, at);
    if (listener.ok()) return listener;
    last = listener.status();
  }
  return absl::UnavailableError(
      absl::StrFormat("no port of %d from MASTER_PORT on is free: %s", kPortCount, last.message()));
}

}  // namespace

absl::StatusOr<Place> ReadPlace(const std::function<const char*(const char*)>& get) {
  Place place;
  ASSIGN_OR_RETURN(
      place.node_count,
      NeededNumber(get, {"WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"}, kNodeCountMax));
  if (place.node_count == 0) return absl::InvalidArgumentError("WORLD_SIZE is 0");
  ASSIGN_OR_RETURN(place.rank, NeededNumber(get, {"RANK", "SLURM_PROCID"}, place.node_count - 1));
  RETURN_IF_ERROR(CheckOnePerNode(get, place.rank));
  ASSIGN_OR_RETURN(place.master_host, NeededText(get, "MASTER_ADDR"));
  ASSIGN_OR_RETURN(const uint32_t port, NeededNumber(get, {"MASTER_PORT"}, UINT16_MAX));
  if (port == 0) return absl::InvalidArgumentError("MASTER_PORT is 0");
  place.master_port = static_cast<uint16_t>(port);
  const char* token = get("HOLDFAST_PREFLIGHT_TOKEN");
  if (token != nullptr) place.token = token;
  const char* host = get("HOLDFAST_NODE");
  place.host = host != nullptr && host[0] != '\0' ? host : HostName();
  return place;
}

absl::StatusOr<Result> RunPreflight(FileSystem& file_system, const Place& place,
                                    const RunOptions& options) {
  ASSIGN_OR_RETURN(const Meeting meeting, MeetingOf(place));
  NodeOptions node{
      .identity = {place.token, place.rank, place.node_count},
      .host = place.host,
      .disk_directory = options.disk_directory,
      .rank_0 = meeting.places,
      .join_within = options.join_within,
      .loopback_only = meeting.loopback_only,
  };
  Result result;
  if (place.rank != 0) {
    result.ending = RunNode(file_system, node);
    return result;
  }

  absl::StatusOr<std::unique_ptr<Listener>> listener =
      ListenAsRank0(node.identity, meeting, place.master_port);
  if (!listener.ok()) {
    result.ending.text = std::string(listener.status().message());
    result.report.emplace().failure = result.ending.text;
    return result;
  }
  const Endpoint own = (*listener)->endpoint();
  node.rank_0 = {own.is_any() ? Endpoint::Loopback(own.port()) : own};
  const CoordinatorOptions coordinator{
      .node_count = place.node_count,
      .measure_for = options.measure_for,
      .join_within = options.join_within,
      .slow_ratio = options.slow_ratio,
      .progress = options.progress,
  };
  std::thread thread([&] { result.report = Coordinate(coordinator, **listener); });
  const Ending ending = RunNode(file_system, node);
  thread.join();
  // What the coordinator has told all counts; if it was this node that failed, only the node knows
  // why.
  Report& report = *result.report;
  if (report.outcome == Outcome::kFailed && ending.text != report.failure) {
    absl::StrAppend(&report.failure, "; rank 0 itself: ", ending.text);
  }
  result.ending = {report.outcome, report.failure};
  return result;
}

}  // namespace holdfast::preflight
