// What `--names FILE` supplies: names that the files of a checkpoint do not hold. JSON:
//
//   {"parameters": ["emb.weight", "head.weight", ...],
//    "units": [{"unit": "blocks.0",
//               "pieces": [{"name": "blocks.0.up.weight", "shape": [38, 20]}, {"padding": 3},
//               ...]}]}
//
// `parameters`: what the numbers mean under which optimizer.state_dict() keeps its states: the
// names of the optimizer's parameters in the order of its groups, frozen ones counted.
//   [n for n, p in model.named_parameters()], if the optimizer was made of model.parameters().
// `units`: FSDP1's flat parameters: the parameters of each wrapped module, in their order, with the
// padding between them (use_orig_params=True aligns each to 16 bytes). A piece may say its `offset`
// (elements from the unit's beginning); then no padding needs to be listed. The root's `unit` is
// "". The order of the units is that of the flat parameters in the optimizer.
//
// Both are optional; other members are ignored.
#ifndef HOLDFAST_CONVERTER_NAMES_FILE_H_
#define HOLDFAST_CONVERTER_NAMES_FILE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace holdfast::converter {

// A parameter in the row-major order of its flat parameter.
struct FlatPiece {
  std::string name;
  std::vector<uint64_t> shape;
  uint64_t offset = 0;  // elements from the unit's beginning
  uint64_t count = 0;   // elements
};

struct FlatUnit {
  std::string unit;               // the wrapped module; "": the root
  std::vector<FlatPiece> pieces;  // by offset, disjoint
  uint64_t end = 0;               // of the last piece, in elements

  // The key of the flat parameter in a state dictionary of the model.
  std::string Key() const { return unit.empty() ? "_flat_param" : unit + "._flat_param"; }
};

struct NamesFile {
  std::vector<std::string> parameters;
  std::vector<FlatUnit> units;
};

// `json`: ReadOptions::names; "" gives no names. Errors: kInvalidArgument with the JSON path.
absl::StatusOr<NamesFile> ParseNamesFile(std::string json);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_NAMES_FILE_H_
