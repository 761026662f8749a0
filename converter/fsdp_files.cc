#include "converter/fsdp_files.h"

#include <algorithm>
#include <map>
#include <optional>
#include <utility>

#include "absl/strings/str_format.h"
#include "converter/decimal.h"

namespace holdfast::converter {
namespace {

constexpr std::string_view kExtensions[] = {".pt", ".pth", ".bin", ".ckpt"};
constexpr std::string_view kRank = "rank";
constexpr std::string_view kWorldSize = "world_size_";
constexpr uint64_t kRanksMax = uint64_t{1} << 20;

// "model_world_size_4_rank_0.pt": `model_world_size_4`, `.pt`, rank 0. Nothing if the name does not
// end in a rank.
struct RankName {
  std::string name = {};
  std::string extension = {};
  uint64_t rank = 0;
};

std::optional<std::string_view> ExtensionOf(std::string_view path) {
  for (const std::string_view extension : kExtensions) {
    if (path.ends_with(extension)) return extension;
  }
  return std::nullopt;
}

std::optional<RankName> ParseRankName(std::string_view path) {
  const std::optional<std::string_view> extension = ExtensionOf(path);
  if (!extension.has_value()) return std::nullopt;
  std::string_view stem = path.substr(0, path.size() - extension->size());
  const size_t begin = TrailingDigits(stem);
  const std::optional<uint64_t> rank = ParseDecimal(stem.substr(begin));
  if (!rank.has_value()) return std::nullopt;
  RankName name{.extension = std::string(*extension), .rank = *rank};
  stem = stem.substr(0, begin);
  if (stem.ends_with('_') || stem.ends_with('-')) stem.remove_suffix(1);
  if (!stem.ends_with(kRank)) return std::nullopt;
  stem.remove_suffix(kRank.size());
  // DeepSpeed's and Megatron's ranks are of other kinds.
  if (stem.ends_with("mp_") || stem.ends_with("pp_") || stem.ends_with("dp_")) return std::nullopt;
  if (stem.ends_with('_') || stem.ends_with('-')) stem.remove_suffix(1);
  name.name = stem;
  return name;
}

// "model_world_size_4": 4.
std::optional<uint64_t> WorldSizeIn(std::string_view name) {
  const size_t at = name.rfind(kWorldSize);
  if (at == std::string_view::npos) return std::nullopt;
  const std::string_view rest = name.substr(at + kWorldSize.size());
  return ParseDecimal(rest.substr(0, rest.find_first_not_of("0123456789")));
}

FsdpGroup::Content ContentOf(std::string_view name) {
  if (name.find("optim") != std::string_view::npos) return FsdpGroup::Content::kOptimizer;
  for (const std::string_view word : {"extra", "random", "rng", "scheduler", "dataloader"}) {
    if (name.find(word) != std::string_view::npos) return FsdpGroup::Content::kRankLocal;
  }
  return FsdpGroup::Content::kModel;
}

// Files by (name, extension) and rank.
using Groups = std::map<std::pair<std::string, std::string>, std::map<uint64_t, uint32_t>>;

Groups GroupsIn(const ForeignFolder& folder) {
  Groups groups;
  if (folder.single_file()) return groups;
  for (const uint32_t file : folder.FilesIn("")) {
    const std::string& path = folder.files()[file].path;
    if (auto name = ParseRankName(path); name.has_value()) {
      groups[{std::move(name->name), std::move(name->extension)}].emplace(name->rank, file);
    } else if (path == "pytorch_model_fsdp.bin") {
      groups[{"pytorch_model_fsdp", ".bin"}].emplace(0, file);
    }
  }
  if (!groups.empty()) {
    if (const auto optimizer = folder.Find("optimizer.bin"); optimizer.has_value()) {
      groups[{"optimizer", ".bin"}].emplace(0, *optimizer);
    }
  }
  return groups;
}

}  // namespace

bool HasFsdpGroups(const ForeignFolder& folder) { return !GroupsIn(folder).empty(); }

absl::StatusOr<std::vector<FsdpGroup>> FindFsdpGroups(const ForeignFolder& folder) {
  std::vector<FsdpGroup> found;
  for (const auto& [names, ranks] : GroupsIn(folder)) {
    FsdpGroup group{.content = ContentOf(names.first), .name = names.first};
    const uint64_t world_size = WorldSizeIn(names.first).value_or(ranks.rbegin()->first + 1);
    if (world_size > kRanksMax || ranks.rbegin()->first >= world_size) {
      return absl::DataLossError(absl::StrFormat("%s: expected ranks below %d, found rank %d",
                                                 names.first, std::min(world_size, kRanksMax),
                                                 ranks.rbegin()->first));
    }
    for (uint64_t rank = 0; rank < world_size; ++rank) {
      const auto file = ranks.find(rank);
      if (file == ranks.end()) {
        return absl::DataLossError(
            absl::StrFormat("expected files of ranks 0 to %d beside %s, found none of rank %d",
                            world_size - 1, folder.files()[ranks.begin()->second].path, rank));
      }
      group.files.push_back({file->second, static_cast<uint32_t>(rank)});
    }
    found.push_back(std::move(group));
  }
  std::ranges::stable_sort(found, {}, &FsdpGroup::content);
  return found;
}

}  // namespace holdfast::converter
