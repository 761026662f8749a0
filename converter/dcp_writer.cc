#include "converter/dcp_writer.h"

#include <algorithm>
#include <map>
#include <memory>
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
#include "converter/extent_reader.h"
#include "converter/tensor_archive.h"
#include "converter/whole_tensor_reader.h"

namespace holdfast::converter {
namespace {

constexpr std::string_view kMetadataName = ".metadata";
constexpr size_t kBlockBytes = size_t{1} << 20;

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
    RETURN_IF_ERROR(LeaveOutUnreadable());
    RETURN_IF_ERROR(AddObjects());  // before the tensors, as PyTorch
    std::map<std::string_view, uint64_t> dropped;
    for (uint32_t i = 0; i < index_.tensor_states.size(); ++i) {
      const TensorState& state = index_.tensor_states[i];
      if (std::ranges::find(options_.drop_states, state.state) != options_.drop_states.end()) {
        ++dropped[state.state];
      } else {
        RETURN_IF_ERROR(AddTensor(i));
      }
    }
    for (const auto& [state, count] : dropped) {
      plan_.left_out.push_back(absl::StrFormat("%d tensors of state %s", count, state));
    }
    plan_.metadata = EncodeDcpMetadata(metadata_);
    plan_.bytes += plan_.metadata.size();
    return std::move(plan_);
  }

 private:
  absl::Status LeaveOutUnreadable() {
    if (!index_.unreadable.empty() && !options_.drop_unreadable) {
      return absl::FailedPreconditionError(absl::StrFormat(
          "%s %s; --drop unreadable leaves it and %d others out", index_.unreadable.front().name,
          index_.unreadable.front().reason, index_.unreadable.size() - 1));
    }
    for (const Unreadable& each : index_.unreadable) {
      plan_.left_out.push_back(absl::StrFormat("%s, which %s", each.name, each.reason));
    }
    return absl::OkStatus();
  }

  absl::Status AddObjects() {
    if (index_.format != "dcp") {
      if (!index_.blobs.empty() || !index_.scalars.empty()) {
        plan_.left_out.push_back("what is no tensor: numbers, text, optimizer groups, RNG states");
      }
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

class Writer {
 public:
  Writer(const ForeignFolder& folder, const ForeignIndex& index, const DcpPlan& plan,
         const std::function<bool(uint64_t, uint64_t)>& progress)
      : index_(index),
        plan_(plan),
        progress_(progress),
        tensors_(folder, index),
        extents_(folder, index) {}

  absl::Status Run(FileSystem& file_system, const std::string& directory) {
    const auto path = [&](std::string_view name) {
      return absl::StrFormat("%s/%s", directory, name);
    };
    size_t next = 0;
    for (uint32_t i = 0; i < plan_.files.size(); ++i) {
      ASSIGN_OR_RETURN(file_, file_system.CreateNew(path(plan_.files[i].name)));
      for (; next < plan_.items.size() && plan_.items[next].file == i; ++next) {
        const DcpPlannedItem& item = plan_.items[next];
        RETURN_IF_ERROR(item.object ? WriteObject(index_.blobs[item.number])
                                    : WriteTensor(item.number));
      }
      RETURN_IF_ERROR(file_->Sync());
    }
    // Last: without it there is no checkpoint.
    ASSIGN_OR_RETURN(file_, file_system.CreateNew(path(kMetadataName)));
    RETURN_IF_ERROR(Append(std::as_bytes(std::span(plan_.metadata))));
    return file_->Sync();
  }

 private:
  absl::Status Append(std::span<const std::byte> bytes) {
    RETURN_IF_ERROR(file_->Append(bytes));
    done_ += bytes.size();
    if (progress_ == nullptr || progress_(done_, plan_.bytes)) return absl::OkStatus();
    return absl::CancelledError("stopped; nothing was left behind");
  }

  absl::Status WriteTensor(uint32_t number) {
    const TensorState& state = index_.tensor_states[number];
    const TensorArchive archive(state.dtype, state.shape);
    RETURN_IF_ERROR(Append(std::as_bytes(std::span(archive.head()))));
    uint32_t crc32 = 0;
    RETURN_IF_ERROR(tensors_.Read(number, [&](std::span<const std::byte> bytes) {
      crc32 = ExtendZipCrc32(crc32, bytes);
      return Append(bytes);
    }));
    const std::string tail = archive.Tail(crc32);
    return Append(std::as_bytes(std::span(tail)));
  }

  absl::Status WriteObject(const ForeignBlob& blob) {
    const uint64_t bytes = index_.extents[blob.extent].decoded_bytes;
    std::vector<std::byte> block;
    for (uint64_t at = 0; at < bytes; at += block.size()) {
      block.resize(std::min<uint64_t>(kBlockBytes, bytes - at));
      RETURN_IF_ERROR(extents_.Read(blob.extent, at, block));
      RETURN_IF_ERROR(Append(block));
    }
    return absl::OkStatus();
  }

  const ForeignIndex& index_;
  const DcpPlan& plan_;
  const std::function<bool(uint64_t, uint64_t)>& progress_;
  WholeTensorReader tensors_;
  ExtentReader extents_;
  std::unique_ptr<WritableFile> file_;
  uint64_t done_ = 0;
};

}  // namespace

absl::StatusOr<DcpPlan> PlanDcp(const ForeignIndex& index, const DcpWriteOptions& options) {
  return Planner(index, options).Run();
}

absl::Status WriteDcp(FileSystem& file_system, const std::string& directory,
                      const ForeignFolder& folder, const ForeignIndex& index, const DcpPlan& plan,
                      const std::function<bool(uint64_t, uint64_t)>& progress) {
  return Writer(folder, index, plan, progress).Run(file_system, directory);
}

}  // namespace holdfast::converter
