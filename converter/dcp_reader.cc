#include "converter/dcp_reader.h"

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "converter/dcp_items.h"
#include "converter/dcp_metadata.h"
#include "converter/dcp_names.h"
#include "converter/dcp_shards.h"
#include "converter/decimal.h"
#include "converter/flat_parameters.h"
#include "converter/names_file.h"
#include "converter/shard_pieces.h"
#include "converter/state_names.h"
#include "converter/torch_index.h"

namespace holdfast::converter {
namespace {

// A pickled object that is no tensor, at most.
constexpr uint64_t kObjectBytesMax = uint64_t{64} << 20;
// Of what is shown of it.
constexpr size_t kShownBytesMax = size_t{64} << 10;
constexpr size_t kNamesBytesMax = size_t{16} << 20;
// Beside the tensor's own bytes in a torch file of one tensor: pickle, records, directory.
constexpr uint64_t kItemOverheadBytesMax = uint64_t{1} << 20;

// The names of an optimizer group's parameters are needed whole: conversions go by them.
size_t ShownBytesMax(std::string_view key) {
  return key.ends_with(".params") ? kNamesBytesMax : kShownBytesMax;
}

std::string Join(std::string_view directory, std::string_view name) {
  return directory.empty() ? std::string(name) : absl::StrFormat("%s/%s", directory, name);
}

// The number at the end of a name: "step-1000", "iter_0000500".
std::optional<uint64_t> TrailingNumber(std::string_view name) {
  return ParseDecimal(name.substr(TrailingDigits(name)));
}

// The metadata files of a DCP folder: one, or one per rank, in the order of the ranks.
std::vector<uint32_t> MetadataIn(const ForeignFolder& folder, std::string_view directory) {
  if (const auto whole = folder.Find(Join(directory, kDcpMetadataName)); whole.has_value()) {
    return {*whole};
  }
  std::map<uint64_t, uint32_t> by_rank;
  for (const uint32_t file : folder.FilesIn(directory)) {
    const std::string_view path = folder.files()[file].path;
    const std::string_view name = path.substr(directory.empty() ? 0 : directory.size() + 1);
    if (const auto rank = RankOfDcpMetadata(name); rank.has_value()) by_rank[*rank] = file;
  }
  std::vector<uint32_t> files;
  for (const auto& [rank, file] : by_rank) files.push_back(file);
  return files;
}

// accelerate's folders, which are parts of one checkpoint.
bool IsPartName(std::string_view name) {
  return name.starts_with("pytorch_model_fsdp") || name.starts_with("optimizer");
}

bool HasData(const ForeignFolder& folder, std::string_view directory) {
  return std::ranges::any_of(folder.FilesIn(directory), [&](uint32_t file) {
    return folder.files()[file].path.ends_with(".distcp");
  });
}

// Directories of DCP folders that belong together.
struct Parts {
  std::vector<std::string> directories = {};  // none: this is no DCP folder
  std::string tag = {};                       // what was chosen of several checkpoints
  std::vector<std::string> lost = {};         // other directories, which have data alone
};

absl::StatusOr<Parts> PartsOf(const ForeignFolder& folder, const ReadOptions& options) {
  if (folder.single_file()) return Parts{};
  if (!MetadataIn(folder, "").empty()) return Parts{.directories = {""}};
  std::vector<std::string> parts;
  std::vector<std::string> checkpoints;
  std::vector<std::string> lost;
  for (const std::string& directory : folder.directories()) {
    if (directory.find('/') != std::string::npos) continue;
    if (!MetadataIn(folder, directory).empty()) {
      (IsPartName(directory) ? parts : checkpoints).push_back(directory);
    } else if (IsPartName(directory) && HasData(folder, directory)) {
      lost.push_back(directory);
    }
  }
  if (!parts.empty() && checkpoints.empty()) return Parts{.directories = parts, .lost = lost};
  if (checkpoints.empty()) return Parts{};
  std::string chosen = options.tag;
  if (chosen.empty()) {
    // By the number at the end of the name; names without one come first.
    chosen = *std::ranges::max_element(checkpoints, {}, [](const std::string& name) {
      return std::pair(TrailingNumber(name), name);
    });
  } else if (std::ranges::find(checkpoints, chosen) == checkpoints.end()) {
    return absl::NotFoundError(absl::StrFormat("expected a tag of %s, found %s",
                                               absl::StrJoin(checkpoints, ", "), chosen));
  }
  return Parts{.directories = {chosen}, .tag = chosen};
}

// A metadata file of the checkpoint.
struct Source {
  std::string directory;
  std::string name;
  DcpMetadata metadata;
};

class Reader {
 public:
  Reader(const ForeignFolder& folder, const ReadOptions& options, const NamesFile& names)
      : folder_(folder), options_(options), names_(names), flat_(names, index_) {}

