#include "converter/flat_parameters.h"

#include <algorithm>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"

namespace holdfast::converter {

FlatParameters::FlatParameters(const NamesFile& names, ForeignIndex& index)
    : names_(names), index_(index) {
  for (size_t u = 0; u < names_.units.size(); ++u) {
    unit_of_key_[names_.units[u].Key()] = u;
    for (size_t p = 0; p < names_.units[u].pieces.size(); ++p) {
      place_of_name_[names_.units[u].pieces[p].name] = {u, p};
    }
  }
}

const FlatUnit* FlatParameters::Find(std::string_view key) const {
  const auto found = unit_of_key_.find(std::string(key));
  return found == unit_of_key_.end() ? nullptr : &names_.units[found->second];
}

std::pair<const FlatUnit*, const FlatPiece*> FlatParameters::FindPiece(
    std::string_view name) const {
  const auto found = place_of_name_.find(std::string(name));
  if (found == place_of_name_.end()) return {nullptr, nullptr};
  const FlatUnit& unit = names_.units[found->second.first];
  return {&unit, &unit.pieces[found->second.second]};
}

absl::StatusOr<uint32_t> FlatParameters::StateOf(const std::string& name, const std::string& state,
                                                 const std::vector<uint64_t>& shape,
                                                 const TorchFile& torch,
                                                 const TorchTensor& tensor) {
  const auto [known, added] = state_of_.try_emplace({name, state}, 0);
  if (added) known->second = index_.AddState({name, state, tensor.dtype, shape});
  const TensorState& first = index_.tensor_states[known->second];
  if (first.dtype != tensor.dtype || first.shape != shape) {
    return absl::DataLossError(absl::StrFormat(
        "%s: %s: expected dtype %s and shape [%s], as another rank has, found %s and [%s]",
        torch.name(), Describe(first), DtypeName(first.dtype), absl::StrJoin(first.shape, ", "),
        DtypeName(tensor.dtype), absl::StrJoin(shape, ", ")));
  }
  return known->second;
}

absl::Status FlatParameters::AddSlice(const FlatUnit& unit, const std::string& state,
                                      uint64_t begin, const TorchFile& torch,
                                      const TorchTensor& tensor, const TorchPlace& place) {
  if (tensor.shape.size() != 1 || !tensor.IsContiguous()) {
    return absl::DataLossError(absl::StrFormat(
        "%s: %s of %s: expected a contiguous tensor of one dimension, found shape [%s]",
        torch.name(), state, unit.Key(), absl::StrJoin(tensor.shape, ", ")));
  }
  const uint64_t end = begin + tensor.shape[0];
  for (const FlatPiece& piece : unit.pieces) {
    const uint64_t lo = std::max(begin, piece.offset);
    const uint64_t hi = std::min(end, piece.offset + piece.count);
    if (lo >= hi) continue;
    ASSIGN_OR_RETURN(const uint32_t number, StateOf(piece.name, state, piece.shape, torch, tensor));
    RETURN_IF_ERROR(
        AddFlatRange(torch, tensor, place, lo - begin, number, lo - piece.offset, hi - lo, index_));
  }
  return absl::OkStatus();
}

absl::Status FlatParameters::AddShared(const FlatUnit& unit, const std::string& state,
                                       const TorchFile& torch, const TorchTensor& tensor,
                                       const TorchPlace& place) {
  for (const FlatPiece& piece : unit.pieces) {
    RETURN_IF_ERROR(AddShared(piece, state, torch, tensor, place));
  }
  return absl::OkStatus();
}

absl::Status FlatParameters::AddShared(const FlatPiece& piece, const std::string& state,
                                       const TorchFile& torch, const TorchTensor& tensor,
                                       const TorchPlace& place) {
  ASSIGN_OR_RETURN(const uint32_t number, StateOf(piece.name, state, tensor.shape, torch, tensor));
  return AddWholeShard(torch, tensor, place, number, index_);
}

}  // namespace holdfast::converter
