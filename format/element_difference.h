// How far apart two runs of elements are, bit by bit and as numbers.
#ifndef HOLDFAST_FORMAT_ELEMENT_DIFFERENCE_H_
#define HOLDFAST_FORMAT_ELEMENT_DIFFERENCE_H_

#include <cstddef>
#include <cstdint>
#include <span>

#include "format/dtype.h"

namespace holdfast {

// What is known of the elements that differ in their bits. -0.0 and 0.0 differ, by 0; two NaN with
// different payloads differ.
struct ElementDifferences {
  static constexpr uint64_t kNone = UINT64_MAX;

  uint64_t count = 0;
  uint64_t first = kNone;  // number of the first of them
  // Those of them that are NaN or infinite on at least one side: they count in no maximum.
  uint64_t non_finite_count = 0;
  // Of the others: the largest |a - b| (an integer is rounded to a double; at most the largest
  // finite double), and for floating types the largest |a - b| / max(|a|, |b|), 0 to 2. Of complex
  // numbers real and imaginary parts are compared each for itself.
  double max_absolute = 0;
  double max_relative = 0;

  // Joins what two runs have.
  ElementDifferences& operator+=(const ElementDifferences& other);
};

// Of equally long runs of whole elements of one dtype, little-endian, at any address. The first
// element of both has the number `first_element`.
ElementDifferences CompareElements(Dtype dtype, std::span<const std::byte> a,
                                   std::span<const std::byte> b, uint64_t first_element);

}  // namespace holdfast

#endif  // HOLDFAST_FORMAT_ELEMENT_DIFFERENCE_H_
