#include "converter/hf.h"

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "base/json_reader.h"
#include "base/status_macros.h"
#include "converter/byte_source.h"
#include "converter/decimal.h"
#include "converter/safetensors.h"
#include "converter/torch_file.h"
#include "converter/torch_index.h"

namespace holdfast::converter {
namespace {

constexpr uint64_t kIndexBytesMax = uint64_t{256} << 20;
constexpr uint64_t kConfigBytesMax = uint64_t{16} << 20;

// `model.safetensors.index.json`, `pytorch_model.bin.index.json`; of a variant
// `model.safetensors.index.bf16.json`.
constexpr std::string_view kIndexMiddles[] = {".safetensors.index.", ".bin.index."};

std::optional<std::string_view> VariantOf(std::string_view path) {
  if (path.find('/') != std::string_view::npos || !path.ends_with(".json")) return std::nullopt;
  for (const std::string_view middle : kIndexMiddles) {
    const size_t at = path.find(middle);
    if (at == std::string_view::npos) continue;
    path.remove_prefix(at + middle.size());
    path.remove_suffix(std::string_view("json").size());
    if (!path.empty()) path.remove_suffix(1);  // the dot
    return path;
  }
  return std::nullopt;
}

bool IsSafetensors(std::string_view path) {
  return path.find('/') == std::string_view::npos && path.ends_with(".safetensors");
}

// Other files end in .bin too (training_args.bin, optimizer.bin, a tokenizer's).
bool IsBin(std::string_view path) {
  return path.find('/') == std::string_view::npos && path.ends_with(".bin") &&
         (path.starts_with("pytorch_model") || path.starts_with("adapter_model"));
}

std::optional<uint32_t> FindConfig(const ForeignFolder& folder) {
  for (const std::string_view name : {"config.json", "adapter_config.json"}) {
    if (const auto found = folder.Find(name); found.has_value()) return found;
  }
  return std::nullopt;
}

absl::Status Damaged(std::string_view file, const absl::Status& status) {
  return absl::DataLossError(absl::StrFormat("%s: %s", file, status.message()));
}

class HfReader {
 public:
  HfReader(const ForeignFolder& folder, const ReadOptions& options)
      : folder_(folder), options_(options) {}

  absl::StatusOr<ForeignIndex> Read() {
    RETURN_IF_ERROR(ReadConfig());
    std::vector<uint32_t> indices;
    std::vector<uint32_t> safetensors;
    std::vector<uint32_t> bins;
    for (uint32_t file : folder_.FilesIn("")) {
      const std::string& path = folder_.files()[file].path;
      if (VariantOf(path).has_value()) indices.push_back(file);
      if (IsSafetensors(path)) safetensors.push_back(file);
      if (IsBin(path)) bins.push_back(file);
    }
    // Where a model is there in both forms, it is the same one.
    if (!safetensors.empty() && !bins.empty()) {
      index_.notes.push_back(absl::StrFormat("%s and the like were not read: there are safetensors",
                                             folder_.files()[bins.front()].path));
      std::erase_if(indices, [this](uint32_t file) {
        return folder_.files()[file].path.find(kIndexMiddles[0]) == std::string::npos;
      });
    }
    if (indices.size() > 1) {
      // Variants of one model have the same names: which is meant is the user's to say.
      std::vector<uint32_t> chosen;
      for (uint32_t file : indices) {
        if (VariantOf(folder_.files()[file].path) == options_.tag) chosen.push_back(file);
      }
      if (chosen.size() != 1) return Several(indices);
      if (!options_.tag.empty()) index_.layout.push_back({"tag", JsonQuote(options_.tag)});
      indices = chosen;
    }
    if (!indices.empty()) {
      RETURN_IF_ERROR(ReadShards(indices.front()));
    } else {
      RETURN_IF_ERROR(ReadFiles(safetensors.empty() ? bins : safetensors));
    }
    AddTiedHead();
    return std::move(index_);
  }

 private:
  absl::Status Several(const std::vector<uint32_t>& indices) const {
    std::string text = "the folder holds several models; --tag chooses one:";
    for (uint32_t file : indices) {
      text += absl::StrFormat(" \"%s\" (%s)", *VariantOf(folder_.files()[file].path),
                              folder_.files()[file].path);
    }
    return absl::InvalidArgumentError(text);
  }

