// What a trainer's Flight Recorder, its stacks and NCCL's RAS port may say: whatever is taken is
// bounded, and what follows from it is a batch of testimonies that can be sent.
#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "base/check.h"
#include "monitor/testimony.h"
#include "monitor/witness/flight_record.h"
#include "monitor/witness/ras.h"
#include "monitor/witness/stacks.h"
#include "monitor/witness/xid.h"
#include "tests/fuzz/targets.h"

namespace holdfast::fuzz {
namespace {

using monitor::FlightGroup;
using monitor::FlightHistory;
using monitor::FlightRecord;
using monitor::RankStacks;
using monitor::Testimony;

constexpr uint32_t kWorldSize = 4;

void CheckSendable(const std::vector<Testimony>& said) {
  CHECK(said.size() <= monitor::kTestimoniesMax);
  const std::string bytes = monitor::EncodeTestimonies(said);
  CHECK_OK(monitor::DecodeTestimonies(std::as_bytes(std::span(bytes))).status());
}

}  // namespace

bool FuzzFlightRecord(Input input) {
  const auto record = monitor::ParseFlightRecord(Rank{1}, std::string(input.begin(), input.end()));
  if (!record.ok()) {
    CHECK(record.status().code() == absl::StatusCode::kInvalidArgument ||
          record.status().code() == absl::StatusCode::kPermissionDenied);
    return false;
  }
  CHECK(record->groups.size() <= monitor::kFlightGroupsMax);
  for (const FlightGroup& group : record->groups) {
    CHECK(group.operations.size() <= monitor::kFlightOperationsMax);
    CHECK(std::is_sorted(group.operations.begin(), group.operations.end(),
                         [](const auto& a, const auto& b) { return a.sequence < b.sequence; }));
  }
  // Beside an honest rank that has done nothing yet, and one that says the same.
  FlightRecord idle, same = *record;
  same.rank = Rank{2};
  FlightHistory history;
  for (const absl::Duration now : {absl::Seconds(1), absl::Seconds(9)}) {
    CheckSendable(history.Testify(now, kWorldSize, std::vector{idle, *record, same}, 20));
  }
  return true;
}

bool FuzzRas(Input input) {
  const auto report = monitor::ParseRasReport(std::string(input.begin(), input.end()));
  if (!report.ok()) {
    CHECK(report.status().code() == absl::StatusCode::kInvalidArgument);
    return false;
  }
  const auto rank_of = [](const monitor::RasCommunicator&, const monitor::RasRank& rank) {
    return rank.index < kWorldSize ? std::optional(Rank{rank.index}) : std::nullopt;
  };
  CheckSendable(monitor::TestifyRas(*report, *report, absl::Seconds(2), rank_of));
  return true;
}

bool FuzzStacks(Input input) {
  const std::string text(input.begin(), input.end());
  std::vector<RankStacks> stacks;
  for (uint32_t rank = 0; rank < kWorldSize; ++rank) {
    // One of them has half of it.
    const std::string part = rank == 3 ? text.substr(0, text.size() / 2) : text;
    stacks.push_back({Rank{rank}, monitor::StackKind::kPython, monitor::ParsePythonStacks(part)});
    stacks.push_back({Rank{rank}, monitor::StackKind::kNative, monitor::ParseNativeStacks(part)});
  }
  CheckSendable(monitor::TestifyStacks(stacks));
  if (const auto xid = monitor::ParseXid(text); xid.has_value()) {
    if (const auto said = monitor::TestifyXid(*xid, {}, absl::Seconds(1)); said.has_value()) {
      CheckSendable({*said});
    }
  }
  return !stacks[0].threads.empty() || !stacks[1].threads.empty();
}

}  // namespace holdfast::fuzz
