// FSDP1's flat parameters: the parameters of a wrapped module, one behind the other in a buffer
// that is cut evenly over the ranks. Names and shapes are not in the files; NamesFile::units has
// them.
#ifndef HOLDFAST_CONVERTER_FLAT_PARAMETERS_H_
#define HOLDFAST_CONVERTER_FLAT_PARAMETERS_H_

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "converter/foreign_index.h"
#include "converter/names_file.h"
#include "converter/shard_pieces.h"
#include "converter/torch_file.h"

namespace holdfast::converter {

// Threads: one. Lifetime: the names and the index outlive it.
class FlatParameters {
 public:
  FlatParameters(const NamesFile& names, ForeignIndex& index);

  bool empty() const { return names_.units.empty(); }
  // The unit whose flat parameter has this key in the model's dictionary; null if none.
  const FlatUnit* Find(std::string_view key) const;
  const std::vector<FlatUnit>& units() const { return names_.units; }
  // The unit and number of the piece of this name; nulls if none.
  std::pair<const FlatUnit*, const FlatPiece*> FindPiece(std::string_view name) const;

  // A contiguous tensor of one dimension has elements [begin, begin + count) of the unit, of which
  // whatever lies in a piece becomes an element of that piece's `state`. What is beyond the pieces
  // is padding. Errors: kDataLoss (not of one dimension; another dtype than another rank has).
  absl::Status AddSlice(const FlatUnit& unit, const std::string& state, uint64_t begin,
                        const TorchFile& torch, const TorchTensor& tensor, const TorchPlace& place);
  // A whole tensor (of no dimensions: Adam's step) that belongs to every parameter of the unit.
  absl::Status AddShared(const FlatUnit& unit, const std::string& state, const TorchFile& torch,
                         const TorchTensor& tensor, const TorchPlace& place);
  // The same for one parameter.
  absl::Status AddShared(const FlatPiece& piece, const std::string& state, const TorchFile& torch,
                         const TorchTensor& tensor, const TorchPlace& place);

 private:
  absl::StatusOr<uint32_t> StateOf(const std::string& name, const std::string& state,
                                   const std::vector<uint64_t>& shape, const TorchFile& torch,
                                   const TorchTensor& tensor);

  const NamesFile& names_;
  ForeignIndex& index_;
  std::unordered_map<std::string, size_t> unit_of_key_;
  std::unordered_map<std::string, std::pair<size_t, size_t>> place_of_name_;  // unit, piece
  std::map<std::pair<std::string, std::string>, uint32_t> state_of_;          // (tensor, state)
};

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_FLAT_PARAMETERS_H_
