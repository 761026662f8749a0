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
      : index_(index), builder_(index, options), metadata_(builder_.metadata()) {}

  absl::StatusOr<DcpPlan> Run() {
    RETURN_IF_ERROR(AddObjects());  // before the tensors, as PyTorch
    for (uint32_t i = 0; i < index_.tensor_states.size(); ++i) RETURN_IF_ERROR(AddTensor(i));
    DcpPlan plan = std::move(builder_).Finish();
    plan.left_out = std::move(left_out_);
    return plan;
  }

 private:
  absl::Status AddObjects() {
    if (index_.format != "dcp") {
      left_out_ = NonTensorsWithoutPlace(index_, [](const Fact&) { return false; });
      return absl::OkStatus();
    }
    for (uint32_t i = 0; i < index_.blobs.size(); ++i) {
      const ForeignBlob& blob = index_.blobs[i];
      RETURN_IF_ERROR(TakeKey(blob.name));
      const uint32_t item = builder_.Add({.kind = DcpPlannedItem::Kind::kBlob, .number = i});
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
    metadata_.chunks.push_back({.offsets = metadata_.numbers.size(),
                                .item = builder_.Add({.number = number, .dtype = state.dtype})});
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

  const ForeignIndex& index_;
  std::unordered_set<std::string> keys_;
  DcpPlanBuilder builder_;
  DcpMetadata& metadata_;
  std::vector<std::string> left_out_;
};

// The tensor's archive: its shape has the item's leading axes.
TensorArchive ArchiveOf(const ForeignIndex& index, const DcpPlannedItem& item) {
  std::vector<uint64_t> shape(item.leading_axes, 1);
  const std::vector<uint64_t>& own = index.tensor_states[item.number].shape;
  shape.insert(shape.end(), own.begin(), own.end());
  return TensorArchive(item.dtype, shape);
}

absl::Status WriteTensor(ConversionSource& source, const DcpPlannedItem& item, OutputFiles& files) {
  const TensorArchive archive = ArchiveOf(source.index(), item);
  const uint64_t elements = source.index().tensor_states[item.number].ElementCount();
  RETURN_IF_ERROR(files.Append(archive.head()));
  uint32_t crc32 = 0;
  RETURN_IF_ERROR(source.ReadElements(item.number, 0, elements, item.dtype,
                                      [&](std::span<const std::byte> bytes) {
                                        crc32 = ExtendZipCrc32(crc32, bytes);
                                        return files.Append(bytes);
                                      }));
  return files.Append(archive.Tail(crc32));
}

}  // namespace

DcpPlanBuilder::DcpPlanBuilder(const ForeignIndex& index, const DcpWriteOptions& options)
    : index_(index), options_(options) {
  metadata_.version = "1.0.0";
  metadata_.transforms.emplace_back();
}

uint32_t DcpPlanBuilder::Add(DcpPlannedItem item) {
  using Kind = DcpPlannedItem::Kind;
  const uint64_t bytes = item.kind == Kind::kTensor ? ArchiveOf(index_, item).bytes()
                         : item.kind == Kind::kBlob
                             ? index_.extents[index_.blobs[item.number].extent].decoded_bytes
                             : plan_.given[item.number].size();
  if (plan_.files.empty() || plan_.files.back().bytes >= options_.file_bytes) {
    plan_.files.push_back({.name = absl::StrCat("__0_", plan_.files.size(), ".distcp")});
    metadata_.files.push_back(plan_.files.back().name);
  }
  DcpPlan::File& file = plan_.files.back();
  item.file = static_cast<uint32_t>(plan_.files.size() - 1);
  metadata_.items.push_back({.offset_bytes = file.bytes, .stored_bytes = bytes, .file = item.file});
  plan_.items.push_back(item);
  file.bytes += bytes;
  plan_.bytes += bytes;
  return static_cast<uint32_t>(metadata_.items.size() - 1);
}

uint32_t DcpPlanBuilder::AddGiven(std::string object) {
  plan_.given.push_back(std::move(object));
  return Add({.kind = DcpPlannedItem::Kind::kGiven,
              .number = static_cast<uint32_t>(plan_.given.size() - 1)});
}

DcpPlan DcpPlanBuilder::Finish() && {
  plan_.metadata = EncodeDcpMetadata(metadata_);
  plan_.bytes += plan_.metadata.size();
  return std::move(plan_);
}

absl::StatusOr<DcpPlan> PlanDcp(const ForeignIndex& index, const DcpWriteOptions& options) {
  return Planner(index, options).Run();
}

absl::Status WriteDcpFiles(OutputFiles& files, const std::string& prefix, ConversionSource& source,
                           const DcpPlan& plan) {
  size_t next = 0;
  for (uint32_t i = 0; i < plan.files.size(); ++i) {
    RETURN_IF_ERROR(files.Open(prefix + plan.files[i].name));
    for (; next < plan.items.size() && plan.items[next].file == i; ++next) {
      const DcpPlannedItem& item = plan.items[next];
      switch (item.kind) {
        case DcpPlannedItem::Kind::kTensor:
          RETURN_IF_ERROR(WriteTensor(source, item, files));
          break;
        case DcpPlannedItem::Kind::kBlob:
          RETURN_IF_ERROR(
              source.ReadBlob(item.number, [&](auto bytes) { return files.Append(bytes); }));
          break;
        case DcpPlannedItem::Kind::kGiven:
          RETURN_IF_ERROR(files.Append(plan.given[item.number]));
          break;
      }
    }
    RETURN_IF_ERROR(files.Close());
  }
  // Last: without it there is no checkpoint.
  return files.WriteWhole(prefix + std::string(kMetadataName), plan.metadata);
}

absl::Status WriteDcp(FileSystem& file_system, const std::string& directory,
                      ConversionSource& source, const DcpPlan& plan,
                      const ConversionProgress& progress) {
  OutputFiles files(file_system, directory, plan.bytes, progress);
  RETURN_IF_ERROR(WriteDcpFiles(files, "", source, plan));
  return files.Finish();
}

}  // namespace holdfast::converter