  absl::StatusOr<ForeignIndex> Read() {
    ASSIGN_OR_RETURN(const Parts parts, PartsOf(folder_, options_));
    for (const std::string& directory : parts.directories) {
      for (const uint32_t file : MetadataIn(folder_, directory)) {
        RETURN_IF_ERROR(ReadMetadata(directory, file));
      }
    }
    for (const std::string& directory : parts.lost) {
      index_.losses.push_back(
          absl::StrFormat("%s: expected %s, without which nobody knows what is "
                          "in it, found none",
                          directory, kDcpMetadataName));
    }
    if (!parts.tag.empty()) index_.layout.push_back({"tag", JsonQuote(parts.tag)});
    RETURN_IF_ERROR(AddStates());
    for (Source& source : sources_) RETURN_IF_ERROR(ReadItems(source));
    NameLostObjects();
    RETURN_IF_ERROR(NameNumberedStates());
    Describe();
    KeepOtherFiles();
    return std::move(index_);
  }

 private:
  absl::Status ReadMetadata(const std::string& directory, uint32_t file) {
    const std::string& path = folder_.files()[file].path;
    ASSIGN_OR_RETURN(std::string bytes, folder_.ReadAll(file, kDcpMetadataBytesMax));
    ASSIGN_OR_RETURN(DcpMetadata metadata, ParseDcpMetadata(std::move(bytes), path));
    used_files_.insert(file);
    sources_.push_back({directory, path, std::move(metadata)});
    return absl::OkStatus();
  }

  // One tensor state per key of any source; equal keys are one tensor.
  absl::Status AddStates() {
    std::vector<StateKey> keys;
    std::vector<StateKey> others;
    std::vector<const DcpTensor*> tensors;
    std::unordered_map<std::string_view, size_t> number_of;
    for (const Source& source : sources_) {
      for (const DcpTensor& tensor : source.metadata.tensors) {
        const auto [known, added] = number_of.try_emplace(tensor.key, tensors.size());
        if (added) {
          tensors.push_back(&tensor);
          keys.push_back({tensor.key, tensor.path});
        } else if (const DcpTensor& first = *tensors[known->second];
                   first.shape != tensor.shape || first.dtype != tensor.dtype) {
          return absl::DataLossError(absl::StrFormat(
              "%s: %s: expected dtype %s and shape [%s], as another metadata file says, found %s "
              "and [%s]",
              source.name, tensor.key, first.dtype, absl::StrJoin(first.shape, ", "), tensor.dtype,
              absl::StrJoin(tensor.shape, ", ")));
        }
      }
      for (const DcpObject& object : source.metadata.objects) {
        others.push_back({object.key, object.path});
      }
    }
    const std::vector<StateName> names = NameStates(keys, others);
    for (size_t i = 0; i < tensors.size(); ++i) {
      const std::optional<Dtype> dtype = DtypeFromName(tensors[i]->dtype);
      if (!dtype.has_value()) {
        index_.unreadable.push_back(
            {tensors[i]->key, absl::StrCat("is of dtype torch.", tensors[i]->dtype)});
        continue;
      }
      TensorState state{names[i].name, names[i].state, *dtype, tensors[i]->shape};
      // FSDP1's flat parameters: the parameters in them are the states, if somebody names them.
      if (const FlatUnit* const unit = flat_.Find(state.tensor);
          unit != nullptr && state.state == "param" && state.shape.size() == 1) {
        if (state.shape[0] < unit->end) {
          return absl::InvalidArgumentError(absl::StrFormat(
              "--names: expected pieces of %s within its %d elements, found the last one to end at "
              "%d",
              tensors[i]->key, state.shape[0], unit->end));
        }
        flat_of_[tensors[i]->key] = unit;
        continue;
      }
      RETURN_IF_ERROR(CheckShape(".metadata", state));
      const uint32_t number = index_.AddState(std::move(state));
      state_of_[tensors[i]->key] = number;
      if (names[i].parameter_number.has_value()) {
        numbered_.push_back({number, *names[i].parameter_number, names[i].optimizer});
      }
    }
    return absl::OkStatus();
  }

