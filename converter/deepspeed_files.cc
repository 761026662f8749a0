#include "converter/deepspeed_files.h"

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"

namespace holdfast::converter {
namespace {

constexpr size_t kTagBytesMax = 4096;
constexpr size_t kTagsShownMax = 20;

// Takes texts and numbers from the front of a name.
class NameScanner {
 public:
  explicit NameScanner(std::string_view rest) : rest_(rest) {}

  bool Take(std::string_view text) {
    if (!rest_.starts_with(text)) return false;
    rest_.remove_prefix(text.size());
    return true;
  }
  // Of at most 7 digits: no world is larger.
  bool TakeNumber(uint32_t& number) {
    size_t digits = 0;
    number = 0;
    while (digits < rest_.size() &&
           absl::ascii_isdigit(static_cast<unsigned char>(rest_[digits]))) {
      if (digits == 7) return false;
      number = number * 10 + static_cast<uint32_t>(rest_[digits] - '0');
      ++digits;
    }
    rest_.remove_prefix(digits);
    return digits > 0;
  }
  bool AtEnd() const { return rest_.empty(); }

 private:
  std::string_view rest_;
};

std::string_view BaseName(std::string_view path) {
  const size_t slash = path.rfind('/');
  return slash == std::string_view::npos ? path : path.substr(slash + 1);
}
std::string_view DirectoryOf(std::string_view path) {
  const size_t slash = path.rfind('/');
  return slash == std::string_view::npos ? std::string_view() : path.substr(0, slash);
}

// What a directory is: of a universal one the weights are told by its zero/.
struct Directory {
  bool native = false;
  bool universal = false;
};

// Directories that hold the files of a checkpoint, "" for the folder itself, one level deep.
std::map<std::string, Directory, std::less<>> CheckpointDirectories(const ForeignFolder& folder) {
  std::map<std::string, Directory, std::less<>> found;
  for (const FolderFile& file : folder.files()) {
    const std::string_view directory = DirectoryOf(file.path);
    if (directory.find('/') == std::string_view::npos) {
      const auto name = ParseDeepSpeedFileName(BaseName(file.path));
      if (name.has_value()) found[std::string(directory)].native = true;
    }
    // <tag>/zero/<parameter>/fp32.pt, or zero/<parameter>/fp32.pt
    if (file.path.ends_with("/fp32.pt")) {
      if (file.path.starts_with("zero/")) {
        found[""].universal = true;
      } else if (const size_t at = file.path.find("/zero/");
                 at != std::string::npos && file.path.find('/') == at) {
        found[file.path.substr(0, at)].universal = true;
      }
    }
  }
  return found;
}

// The number at the end of a tag, for order; tags without one come first, by name.
std::pair<uint64_t, std::string_view> TagOrder(std::string_view tag) {
  std::string_view stem = tag;
  if (stem.ends_with("_universal")) stem.remove_suffix(std::string_view("_universal").size());
  size_t begin = stem.size();
  while (begin > 0 && stem.size() - begin < 18 &&
         absl::ascii_isdigit(static_cast<unsigned char>(stem[begin - 1]))) {
    --begin;
  }
  uint64_t number = 0;
  for (char c : stem.substr(begin)) number = number * 10 + static_cast<uint64_t>(c - '0');
  return {begin == stem.size() ? 0 : number + 1, tag};
}

// The directory that counts when no tag is given.
absl::StatusOr<std::string> NewestDirectory(
    const ForeignFolder& folder, const std::map<std::string, Directory, std::less<>>& directories) {
  if (directories.contains("")) return std::string();
  for (const char* latest : {"latest", "latest_universal"}) {
    const auto file = folder.Find(latest);
    if (!file.has_value()) continue;
    ASSIGN_OR_RETURN(const std::string text, folder.ReadAll(*file, kTagBytesMax));
    const std::string tag(absl::StripAsciiWhitespace(text));
    if (directories.contains(tag)) return tag;
    return absl::DataLossError(absl::StrFormat(
        "%s: it names \"%s\", and there is no such checkpoint", latest, absl::CHexEscape(tag)));
  }
  std::string_view newest;
  for (const auto& [directory, what] : directories) {
    if (newest.empty() || TagOrder(newest) < TagOrder(directory)) newest = directory;
  }
  return std::string(newest);
}

}  // namespace

std::optional<DeepSpeedFileName> ParseDeepSpeedFileName(std::string_view name) {
  using Role = DeepSpeedFileName::Role;
  DeepSpeedFileName found;
  {
    NameScanner scan(name);
    if (scan.Take("mp_rank_") && scan.TakeNumber(found.mp) && scan.Take("_model_states.pt") &&
        scan.AtEnd()) {
      found.role = Role::kModel;
      return found;
    }
  }
  {
    NameScanner scan(name);
    const bool prefixed = scan.Take("bf16_") || scan.Take("fp16_");
    if (scan.Take("zero_pp_rank_") && scan.TakeNumber(found.dp) && scan.Take("_mp_rank_") &&
        scan.TakeNumber(found.mp)) {
      NameScanner model = scan;
      if (!prefixed && model.Take("_model_states.pt") && model.AtEnd()) {
        found.role = Role::kPartitionedModel;
        return found;
      }
      scan.Take("_");  // very old ones have none
      if (scan.Take("optim_states.pt") && scan.AtEnd()) {
        found.role = Role::kOptimizer;
        return found;
      }
    }
  }
  {
    NameScanner scan(name);
    if (scan.Take("layer_") && scan.TakeNumber(found.layer)) {
      NameScanner layer = scan;
      found.mp = 0;
      if (layer.Take("-model_") && layer.TakeNumber(found.mp) && layer.Take("-model_states.pt") &&
          layer.AtEnd()) {
        found.role = Role::kLayer;
        return found;
      }
      layer = scan;
      found.mp = 0;
      if (layer.Take("-model_states.pt") && layer.AtEnd()) {
        found.role = Role::kLayer;
        return found;
      }
    }
  }
  {
    NameScanner scan(name);
    found.layer = 0;
    if (scan.Take("layer_")) {
      if (!scan.TakeNumber(found.layer) || !scan.Take("_")) return std::nullopt;
    }
    if (scan.Take("expert_") && scan.TakeNumber(found.expert) && scan.Take("_mp_rank_") &&
        scan.TakeNumber(found.mp) && scan.Take("_model_states.pt") && scan.AtEnd()) {
      found.role = Role::kExpert;
      return found;
    }
  }
  {
    NameScanner scan(name);
    if (scan.Take("expp_rank_") && scan.TakeNumber(found.dp) && scan.Take("_mp_rank_") &&
        scan.TakeNumber(found.mp) && scan.Take("_optim_states.pt") && scan.AtEnd()) {
      found.role = Role::kExpertOptimizer;
      return found;
    }
  }
  return std::nullopt;
}

absl::StatusOr<RankKey> DeepSpeedFiles::Counts(const std::map<RankKey, uint32_t>& files,
                                               std::string_view what) {
  RankKey counts;
  for (const auto& [key, file] : files) {
    counts.mp = std::max(counts.mp, key.mp + 1);
    counts.dp = std::max(counts.dp, key.dp + 1);
  }
  // The map is in the order (mp, dp): the first that is not where it belongs is missing.
  RankKey expected;
  for (const auto& [key, file] : files) {
    if (key != expected) break;
    if (++expected.dp == counts.dp) expected = {.mp = expected.mp + 1, .dp = 0};
  }
  if (expected.mp != counts.mp) {
    return absl::DataLossError(
        absl::StrFormat("%s: expected %d x %d files, found none of data-parallel rank %d, "
                        "model-parallel rank %d",
                        std::string(what), counts.dp, counts.mp, expected.dp, expected.mp));
  }
  return counts;
}

bool HoldsDeepSpeed(const ForeignFolder& folder) {
  return !folder.single_file() && !CheckpointDirectories(folder).empty();
}

bool HoldsUniversal(const ForeignFolder& folder) {
  if (folder.single_file()) return false;
  const auto directories = CheckpointDirectories(folder);
  const auto newest = NewestDirectory(folder, directories);
  if (!newest.ok()) return false;
  const auto found = directories.find(*newest);
  return found != directories.end() && found->second.universal;
}

absl::StatusOr<DeepSpeedFiles> FindDeepSpeedFiles(const ForeignFolder& folder,
                                                  const std::string& tag) {
  const auto directories = CheckpointDirectories(folder);
  DeepSpeedFiles files;
  if (tag.empty()) {
    ASSIGN_OR_RETURN(files.directory, NewestDirectory(folder, directories));
  } else {
    files.directory = tag;
    if (!directories.contains(tag)) {
      std::vector<std::string> tags;
      for (const auto& [directory, what] : directories) {
        if (!directory.empty() && tags.size() < kTagsShownMax) tags.push_back(directory);
      }
      return absl::NotFoundError(
          absl::StrFormat("no checkpoint with the tag \"%s\"; there are: %s", tag,
                          tags.empty() ? "none with a tag" : absl::StrJoin(tags, ", ")));
    }
  }
  const auto what = directories.find(files.directory);
  if (what == directories.end()) return absl::NotFoundError("no DeepSpeed checkpoint");
  files.universal = what->second.universal;
  files.tag = files.directory;
  for (uint32_t file : folder.FilesIn(files.directory)) {
    const std::string_view base = BaseName(folder.files()[file].path);
    const auto name = ParseDeepSpeedFileName(base);
    if (!name.has_value()) continue;
    switch (name->role) {
      case DeepSpeedFileName::Role::kModel:
        files.models[name->mp] = file;
        break;
      case DeepSpeedFileName::Role::kPartitionedModel:
        files.partitioned_models[{.mp = name->mp, .dp = name->dp}] = file;
        break;
      case DeepSpeedFileName::Role::kOptimizer:
        if (!files.optimizers.emplace(RankKey{.mp = name->mp, .dp = name->dp}, file).second) {
          return absl::DataLossError(absl::StrFormat(
              "%s: another file is of data-parallel rank %d, model-parallel rank %d too",
              folder.files()[file].path, name->dp, name->mp));
        }
        break;
      case DeepSpeedFileName::Role::kLayer:
        files.layers[{.layer = name->layer, .tp = name->mp}] = file;
        break;
      case DeepSpeedFileName::Role::kExpert:
        files.experts[{.layer = name->layer, .expert = name->expert, .mp = name->mp}] = file;
        break;
      case DeepSpeedFileName::Role::kExpertOptimizer:
        files.expert_optimizers[{.mp = name->mp, .dp = name->dp}] = file;
        break;
    }
  }
  return files;
}

}  // namespace holdfast::converter