  absl::StatusOr<std::unique_ptr<JsonDocument>> ReadJson(uint32_t file, uint64_t bytes_max) const {
    ASSIGN_OR_RETURN(std::string text, folder_.ReadAll(file, bytes_max));
    auto document = JsonDocument::Parse(std::move(text), {.bytes_max = bytes_max});
    if (!document.ok()) return Damaged(folder_.files()[file].path, document.status());
    return document;
  }

  // What is shown of it; the rest of the configuration is the model's business.
  absl::Status ReadConfig() {
    std::unique_ptr<JsonDocument> document;
    if (const auto file = FindConfig(folder_); file.has_value()) {
      ASSIGN_OR_RETURN(document, ReadJson(*file, kConfigBytesMax));
    } else if (!options_.model_config.empty()) {
      ASSIGN_OR_RETURN(document, JsonDocument::Parse(options_.model_config));
    }
    if (document != nullptr && document->root().type() == JsonValue::Type::kObject) {
      const JsonValue root = document->root();
      for (const std::string_view key : {"model_type", "dtype", "torch_dtype"}) {
        const auto text = root.Find(key).String();
        if (text.ok()) index_.layout.push_back({std::string(key), JsonQuote(*text)});
      }
      const JsonValue architectures = root.Find("architectures");
      const auto count = architectures.ArraySize();
      for (size_t i = 0; count.ok() && i < *count; ++i) {
        const auto name = architectures[i].String();
        has_head_ =
            has_head_ ||
            (name.ok() && (name->ends_with("ForCausalLM") || name->ends_with("LMHeadModel")));
      }
      const auto tied = root.Find("tie_word_embeddings").Bool();
      if (tied.ok()) {
        tied_ = *tied;
        index_.layout.push_back({"tie_word_embeddings", *tied ? "true" : "false"});
      }
    }
    const auto state = folder_.Find("trainer_state.json");
    if (!state.has_value()) return absl::OkStatus();
    ASSIGN_OR_RETURN(document, ReadJson(*state, kConfigBytesMax));
    if (document->root().type() != JsonValue::Type::kObject) return absl::OkStatus();
    const auto step = document->root().Find("global_step").Uint64();
    index_.has_step = step.ok();
    if (step.ok()) index_.step = *step;
    return absl::OkStatus();
  }

  // The tensors of a file that `wants` wants, as params; it is asked about each.
  using Wants = std::function<bool(const std::string& tensor)>;
  absl::Status AddFile(uint32_t file, const Wants& wants) {
    if (!IsSafetensors(folder_.files()[file].path)) return AddBin(file, wants);
    ASSIGN_OR_RETURN(const SafetensorsHeader header, ReadSafetensorsHeader(folder_, file));
    for (const SafetensorsTensor& tensor : header.tensors) {
      if (!wants(tensor.name)) continue;
      total_bytes_ += tensor.bytes;
      AddSafetensor(tensor, file, "param", index_);
    }
    return absl::OkStatus();
  }

  // A dict of names and tensors, as state_dict() gives it. Tied weights stand over one storage.
  absl::Status AddBin(uint32_t file, const Wants& wants) {
    const std::string& path = folder_.files()[file].path;
    ASSIGN_OR_RETURN(const std::unique_ptr<TorchFile> torch,
                     TorchFile::Open(FolderSource(folder_, file)));
    const TorchValue root = torch->root();
    ASSIGN_OR_RETURN(const size_t count, root.EntryCount());
    TorchPieces pieces(index_, file, 0, *torch);
    std::map<std::tuple<uint32_t, uint64_t, Dtype, std::vector<uint64_t>, std::vector<uint64_t>>,
             uint32_t>
        first;
    for (size_t i = 0; i < count; ++i) {
      ASSIGN_OR_RETURN(const std::string_view name, root.Key(i).String());
      if (!wants(std::string(name))) continue;
      const auto tensor = root.Entry(i).Tensor();
      if (!tensor.ok()) {
        index_.unreadable.push_back(
            {std::string(name), absl::StrFormat("is %s in %s", root.Entry(i).Describe(), path)});
        continue;
      }
      ASSIGN_OR_RETURN(const uint32_t state, pieces.AddWhole(std::string(name), "param", **tensor));
      const auto [place, is_new] =
          first.emplace(std::tuple((*tensor)->storage, (*tensor)->offset, (*tensor)->dtype,
                                   (*tensor)->shape, (*tensor)->strides),
                        state);
      if (is_new || (*tensor)->ElementCount() == 0) {
        total_bytes_ += (*tensor)->Bytes();
      } else {
        index_.aliases.push_back({state, place->second});
      }
    }
    AddTorchDescription(*torch, index_);
    return absl::OkStatus();
  }

