// Which files of a folder are the ranks' files of one FSDP job, by their names. Nobody prescribes
// them; these are the habits of those who save so:
//
//   model_world_size_4_rank_0.pt    verl; also optim_ and extra_state_
//   pytorch_model_fsdp_rank0.bin    accelerate, LOCAL_STATE_DICT
//   pytorch_model_fsdp.bin, optimizer.bin   accelerate, FULL_STATE_DICT: one file of everything
//
// A group is what differs in the number behind `rank` only; it is complete if the ranks are 0 to
// world size - 1.
#ifndef HOLDFAST_CONVERTER_FSDP_FILES_H_
#define HOLDFAST_CONVERTER_FSDP_FILES_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "converter/foreign_folder.h"

namespace holdfast::converter {

struct FsdpFile {
  uint32_t file = 0;  // in the folder
  uint32_t rank = 0;
};

struct FsdpGroup {
  // What the files hold: parameters and buffers; optimizer states; each rank's own (RNG, position
  // of the data loader).
  enum class Content : uint8_t { kModel, kOptimizer, kRankLocal };
  Content content = Content::kModel;
  std::string name = {};             // of the files without the rank: "model_world_size_4"
  std::vector<FsdpFile> files = {};  // by rank, 0 to files.size() - 1
};

// Groups of the folder (none: it is not of this kind), the model's first, then the optimizer's.
// Errors: kDataLoss (a rank is missing, by name).
absl::StatusOr<std::vector<FsdpGroup>> FindFsdpGroups(const ForeignFolder& folder);
// Whether there are any, complete or not.
bool HasFsdpGroups(const ForeignFolder& folder);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_FSDP_FILES_H_
