#include "converter/megatron_files.h"

#include <algorithm>
#include <map>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "converter/decimal.h"

namespace holdfast::converter {
namespace {

constexpr std::string_view kLatest = "latest_checkpointed_iteration.txt";
constexpr std::string_view kModel = "model_optim_rng.pt";
constexpr size_t kLatestBytesMax = 4096;
constexpr size_t kHeadBytes = size_t{64} << 10;
constexpr size_t kTagsShownMax = 20;

std::string Join(std::string_view directory, std::string_view name) {
  return directory.empty() ? std::string(name) : absl::StrFormat("%s/%s", directory, name);
}

// "iter_0001000": 1000.
std::optional<uint64_t> IterationOf(std::string_view tag) {
  if (!tag.starts_with("iter_")) return std::nullopt;
  return ParseDecimal(tag.substr(5));
}

// Directories of ranks directly in `directory`, with their model files.
std::vector<MegatronRankFiles> RanksIn(const ForeignFolder& folder, std::string_view directory) {
  std::vector<MegatronRankFiles> ranks;
  for (const std::string& path : folder.directories()) {
    const size_t slash = path.rfind('/');
    const std::string_view parent =
        slash == std::string::npos ? std::string_view() : std::string_view(path).substr(0, slash);
    if (parent != directory) continue;
    const std::string name = path.substr(slash == std::string::npos ? 0 : slash + 1);
    const auto numbers = ParseMegatronRank(name);
    const auto model = folder.Find(Join(path, kModel));
    if (!numbers.has_value() || !model.has_value()) continue;
    ranks.push_back({.directory = name,
                     .numbers = *numbers,
                     .model = *model,
                     .optimizer = folder.Find(Join(path, "distrib_optim.pt"))});
  }
  return ranks;
}

// What the directory is, if it is an iteration.
absl::StatusOr<std::optional<MegatronFiles>> FilesIn(const ForeignFolder& folder,
                                                     const std::string& directory) {
  MegatronFiles files{.directory = directory,
                      .tag = directory.substr(directory.rfind('/') + 1),
                      .ranks = RanksIn(folder, directory)};
  if (!files.ranks.empty()) return files;
  files.metadata = folder.Find(Join(directory, ".metadata"));
  if (!files.metadata.has_value()) return std::nullopt;
  files.common = folder.Find(Join(directory, "common.pt"));
  files.json = folder.Find(Join(directory, "metadata.json"));
  files.kind = MegatronFiles::Kind::kTorchDist;
  if (files.json.has_value()) {
    ASSIGN_OR_RETURN(const std::string head, folder.ReadHead(*files.json, kHeadBytes));
    if (head.find("\"sharded_backend\"") != std::string::npos) return files;
    return std::nullopt;
  }
  // It has been lost. A folder of other software is not called as an iteration.
  if (files.common.has_value() && !directory.empty()) return files;
  // fsdp_dtensor has no file of its own: its keys tell, and are there from the first bytes on.
  ASSIGN_OR_RETURN(const std::string head, folder.ReadHead(*files.metadata, kHeadBytes));
  files.kind = MegatronFiles::Kind::kFsdpDTensor;
  const bool told = head.find("model.module.") != std::string::npos &&
                    (head.find("checkpoint_version") != std::string::npos ||
                     head.find("optimizer.state.module.") != std::string::npos ||
                     folder.Find(kLatest).has_value());
  if (told) return files;
  return std::nullopt;
}

// Names of iterations in the folder, which may be none of Megatron's.
std::vector<std::string> Candidates(const ForeignFolder& folder) {
  std::vector<std::string> tags;
  for (const std::string& directory : folder.directories()) {
    if (directory == "release" || IterationOf(directory).has_value()) tags.push_back(directory);
  }
  return tags;
}

}  // namespace

std::optional<std::vector<uint32_t>> ParseMegatronRank(std::string_view name) {
  constexpr std::string_view kPrefix = "mp_rank_";
  if (!name.starts_with(kPrefix)) return std::nullopt;
  name.remove_prefix(kPrefix.size());
  std::vector<uint32_t> numbers;
  for (bool last = false; !last;) {
    const size_t end = name.find('_');
    last = end == std::string_view::npos;
    const std::string_view digits = name.substr(0, end);
    const auto number = ParseDecimal(digits);
    if (!number.has_value() || digits.size() > 7 || numbers.size() == 3) return std::nullopt;
    numbers.push_back(static_cast<uint32_t>(*number));
    if (!last) name.remove_prefix(end + 1);
  }
  return numbers;
}

absl::StatusOr<bool> HoldsMegatron(const ForeignFolder& folder) {
  if (folder.single_file()) return false;
  ASSIGN_OR_RETURN(const auto itself, FilesIn(folder, ""));
  if (itself.has_value()) return true;
  for (const std::string& tag : Candidates(folder)) {
    ASSIGN_OR_RETURN(const auto files, FilesIn(folder, tag));
    if (files.has_value()) return true;
  }
  return false;
}

absl::StatusOr<MegatronFiles> FindMegatronFiles(const ForeignFolder& folder,
                                                const std::string& tag) {
  if (tag.empty()) {
    ASSIGN_OR_RETURN(auto itself, FilesIn(folder, ""));
    if (itself.has_value()) return *std::move(itself);
  }
  std::map<std::string, MegatronFiles> found;
  std::vector<std::string> tags;
  for (const std::string& candidate : Candidates(folder)) {
    ASSIGN_OR_RETURN(auto files, FilesIn(folder, candidate));
    if (!files.has_value()) continue;
    if (tags.size() < kTagsShownMax) tags.push_back(candidate);
    found.emplace(candidate, *std::move(files));
  }
  const auto named = [&found](std::string_view name) {
    const auto number = ParseDecimal(name);
    return number.has_value() ? found.find(absl::StrFormat("iter_%07d", *number))
                              : found.find(std::string(name));
  };
  if (!tag.empty()) {
    const auto chosen = named(tag);
    if (chosen != found.end()) return chosen->second;
    return absl::NotFoundError(absl::StrFormat("expected a tag of %s, found %s",
                                               absl::StrJoin(tags, ", "), absl::CHexEscape(tag)));
  }
  if (const auto latest = folder.Find(kLatest); latest.has_value()) {
    ASSIGN_OR_RETURN(const std::string text, folder.ReadAll(*latest, kLatestBytesMax));
    const std::string name(absl::StripAsciiWhitespace(text));
    const auto chosen = named(name);
    if (chosen != found.end()) return chosen->second;
    return absl::DataLossError(
        absl::StrFormat("%s: expected one of the iterations that are there (%s), found \"%s\"",
                        kLatest, absl::StrJoin(tags, ", "), absl::CHexEscape(name)));
  }
  if (found.empty()) return absl::NotFoundError("expected an iteration of Megatron, found none");
  // `release` has no number: it is what training began with.
  return std::ranges::max_element(found, {},
                                  [](const auto& entry) { return IterationOf(entry.first); })
      ->second;
}

}  // namespace holdfast::converter
