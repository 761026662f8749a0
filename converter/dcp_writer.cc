#include "converter/dcp_writer.h"

#include <span>
#include <string_view>
#include <unordered_set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "base/zip_crc32.h"
#include "converter/dcp_encoding.h"
#include "converter/dcp_metadata.h"
#include "converter/non_tensors.h"
#include "converter/tensor_archive.h"

namespace holdfast::converter {
namespace {

constexpr std::string_view kMetadataName = ".metadata";

// The way to a tensor state in the nested dictionary that get_state_dict makes.
std::vector<std::string> PathOf(const TensorState& state) {
  if (state.state == "param" || state.state == "buffer" || state.state == "tensor") {
    return {"model", state.tensor};
  }
  if (state.state == "other") return {state.tensor};
  if (state.state == "ema" || state.state == "rng") return {state.state, state.tensor};
  return {"optim", "state", state.tensor, state.state};
}

class Planner {
 public:
  Planner(const ForeignIndex& index, const DcpWriteOptions& options)
      : index_(index), options_(options) {}

  absl::StatusOr<DcpPlan> Run() {
    metadata_.version = "1.0.0";
    metadata_.transforms.emplace_back();
    RETURN_IF_ERROR(AddObjects());  // before the tensors, as PyTorch
    for (uint32_t i = 0; i < index_.tensor_states.size(); ++i) RETURN_IF_ERROR(AddTensor(i));
    plan_.metadata = EncodeDcpMetadata(metadata_);
    plan_.bytes += plan_.metadata.size();
    return std::move(plan_);
  }

 private:
  absl::Status AddObjects() {
    if (index_.format != "dcp") {
      plan_.left_out = NonTensorsWithoutPlace(index_, [](const Fact&) { return false; });
      return absl::OkStatus();
    }
    for (uint32_t i = 0; i < index_.blobs.size(); ++i) {
      const ForeignBlob& blob = index_.blobs[i];
      RETURN_IF_ERROR(TakeKey(blob.name));
      const uint32_t item = AddItem(index_.extents[blob.extent].decoded_bytes, true, i);
      metadata_.objects.push_back({.key = blob.name, .item = item});
    }
    return absl::OkStatus();
  }

  absl::Status AddTensor(uint32_t number) {
    const TensorState& state = index_.tensor_states[number];
    DcpTensor tensor{.path = PathOf(state),
                     .dtype = std::string(DtypeName(state.dtype)),
                     .shape = state.shape,
                     .chunks_begin = metadata_.chunks.size(),
                     .chunks_end = metadata_.chunks.size() + 1};
    tensor.key = absl::StrJoin(tensor.path, ".");
    RETURN_IF_ERROR(TakeKey(tensor.key));
    const uint64_t bytes = TensorArchive(state.dtype, state.shape).bytes();
    metadata_.chunks.push_back(
        {.offsets = metadata_.numbers.size(), .item = AddItem(bytes, false, number)});
    metadata_.numbers.insert(metadata_.numbers.end(), state.shape.size(), 0);
    metadata_.numbers.insert(metadata_.numbers.end(), state.shape.begin(), state.shape.end());
    metadata_.tensors.push_back(std::move(tensor));
    return absl::OkStatus();
  }

  absl::Status TakeKey(const std::string& key) {
    if (keys_.insert(key).second) return absl::OkStatus();
    return absl::FailedPreconditionError(absl::StrFormat(
        "two tensors or objects would have the key %s; --drop a state, or rename one",
        JsonQuote(key)));
  }

  uint32_t AddItem(uint64_t bytes, bool object, uint32_t number) {
    if (plan_.files.empty() || plan_.files.back().bytes >= options_.file_bytes) {
      plan_.files.push_back({.name = absl::StrCat("__0_", plan_.files.size(), ".distcp")});
      metadata_.files.push_back(plan_.files.back().name);
    }
    DcpPlan::File& file = plan_.files.back();
    const auto file_number = static_cast<uint32_t>(plan_.files.size() - 1);
    metadata_.items.push_back(
        {.file = file_number, .offset_bytes = file.bytes, .stored_bytes = bytes});
    plan_.items.push_back({.file = file_number, .object = object, .number = number});
    file.bytes += bytes;
    plan_.bytes += bytes;
    return static_cast<uint32_t>(metadata_.items.size() - 1);
  }

  const ForeignIndex& index_;
  const DcpWriteOptions& options_;
  std::unordered_set<std::string> keys_;
  DcpMetadata metadata_;
  DcpPlan plan_;
};

absl::Status WriteTensor(ConversionSource& source, uint32_t number, OutputFiles& files) {
  const TensorState& state = source.index().tensor_states[number];
  const TensorArchive archive(state.dtype, state.shape);
  RETURN_IF_ERROR(files.Append(archive.head()));
  uint32_t crc32 = 0;
  RETURN_IF_ERROR(source.Read(number, [&](std::span<const std::byte> bytes) {
    crc32 = ExtendZipCrc32(crc32, bytes);
    return files.Append(bytes);
  }));
  return files.Append(archive.Tail(crc32));
}

}  // namespace

absl::StatusOr<DcpPlan> PlanDcp(const ForeignIndex& index, const DcpWriteOptions& options) {
  return Planner(index, options).Run();
}

absl::Status WriteDcp(FileSystem& file_system, const std::string& directory,
                      ConversionSource& source, const DcpPlan& plan,
                      const ConversionProgress& progress) {
  OutputFiles files(file_system, directory, plan.bytes, progress);
  size_t next = 0;
  for (uint32_t i = 0; i < plan.files.size(); ++i) {
    RETURN_IF_ERROR(files.Open(plan.files[i].name));
    for (; next < plan.items.size() && plan.items[next].file == i; ++next) {
      const DcpPlannedItem& item = plan.items[next];
      RETURN_IF_ERROR(item.object ? source.ReadBlob(item.number,
                                                    [&](auto bytes) { return files.Append(bytes); })
                                  : WriteTensor(source, item.number, files));
    }
    RETURN_IF_ERROR(files.Close());
  }
  // Last: without it there is no checkpoint.
  RETURN_IF_ERROR(files.WriteWhole(std::string(kMetadataName), plan.metadata));
  return files.Finish();
}

}  // namespace holdfast::converter
