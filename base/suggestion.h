// "Did you mean": the nearest of the known names, for errors about an unknown one.
#ifndef HOLDFAST_BASE_SUGGESTION_H_
#define HOLDFAST_BASE_SUGGESTION_H_

#include <span>
#include <string>
#include <string_view>

namespace holdfast {

// `; did you mean "shape"?` if one of `known` is near `unknown` (an edit distance of at most a
// third of its length, and of at most 3; capitals do not count), else the empty string. Never more
// than 64 bytes of a name are compared.
std::string DidYouMean(std::string_view unknown, std::span<const std::string_view> known);

}  // namespace holdfast

#endif  // HOLDFAST_BASE_SUGGESTION_H_