  absl::Status ReadItems(const Source& source) {
    const DcpMetadata& metadata = source.metadata;
    DcpItems items(folder_, metadata, source.directory, source.name, index_);
    for (const DcpTensor& tensor : metadata.tensors) {
      // Of a dtype that cannot be said there are none.
      if (!state_of_.contains(tensor.key) && !flat_of_.contains(tensor.key)) continue;
      for (size_t c = tensor.chunks_begin; c < tensor.chunks_end; ++c) {
        RETURN_IF_ERROR(ReadChunk(items, metadata, tensor, metadata.chunks[c]));
      }
    }
    for (const DcpObject& object : metadata.objects) {
      if (object.item == kNoItem) continue;
      RETURN_IF_ERROR(ReadObject(items, metadata, object));
    }
    return absl::OkStatus();
  }

  absl::Status ReadChunk(DcpItems& items, const DcpMetadata& metadata, const DcpTensor& tensor,
                         const DcpChunk& chunk) {
    if (chunk.item == kNoItem) return absl::OkStatus();  // of another rank, or a hole
    const DcpItem& item = metadata.items[chunk.item];
    ASSIGN_OR_RETURN(const std::optional<uint32_t> file, items.FileOf(item));
    if (!file.has_value()) return absl::OkStatus();
    used_files_.insert(*file);
    const std::span<const uint64_t> sizes = metadata.SizesOf(tensor, chunk);
    uint64_t bytes = ElementBytes(*DtypeFromName(tensor.dtype));
    for (const uint64_t size : sizes) {
      if (size == 0) return absl::OkStatus();
      if (__builtin_mul_overflow(bytes, size, &bytes)) {
        return absl::DataLossError(absl::StrCat(tensor.key, ": a chunk of more than 2^64 bytes"));
      }
    }
    const uint64_t bytes_max = bytes < kTensorBytesMax ? bytes + kItemOverheadBytesMax : bytes;
    ASSIGN_OR_RETURN(const OpenedItem opened, items.Open(item, *file, bytes_max));
    const absl::StatusOr<const TorchTensor*> stored = opened.torch->root().Tensor();
    if (!stored.ok()) return stored.status();
    const std::span<const uint64_t> offsets = metadata.OffsetsOf(tensor, chunk);
    if (const auto unit = flat_of_.find(tensor.key); unit != flat_of_.end()) {
      if (!std::ranges::equal((*stored)->shape, sizes)) {
        return absl::DataLossError(absl::StrFormat(
            "%s: %s: expected a part of shape [%s], found [%s]", opened.torch->name(), tensor.key,
            absl::StrJoin(sizes, ", "), absl::StrJoin((*stored)->shape, ", ")));
      }
      return flat_.AddSlice(*unit->second, "param", offsets[0], *opened.torch, **stored,
                            opened.place);
    }
    return AddShard(*opened.torch, **stored, opened.place, RunsOfBox(offsets, sizes),
                    state_of_.at(tensor.key), index_);
  }

  absl::Status ReadObject(DcpItems& items, const DcpMetadata& metadata, const DcpObject& object) {
    const DcpItem& item = metadata.items[object.item];
    ASSIGN_OR_RETURN(const std::optional<uint32_t> file, items.FileOf(item));
    // Replicated objects repeat in every rank's metadata; they are equal, or any one will do.
    if (!file.has_value() || !objects_.insert(object.key).second) return absl::OkStatus();
    used_files_.insert(*file);
    ASSIGN_OR_RETURN(const OpenedItem opened, items.Open(item, *file, kObjectBytesMax));
    index_.blobs.push_back({object.key, opened.extent});
    const TorchValue value = opened.torch->root();
    index_.scalars.push_back({object.key, TorchJson(value, ShownBytesMax(object.key))});
    AddTorchDescription(*opened.torch, index_);
    const std::string_view last = object.path.empty() ? object.key : object.path.back();
    if ((last == "step" || last == "global_step" || last == "iteration" || last == "steps") &&
        object.path.size() <= 2 && value.Uint64().ok()) {
      index_.has_step = true;
      index_.step = *value.Uint64();
    }
    return absl::OkStatus();
  }

