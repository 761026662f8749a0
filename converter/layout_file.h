// What `--layout-file FILE` says: how tensor-parallel ranks have cut each parameter, for a
// checkpoint whose producer wrote nothing of it. JSON; docs/CONVERTER_DEEPSPEED.md has examples:
//
//   {"rules": [{"parameters": ".*\\.qkv\\.weight", "cut": 0, "blocks": [64, 16, 16]},
//              {"parameters": ".*norm", "cut": "replicated"},
//              {"parameters": "embed\\.weight", "cut": 0, "rows": 50257}],
//    "pipeline_replicated": ["embed\\.weight"]}
//
// `parameters`: a pattern (Python's, matched at the beginning of the name). The first rule that
//   matches counts. Rules come before what the checkpoint or a preset says; a parameter on several
//   ranks of which nobody says anything is refused.
// `cut`: the dimension along which its shards are joined, or "replicated".
// `blocks`: sub-tensors that stand one behind the other along that dimension, each of which was cut
//   alone (q, k and v; the halves of a gated MLP): their sizes in the whole parameter, or the
//   number of equal ones. Every size is a multiple of the number of ranks.
// `rows`: so many rows of dimension 0 are the parameter, the rest is padding (a vocabulary).
// `pipeline_replicated`: patterns of parameters that several pipeline stages hold.
// `pipeline`: of a pipeline that is written (converter/deepspeed_writer.h):
//   {"stages": [0, 4], "tied": {"embed": [0, 7]}}
//   `stages`: the first layer of every stage, ascending from 0; without it as many parameters on
//     each as possible, which is DeepSpeed's default.
//   `tied`: of every tied module the layers that use it.
#ifndef HOLDFAST_CONVERTER_LAYOUT_FILE_H_
#define HOLDFAST_CONVERTER_LAYOUT_FILE_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "converter/parallel_rules.h"

namespace holdfast::converter {

inline constexpr size_t kLayoutBlocksMax = 1024;  // of one rule

struct LayoutFile {
  std::vector<ShardRule> rules;
  std::vector<std::string> pipeline_replicated;
  std::vector<uint64_t> stages;                       // first layers; empty: not said
  std::map<std::string, std::vector<uint64_t>> tied;  // layers, ascending, by key
};

// `json`: ReadOptions::layout; "" says nothing. Patterns are compiled later, by ParallelRules.
// Errors: kInvalidArgument with the JSON path; of an unknown word with the nearest known one.
absl::StatusOr<LayoutFile> ParseLayoutFile(std::string json);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_LAYOUT_FILE_H_
