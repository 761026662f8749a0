#include "converter/pipeline_stages.h"

#include <algorithm>
#include <cstddef>
#include <limits>

#include "absl/strings/ascii.h"
#include "absl/strings/str_format.h"
#include "base/check.h"

namespace holdfast::converter {
namespace {

constexpr uint64_t kSearchStepsMax = uint64_t{1} << 31;

}  // namespace

std::optional<PipelineName> ParsePipelineName(std::string_view name) {
  PipelineName parsed;
  if (name.starts_with(kTiedModules)) {
    const std::string_view below = name.substr(std::string_view(kTiedModules).size());
    const size_t dot = below.find('.');
    if (dot == std::string_view::npos || dot == 0 || dot + 1 == below.size()) return std::nullopt;
    parsed.tied = below.substr(0, dot);
    parsed.rest = below.substr(dot + 1);
    return parsed;
  }
  uint64_t layer = 0;
  size_t end = 0;
  while (end < name.size() && absl::ascii_isdigit(static_cast<unsigned char>(name[end])) &&
         layer < kPipelineLayersMax) {
    layer = layer * 10 + static_cast<uint64_t>(name[end++] - '0');
  }
  const bool plain = end == 1 || name.front() != '0';  // str() of a number
  if (end == 0 || !plain || layer >= kPipelineLayersMax || end + 1 >= name.size() ||
      name[end] != '.') {
    return std::nullopt;
  }
  parsed.layer = layer;
  parsed.rest = name.substr(end + 1);
  return parsed;
}

// Of all ways to cut the layers into runs, the one whose heaviest and lightest runs differ least;
// of several the one that is found last, as partition_balanced has it. In its doubles, too.
absl::StatusOr<std::vector<uint64_t>> BalancedStages(std::span<const uint64_t> weights,
                                                     uint64_t stages) {
  CHECK(stages > 0);
  const size_t n = weights.size();
  std::vector<uint64_t> first(stages);
  if (n <= stages) {
    for (uint64_t stage = 0; stage < stages; ++stage) first[stage] = std::min<uint64_t>(stage, n);
    return first;
  }
  const size_t m = stages;
  if (n * n / 2 > kSearchStepsMax / m) {
    return absl::ResourceExhaustedError(absl::StrFormat(
        "%d layers on %d stages: too many ways to cut them; the layout file's \"stages\" says "
        "which",
        n, m));
  }
  constexpr double kNever = std::numeric_limits<double>::infinity();
  struct Best {
    double most = kNever;
    double least = kNever;
    double cost = kNever;
    size_t from = 0;
  };
  std::vector<Best> best((n + 1) * (m + 1));
  const auto at = [&](size_t layers, size_t parts) -> Best& {
    return best[layers * (m + 1) + parts];
  };
  at(0, 0).most = 0;
  at(0, 0).cost = 0;
  std::vector<double> sums(n + 1);
  for (size_t i = 0; i < n; ++i) sums[i + 1] = sums[i] + static_cast<double>(weights[i]);
  for (size_t i = 1; i <= n; ++i) {
    for (size_t j = 1; j <= std::min(i, m); ++j) {
      for (size_t k = 0; k < i; ++k) {
        const double most = std::max(at(k, j - 1).most, sums[i] - sums[k]);
        const double least = std::min(at(k, j - 1).least, sums[i] - sums[k]);
        if (at(i, j).cost >= most - least) {
          at(i, j) = {.most = most, .least = least, .cost = most - least, .from = k};
        }
      }
    }
  }
  size_t end = n;
  for (size_t stage = m; stage-- > 0;) {
    end = at(end, stage + 1).from;
    first[stage] = end;
  }
  return first;
}

}  // namespace holdfast::converter
