// What a checkpoint has beside tensors, and a format has no place for: a conversion refuses it by
// name, or leaves it out with `--drop objects`.
#ifndef HOLDFAST_CONVERTER_NON_TENSORS_H_
#define HOLDFAST_CONVERTER_NON_TENSORS_H_

#include <functional>
#include <string>
#include <vector>

#include "converter/foreign_index.h"

namespace holdfast::converter {

// In words, some by name: {"lr_scheduler, seed and 3 more", "2 opaque objects (rng_state, ...)"}.
// Empty: there is nothing, but what `has_place` says of the scalars.
std::vector<std::string> NonTensorsWithoutPlace(const ForeignIndex& index,
                                                const std::function<bool(const Fact&)>& has_place);

// Whether it is ForeignIndex::step by one of the names that files have it under.
bool IsStep(const Fact& fact, const ForeignIndex& index);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_NON_TENSORS_H_
