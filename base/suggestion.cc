#include "base/suggestion.h"

#include <algorithm>
#include <array>
#include <cstddef>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"

namespace holdfast {
namespace {

constexpr size_t kComparedBytesMax = 64;

// Levenshtein's distance, two rows.
size_t EditDistance(std::string_view a, std::string_view b) {
  std::array<size_t, kComparedBytesMax + 1> row;
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const bool equal = absl::ascii_tolower(static_cast<unsigned char>(a[i - 1])) ==
                         absl::ascii_tolower(static_cast<unsigned char>(b[j - 1]));
      const size_t replaced = diagonal + (equal ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({replaced, row[j] + 1, row[j - 1] + 1});
    }
  }
  return row[b.size()];
}

}  // namespace

std::string DidYouMean(std::string_view unknown, std::span<const std::string_view> known) {
  const std::string_view asked = unknown.substr(0, kComparedBytesMax);
  size_t nearest_distance = std::min<size_t>(3, std::max<size_t>(1, asked.size() / 3)) + 1;
  std::string_view nearest;
  for (std::string_view name : known) {
    const size_t distance = EditDistance(asked, name.substr(0, kComparedBytesMax));
    if (distance < nearest_distance) {
      nearest_distance = distance;
      nearest = name;
    }
  }
  if (nearest.empty()) return "";
  return absl::StrCat("; did you mean \"", std::string(nearest), "\"?");
}

}  // namespace holdfast
