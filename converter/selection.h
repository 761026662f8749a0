// What of a checkpoint a conversion writes, under which names and in which dtypes: what all writers
// share, so that none of them knows an option.
#ifndef HOLDFAST_CONVERTER_SELECTION_H_
#define HOLDFAST_CONVERTER_SELECTION_H_

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "converter/foreign_index.h"
#include "converter/mapping.h"
#include "format/dtype.h"

namespace holdfast::converter {

// KIND of `--drop` that is no state.
inline constexpr char kDropUnreadable[] = "unreadable";
inline constexpr char kDropObjects[] = "objects";  // what is no tensor (converter/non_tensors.h)
inline constexpr char kDropNoWeights[] = "*";      // objects too
inline constexpr char kDropUnmapped[] = "unmapped";
inline constexpr char kDropLost[] = "lost";  // ForeignIndex::losses

struct SelectionRequest {
  std::vector<std::string> only =
      {};                   // patterns of names (format/name_pattern.h); empty: all tensors
  std::string rename = {};  // the contents of a file of rules (converter/rename_rules.h)
  std::vector<std::string> drop = {};  // states, and the kinds above
  // Makes other tensors of what is chosen and renamed (converter/model_families.h).
  using Mapping = std::function<absl::Status(ForeignIndex& index, Unmapped unmapped,
                                             std::vector<std::string>& left_out)>;
  Mapping map = {};
  // "bfloat16": weights and buffers (states param, buffer, tensor, other, ema); "exp_avg=float16":
  // one state. Only floating tensors of 16 to 64 bits are cast, whatever is asked.
  std::vector<std::string> dtypes = {};
};

// Whether what is no tensor may be left out.
bool DropsObjects(const SelectionRequest& request);

struct Selection {
  ForeignIndex index;                 // what is written, under its new names
  std::vector<Dtype> dtypes;          // by tensor state: as written
  std::vector<std::string> left_out;  // in words
  std::vector<std::string> casts;     // in words: "27 tensors from float32 to bfloat16"
};

// Errors: kInvalidArgument (a pattern, rule, state or dtype that is none, or fits nothing; with the
// nearest known word), kFailedPrecondition (two tensors would have one name; what is unreadable and
// not dropped), kDataLoss (something of the checkpoint is lost, and not dropped).
absl::StatusOr<Selection> Select(ForeignIndex index, const SelectionRequest& request);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_SELECTION_H_
