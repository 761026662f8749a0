// What the oracle's two halves share: local tensors as explicit arrays, and what operations do to
// them. The lowering is in layout_oracle.cc, random documents and their JSON in
// layout_oracle_random.cc.
#ifndef HOLDFAST_FORMAT_LAYOUT_ORACLE_LOCAL_H_
#define HOLDFAST_FORMAT_LAYOUT_ORACLE_LOCAL_H_

#include <cstdint>
#include <optional>
#include <vector>

#include "format/layout_oracle.h"

namespace holdfast::oracle {

inline constexpr uint64_t kPadding = UINT64_MAX;

// A local tensor: the global element numbers, row-major, with the local shape; or padding.
struct Local {
  std::vector<uint64_t> shape;
  std::vector<uint64_t> elements;
};

uint64_t Volume(const std::vector<uint64_t>& shape);
// Of several axes together.
uint64_t SizeOf(const Mesh& mesh, const std::vector<size_t>& axes);

// Indices 0..n-1 dealt to k hands, in order; nothing if the rule does not fit.
std::optional<std::vector<std::vector<uint64_t>>> Deal(const Op& op, uint64_t n, uint64_t k);
Local Select(const Local& local, size_t dim, const std::vector<uint64_t>& indices);
// False: it does not fit.
bool View(const Op& op, Local& local);
bool Perm(const Op& op, Local& local);
bool Pad(const Mesh& mesh, const Op& op, Local& local);

}  // namespace holdfast::oracle

#endif  // HOLDFAST_FORMAT_LAYOUT_ORACLE_LOCAL_H_