  // "model-00002-of-00003.safetensors": where no index names the shards, they number themselves.
  void NameLostShards(const std::vector<uint32_t>& files) {
    std::map<std::pair<std::string_view, uint64_t>, std::set<uint64_t>> numbers;  // name, count
    for (uint32_t file : files) {
      const std::string_view path = folder_.files()[file].path;
      const size_t of = path.rfind("-of-");
      if (of == std::string_view::npos || of == 0) continue;
      const size_t dash = path.rfind('-', of - 1);
      const size_t dot = path.find('.', of);
      if (dash == std::string_view::npos || dot == std::string_view::npos) continue;
      const auto number = ParseDecimal(path.substr(dash + 1, of - dash - 1));
      const auto count = ParseDecimal(path.substr(of + 4, dot - of - 4));
      if (number.has_value() && count.has_value()) {
        numbers[{path.substr(0, dash), *count}].insert(*number);
      }
    }
    for (const auto& [shards, there] : numbers) {
      const auto& [name, count] = shards;
      if (there.size() >= count) continue;
      index_.losses.push_back(absl::StrFormat(
          "%s-...-of-...: expected %d files, as their names say, found %d; no index "
          "says what is in the others",
          name, count, there.size()));
    }
  }

  absl::Status ReadFiles(const std::vector<uint32_t>& files) {
    NameLostShards(files);
    std::unordered_map<std::string, std::string> seen;  // tensor -> file
    std::string twice;
    for (uint32_t file : files) {
      const std::string& path = folder_.files()[file].path;
      RETURN_IF_ERROR(AddFile(file, [&](const std::string& tensor) {
        const auto [place, is_new] = seen.emplace(tensor, path);
        if (!is_new && twice.empty()) {
          twice =
              absl::StrFormat("%s and %s both have the tensor %s, and no index says which counts",
                              place->second, path, JsonQuote(tensor));
        }
        return is_new;
      }));
    }
    return twice.empty() ? absl::OkStatus() : absl::DataLossError(twice);
  }

  absl::Status ReadShards(uint32_t file) {
    const std::string& path = folder_.files()[file].path;
    index_.variant = absl::StrFormat("sharded %s", path.find(kIndexMiddles[0]) != std::string::npos
                                                       ? "safetensors"
                                                       : "torch files");
    ASSIGN_OR_RETURN(const auto document, ReadJson(file, kIndexBytesMax));
    const auto map = document->root().Get("weight_map");
    if (!map.ok()) return Damaged(path, map.status());
    const auto names = map->Keys();
    if (!names.ok()) return Damaged(path, names.status());
    std::map<std::string, std::vector<std::string_view>> shards;  // by file, as the index names it
    for (size_t i = 0; i < names->size(); ++i) {
      const auto shard = map->Member(i).String();
      if (!shard.ok()) return Damaged(path, shard.status());
      shards[std::string(*shard)].push_back((*names)[i]);
    }
    index_.layout.push_back({"shards", absl::StrFormat("%d", shards.size())});
    for (auto& [name, expected] : shards) {
      std::sort(expected.begin(), expected.end());
      RETURN_IF_ERROR(ReadShard(path, name, expected));
    }
    return CheckTotal(path, document->root());
  }

