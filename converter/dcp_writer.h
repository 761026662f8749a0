// Writes a checkpoint as a folder of torch.distributed.checkpoint: what dcp.load reads into any
// layout. Every tensor state is one chunk, whole, in .distcp files of torch archives; weights have
// the keys "model.<name>", optimizer states "optim.state.<name>.<state>", as get_state_dict gives
// them, and other tensors their own names.
//
// Objects that are no tensors are kept where the source is DCP too (they are pickles of PyTorch's
// there); from other sources they cannot be made without running Python, and are left out: who
// loads an optimizer gives DefaultLoadPlanner(allow_partial_load=True).
#ifndef HOLDFAST_CONVERTER_DCP_WRITER_H_
#define HOLDFAST_CONVERTER_DCP_WRITER_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "converter/conversion_source.h"
#include "converter/foreign_index.h"
#include "converter/output_files.h"
#include "io/file_system.h"

namespace holdfast::converter {

struct DcpWriteOptions {
  uint64_t file_bytes = 5'000'000'000;  // a file that has more begins another one
};

// One item of a file, in the order of their bytes.
struct DcpPlannedItem {
  uint32_t file = 0;    // index into DcpPlan::files
  bool object = false;  // number is of ForeignIndex::blobs, else of tensor_states
  uint32_t number = 0;
};

struct DcpPlan {
  struct File {
    std::string name;
    uint64_t bytes = 0;
  };
  std::vector<File> files;
  std::vector<DcpPlannedItem> items;
  std::string metadata;               // the contents of .metadata
  uint64_t bytes = 0;                 // of all files
  std::vector<std::string> left_out;  // in words
};

// Errors: kFailedPrecondition: two tensors that would have one key.
absl::StatusOr<DcpPlan> PlanDcp(const ForeignIndex& index, const DcpWriteOptions& options);

// Writes all files of the plan into `directory`, which exists and has none of them; .metadata last.
// `source` has the index of the plan. After OK they are durable; their names are not.
absl::Status WriteDcp(FileSystem& file_system, const std::string& directory,
                      ConversionSource& source, const DcpPlan& plan,
                      const ConversionProgress& progress);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_DCP_WRITER_H_
