// How long the planner takes for a large reshard: 1,000 tensors of 1,024 x 1,024, each stored as
// 1,000 flat shards (a million pieces), against one rank of a tensor-parallel layout that cuts
// dimension 1 by 8 (a million runs of 128 elements). Prints JSON: seconds of PlanCopy, seconds of
// the proof that the stored pieces cover everything, operations, peak memory of the process.
#include "format/planner.h"

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "format/layout.h"

namespace holdfast {
namespace {

constexpr uint32_t kTensors = 1000;
constexpr uint64_t kSide = 1024;
constexpr uint32_t kShards = 1000;

double Seconds(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

std::string Document(const std::string& axis, uint32_t size, const std::string& op) {
  std::string text = absl::StrCat(R"({"holdfast_layout":1,"mesh":[{"axis":")", axis, R"(","size":)",
                                  size, R"(}],"placements":{"p":[)", op, R"(]},"tensors":[)");
  for (uint32_t i = 0; i < kTensors; ++i) {
    absl::StrAppend(&text, i > 0 ? "," : "", R"({"name":"t)", i, R"(","shape":[)", kSide, ",",
                    kSide, R"(],"states":[{"state":"param","dtype":"float32","place":"p"}]})");
  }
  return text + "]}";
}

// Of this process alone: getrusage's maximum has that of the process that started it in it.
double PeakMemoryMib() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("VmHWM:")) return std::stod(line.substr(6)) / 1024;
  }
  return 0;
}

int Run() {
  const auto source =
      Layout::Parse(Document("dp", kShards, R"({"op":"flat","axis":"dp","rule":"ceil"})"));
  const auto target =
      Layout::Parse(Document("tp", 8, R"({"op":"shard","dim":1,"axis":"tp","rule":"even"})"));
  if (!source.ok() || !target.ok()) return 1;
  std::vector<StoredPiece> pieces;
  BoxTable boxes;
  for (uint32_t rank = 0; rank < kShards; ++rank) {
    const auto held = (*source)->ForRank(Rank{rank});
    if (!held.ok()) return 1;
    uint64_t at = 0;
    for (const Segment& segment : held->segments) {
      pieces.push_back({segment.piece, rank, at});
      at += segment.piece.ElementCount() * 4;
    }
  }
  const SourceView view{(*source)->tensor_states(), boxes, pieces};
  auto begin = std::chrono::steady_clock::now();
  if (!CheckCover(view).ok()) return 1;
  const double cover = Seconds(begin);
  const auto held = (*target)->ForRank(Rank{3});
  if (!held.ok()) return 1;
  begin = std::chrono::steady_clock::now();
  const auto plan = PlanCopy(view, (*target)->tensor_states(), *held);
  const double planned = Seconds(begin);
  if (!plan.ok()) return 1;
  uint64_t runs = 0;
  for (const CopyOp& op : plan->ops) runs += op.count;
  std::printf(
      "{\"seconds\": %.3f, \"cover_seconds\": %.3f, \"pieces\": %zu, \"operations\": %zu, "
      "\"runs\": %llu, \"peak_mib\": %.1f}\n",
      planned, cover, pieces.size(), plan->ops.size(), static_cast<unsigned long long>(runs),
      PeakMemoryMib());
  return 0;
}

}  // namespace
}  // namespace holdfast

int main() { return holdfast::Run(); }