  absl::Status ReadShard(const std::string& index_path, const std::string& name,
                         const std::vector<std::string_view>& expected) {
    const absl::StatusOr<uint32_t> file = folder_.Resolve("", name, index_path);
    if (absl::IsNotFound(file.status())) {
      index_.losses.push_back(
          absl::StrFormat("%s, in which %d tensors should be, the first of them "
                          "%s",
                          file.status().message(), expected.size(), JsonQuote(expected.front())));
      return absl::OkStatus();
    }
    RETURN_IF_ERROR(file.status());
    std::vector<std::string> found;
    bool unnamed = false;
    RETURN_IF_ERROR(AddFile(*file, [&](const std::string& tensor) {
      const bool named = std::binary_search(expected.begin(), expected.end(), tensor);
      if (named) {
        found.push_back(tensor);
      } else if (!std::exchange(unnamed, true)) {
        index_.notes.push_back(absl::StrFormat("%s has the tensor %s, which %s does not name there",
                                               name, JsonQuote(tensor), index_path));
      }
      return named;
    }));
    std::sort(found.begin(), found.end());
    for (const std::string_view each : expected) {
      if (std::binary_search(found.begin(), found.end(), each)) continue;
      index_.losses.push_back(absl::StrFormat("%s: the tensor %s, which %s names there, is missing",
                                              name, JsonQuote(each), index_path));
    }
    return absl::OkStatus();
  }

  // The number is for people, and writers have counted tied weights in several ways.
  absl::Status CheckTotal(const std::string& path, const JsonValue& root) {
    const JsonValue metadata = root.Find("metadata");
    if (!metadata.present() || metadata.type() != JsonValue::Type::kObject) return absl::OkStatus();
    const auto total = metadata.Find("total_size").Uint64();
    if (total.ok() && *total != total_bytes_) {
      index_.notes.push_back(absl::StrFormat("%s says %d bytes in all, and its tensors have %d",
                                             path, *total, total_bytes_));
    }
    return absl::OkStatus();
  }

  // A head that the configuration ties to the input embeddings is not in the files: it is the same
  // tensor under the name by which the model knows it.
  void AddTiedHead() {
    constexpr std::string_view kHead = "lm_head.weight";
    constexpr std::string_view kEmbeddings[] = {
        "model.embed_tokens.weight", "transformer.wte.weight", "gpt_neox.embed_in.weight",
        "transformer.word_embeddings.weight", "model.decoder.embed_tokens.weight"};
    if (!tied_ || !has_head_) return;
    std::optional<uint32_t> embeddings;
    for (uint32_t i = 0; i < index_.tensor_states.size(); ++i) {
      const std::string& name = index_.tensor_states[i].tensor;
      if (name == kHead) return;
      if (std::find(std::begin(kEmbeddings), std::end(kEmbeddings), name) !=
          std::end(kEmbeddings)) {
        embeddings = i;
      }
    }
    if (!embeddings.has_value()) {
      index_.notes.push_back(
          "lm_head.weight is not in the files: the configuration ties it to the input embeddings");
      return;
    }
    TensorState state = index_.tensor_states[*embeddings];
    state.tensor = kHead;
    const uint32_t head = index_.AddState(std::move(state));
    for (size_t i = 0, count = index_.pieces.size(); i < count; ++i) {
      if (index_.pieces[i].piece.tensor_state != *embeddings) continue;
      ForeignPiece piece = index_.pieces[i];
      piece.piece.tensor_state = head;
      index_.pieces.push_back(piece);
    }
    index_.aliases.push_back({head, *embeddings});
  }

  const ForeignFolder& folder_;
  const ReadOptions& options_;
  ForeignIndex index_;
  bool tied_ = false;
  bool has_head_ = false;  // by the name of its class
  uint64_t total_bytes_ = 0;
};

}  // namespace

absl::StatusOr<bool> RecognizesHf(const ForeignFolder& folder) {
  if (folder.single_file()) return false;
  bool has_weights = false;
  for (uint32_t file : folder.FilesIn("")) {
    const std::string& path = folder.files()[file].path;
    if (VariantOf(path).has_value()) return true;
    has_weights = has_weights || IsSafetensors(path) || IsBin(path);
  }
  return has_weights && FindConfig(folder).has_value();
}

absl::StatusOr<ForeignIndex> ReadHf(const ForeignFolder& folder, const ReadOptions& options) {
  return HfReader(folder, options).Read();
}

}  // namespace holdfast::converter