  // Of tensors the holes are seen, whoever looks.
  void NameLostObjects() {
    std::set<std::string_view> named;
    for (const Source& source : sources_) {
      for (const DcpObject& object : source.metadata.objects) {
        if (objects_.contains(object.key) || !named.insert(object.key).second) continue;
        index_.losses.push_back(LostObject(source.metadata, source.name, object));
      }
    }
  }

  // States whose parameter is a number in the optimizer get the name that --names has for it.
  absl::Status NameNumberedStates() {
    if (numbered_.empty()) return absl::OkStatus();
    if (names_.parameters.empty()) {
      index_.notes.push_back(
          "the optimizer numbers its parameters and the files do not name them: --names FILE does");
      return absl::OkStatus();
    }
    for (const Numbered& state : numbered_) {
      if (state.parameter >= names_.parameters.size()) {
        return absl::InvalidArgumentError(
            absl::StrFormat("--names: expected a name of parameter %d of %s, found %d names",
                            state.parameter, state.optimizer, names_.parameters.size()));
      }
      index_.tensor_states[state.number].tensor = names_.parameters[state.parameter];
    }
    return absl::OkStatus();
  }

  void Describe() {
    const DcpMetadata& first = sources_.front().metadata;
    index_.variant =
        first.module.starts_with("torch.distributed._shard.")
            ? "torch 1.13 metadata"
            : absl::StrCat("torch files", first.version.empty() ? "" : ", version ", first.version);
    size_t chunks = 0;
    std::set<std::string> transforms;
    for (const Source& source : sources_) {
      chunks += source.metadata.chunks.size();
      for (const auto& descriptors : source.metadata.transforms) {
        transforms.insert(descriptors.begin(), descriptors.end());
      }
    }
    index_.layout.push_back({"metadata files", absl::StrCat(sources_.size())});
    index_.layout.push_back({"chunks", absl::StrCat(chunks)});
    for (const std::string& transform : transforms) {
      index_.layout.push_back({"transform", JsonQuote(transform)});
    }
  }

  // accelerate keeps schedulers and random states beside: not part of any DCP folder, not lost.
  void KeepOtherFiles() {
    for (const uint32_t file : folder_.FilesIn("")) {
      const FolderFile& info = folder_.files()[file];
      if (used_files_.contains(file)) continue;
      index_.blobs.push_back({info.path, index_.AddRaw(file, 0, info.bytes)});
    }
  }

  struct Numbered {
    uint32_t number;  // of the tensor state
    uint64_t parameter;
    std::string optimizer;
  };

  const ForeignFolder& folder_;
  const ReadOptions& options_;
  const NamesFile& names_;
  std::vector<Source> sources_;
  std::unordered_map<std::string, uint32_t> state_of_;        // by key
  std::unordered_map<std::string, const FlatUnit*> flat_of_;  // by key
  std::vector<Numbered> numbered_;
  std::set<std::string> objects_;
  std::set<uint32_t> used_files_;
  ForeignIndex index_;
  FlatParameters flat_;
};

}  // namespace

absl::StatusOr<bool> RecognizesDcp(const ForeignFolder& folder) {
  const absl::StatusOr<Parts> parts = PartsOf(folder, {});
  if (!parts.ok()) return parts.status();
  return !parts->directories.empty() || HoldsDcpShards(folder);
}

absl::StatusOr<ForeignIndex> ReadDcp(const ForeignFolder& folder, const ReadOptions& options) {
  if (HoldsDcpShards(folder)) return ReadDcpShards(folder);
  ASSIGN_OR_RETURN(const NamesFile names, ParseNamesFile(options.names));
  return Reader(folder, options, names).Read();
}

}  // namespace holdfast::converter
