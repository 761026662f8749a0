// Which file of a Megatron-LM checkpoint is what, from the names alone: the iteration that counts,
// and whether it is a legacy folder (one directory per model-parallel rank) or a torch_dist one
// (DCP files, with Megatron's keys in them).
//
//   latest_checkpointed_iteration.txt            "1000" or "release"
//   iter_0001000/mp_rank_00_001/model_optim_rng.pt, distrib_optim.pt          legacy
//   iter_0001000/.metadata, metadata.json, common.pt, __0_0.distcp            torch_dist
//   iter_0001000/.metadata, __0_0.distcp                                      fsdp_dtensor
//
// Names: Megatron-LM training/checkpointing.py (get_checkpoint_name, save_checkpoint).
#ifndef HOLDFAST_CONVERTER_MEGATRON_FILES_H_
#define HOLDFAST_CONVERTER_MEGATRON_FILES_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "converter/foreign_folder.h"

namespace holdfast::converter {

// `mp_rank_00_001_003`: one to three numbers, of which the first is the tensor-parallel rank. Two
// say nothing of whether the second is a pipeline stage or an expert-parallel rank: the arguments
// inside of the file do. Nothing for another name.
std::optional<std::vector<uint32_t>> ParseMegatronRank(std::string_view name);

struct MegatronRankFiles {
  std::string directory;                   // "mp_rank_00_001"
  std::vector<uint32_t> numbers;           // 1 to 3
  uint32_t model = 0;                      // model_optim_rng.pt
  std::optional<uint32_t> optimizer = {};  // distrib_optim.pt
};

struct MegatronFiles {
  enum class Kind : uint8_t { kLegacy, kTorchDist, kFsdpDTensor };
  Kind kind = Kind::kLegacy;
  std::string directory = {};  // of the iteration, relative to the folder; "": the folder itself
  std::string tag = {};        // its last component; empty: unknown
  std::vector<MegatronRankFiles> ranks = {};  // kLegacy, by name
  std::optional<uint32_t> metadata = {};      // `.metadata`, of the others
  std::optional<uint32_t> common = {};        // common.pt
  std::optional<uint32_t> json = {};          // metadata.json
};

// Whether the folder is one iteration, or holds at least one. Reads the first bytes of `.metadata`
// where nothing else tells a folder from a plain DCP one. Errors: those of reading.
absl::StatusOr<bool> HoldsMegatron(const ForeignFolder& folder);

// The files of `tag` ("iter_0001000", "1000" or "release"); without one: of the folder itself, of
// what latest_checkpointed_iteration.txt says, or of the greatest iteration. Errors: kNotFound (no
// such tag; the text lists those there are), kDataLoss (the file names none that is there).
absl::StatusOr<MegatronFiles> FindMegatronFiles(const ForeignFolder& folder,
                                                const std::string& tag);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_MEGATRON_FILES_H_
