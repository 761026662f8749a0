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
#include "converter/dcp_metadata.h"
#include "converter/foreign_index.h"
#include "converter/output_files.h"
#include "format/dtype.h"
#include "io/file_system.h"

namespace holdfast::converter {

struct DcpWriteOptions {
  uint64_t file_bytes = 5'000'000'000;  // a file that has more begins another one
};

// One item of a file, in the order of their bytes.
struct DcpPlannedItem {
  enum class Kind : uint8_t { kTensor, kBlob, kGiven };
  uint32_t file = 0;  // index into DcpPlan::files
  Kind kind = Kind::kTensor;
  uint32_t number = 0;  // of ForeignIndex::tensor_states, of its blobs, or of DcpPlan::given
  // Of tensors: cast to this dtype (IsCastable, if it is another one), and with as many dimensions
  // of 1 before its own.
  Dtype dtype = Dtype::kFloat32;
  uint32_t leading_axes = 0;
};

struct DcpPlan {
  struct File {
    std::string name;
    uint64_t bytes = 0;
  };
  std::vector<File> files;
  std::vector<DcpPlannedItem> items;
  std::vector<std::string> given;     // objects, as torch.save would have written them
  std::string metadata;               // the contents of .metadata
  uint64_t bytes = 0;                 // of all files
  std::vector<std::string> left_out;  // in words
};

// A plan in the making: gives items their places in files, one behind the other.
//
// Threads: one. Lifetime: the index outlives it.
class DcpPlanBuilder {
 public:
  DcpPlanBuilder(const ForeignIndex& index, const DcpWriteOptions& options);

  DcpMetadata& metadata() { return metadata_; }
  // The number of the new item of the metadata. Its file need not be filled in.
  uint32_t Add(DcpPlannedItem item);
  uint32_t AddGiven(std::string object);
  // Encodes the metadata.
  DcpPlan Finish() &&;

 private:
  const ForeignIndex& index_;
  const DcpWriteOptions options_;
  DcpMetadata metadata_;
  DcpPlan plan_;
};

// Errors: kFailedPrecondition: two tensors that would have one key.
absl::StatusOr<DcpPlan> PlanDcp(const ForeignIndex& index, const DcpWriteOptions& options);

// Writes all files of the plan into `directory`, which exists and has none of them; .metadata last.
// `source` has the index of the plan. After OK they are durable; their names are not.
absl::Status WriteDcp(FileSystem& file_system, const std::string& directory,
                      ConversionSource& source, const DcpPlan& plan,
                      const ConversionProgress& progress);
// The same among other files; `prefix` ("iter_0000007/") is put before the names.
absl::Status WriteDcpFiles(OutputFiles& files, const std::string& prefix, ConversionSource& source,
                           const DcpPlan& plan);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_DCP_WRITER_H_
