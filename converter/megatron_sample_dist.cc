// MegatronSample's torch_dist folders: one .distcp file of all ranks.
#include <algorithm>
#include <span>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/zip_crc32.h"
#include "converter/dcp_encoding.h"
#include "converter/megatron_sample.h"
#include "converter/tensor_archive.h"

namespace holdfast::converter {
namespace {

// The archive of one tensor, as an item of a .distcp file.
std::string TensorItem(Dtype dtype, const std::vector<uint64_t>& shape, const std::string& bytes) {
  const TensorArchive archive(dtype, shape);
  CHECK(archive.data_bytes() == bytes.size());
  const uint32_t crc = ExtendZipCrc32(0, std::as_bytes(std::span(bytes)));
  return archive.head() + bytes + archive.Tail(crc);
}

// A torch_dist folder's tensors and objects, in one .distcp file.
class DistFile {
 public:
  void Tensor(const std::string& key, Dtype dtype, const std::vector<uint64_t>& shape,
              const std::vector<uint64_t>& offsets, const std::vector<uint64_t>& sizes,
              const std::string& bytes) {
    Key& of = keys_[key];
    of.dtype = dtype;
    of.shape = shape;
    of.chunks.push_back({offsets, sizes, file_.size()});
    file_ += TensorItem(dtype, sizes, bytes);
    of.chunks.back().bytes = file_.size() - of.chunks.back().offset;
  }
  void Object(const std::string& key, TorchSample torch) {
    objects_.push_back({key, file_.size(), 0});
    file_ += std::move(torch).Bytes();
    objects_.back().bytes = file_.size() - objects_.back().offset;
  }
  void Into(MegatronSample::Files& files, const std::string& directory) const {
    DcpMetadata metadata;
    metadata.transforms.emplace_back();
    metadata.files = {"__0_0.distcp"};
    const auto item = [&metadata](uint64_t offset, uint64_t bytes) {
      metadata.items.push_back({.offset_bytes = offset, .stored_bytes = bytes});
      return static_cast<uint32_t>(metadata.items.size() - 1);
    };
    for (const auto& [key, of] : keys_) {
      DcpTensor tensor{.key = key,
                       .dtype = std::string(DtypeName(of.dtype)),
                       .shape = of.shape,
                       .chunks_begin = metadata.chunks.size()};
      for (const Chunk& chunk : of.chunks) {
        metadata.chunks.push_back(
            {.offsets = metadata.numbers.size(), .item = item(chunk.offset, chunk.bytes)});
        metadata.numbers.insert(metadata.numbers.end(), chunk.offsets.begin(), chunk.offsets.end());
        metadata.numbers.insert(metadata.numbers.end(), chunk.sizes.begin(), chunk.sizes.end());
      }
      tensor.chunks_end = metadata.chunks.size();
      metadata.tensors.push_back(std::move(tensor));
    }
    for (const ObjectPlace& object : objects_) {
      metadata.objects.push_back({.key = object.key, .item = item(object.offset, object.bytes)});
    }
    files[directory + "__0_0.distcp"] = file_;
    files[directory + ".metadata"] = EncodeDcpMetadata(metadata);
    files[directory + "metadata.json"] =
        "{\"sharded_backend\": \"torch_dist\", \"sharded_backend_version\": 1}";
  }

 private:
  struct Chunk {
    std::vector<uint64_t> offsets, sizes;
    uint64_t offset = 0;
    uint64_t bytes = 0;
  };
  struct Key {
    Dtype dtype = Dtype::kFloat32;
    std::vector<uint64_t> shape;
    std::vector<Chunk> chunks;
  };
  struct ObjectPlace {
    std::string key;
    uint64_t offset = 0;
    uint64_t bytes = 0;
  };
  std::map<std::string, Key> keys_;
  std::vector<ObjectPlace> objects_;
  std::string file_;
};

}  // namespace

std::string MegatronSample::CommonFile(Form form) const {
  TorchSample torch;
  PickleWriter& pickle = torch.pickle;
  BeginDict(pickle);
  pickle.String("args");
  Arguments(pickle);
  Entry(pickle, "iteration", 7);
  if (form == Form::kReshardable || form == Form::kShifted) {
    const bool list = config_.ep > 1;
    pickle.String("optimizer");
    if (list) BeginDict(pickle);
    for (const bool experts : {false, true}) {
      if (experts && !list) continue;
      if (list) pickle.Int(experts ? 1 : 0);
      BeginDict(pickle);
      pickle.String("optimizer");
      BeginDict(pickle);
      if (config_.distributed) {
        Groups(pickle, experts, nullptr);
      } else {
        pickle.String("state");
        BeginDict(pickle);
        pickle.String("common_step");
        torch.Tensor(Dtype::kFloat32, Bytes({3.0F}, Dtype::kFloat32), {});
        pickle.SetItems();
      }
      pickle.SetItems();
      pickle.SetItems();
    }
    if (list) pickle.SetItems();
  }
  pickle.SetItems();
  return std::move(torch).Bytes();
}

MegatronSample::Files MegatronSample::TorchDist(Form form) const {
  DistFile file;
  // A local part as the chunk or chunks that it is, under a key with a layer and an expert axis.
  const auto add = [&](const std::string& prefix, const Local& local, Dtype dtype,
                       const std::vector<float>& values) {
    const Parameter& parameter = *local.parameter;
    std::vector<uint64_t> shape = parameter.shape;
    std::vector<uint64_t> lo(shape.size(), 0);
    std::vector<uint64_t> size = local.shape;
    const uint64_t halves = parameter.cut == Cut::kHalves ? 2 : 1;
    if (parameter.cut == Cut::kColumns) lo[1] = size[1] * local.rank;
    if (parameter.cut == Cut::kRows || halves == 2) lo[0] = size[0] / halves * local.rank;
    size[0] /= halves;
    std::vector<uint64_t> before;
    if (parameter.expert.has_value()) {
      before.insert(before.begin(), *parameter.expert);
      shape.insert(shape.begin(), config_.experts);
    }
    if (parameter.layer.has_value()) {
      before.insert(before.begin(), *parameter.layer);
      shape.insert(shape.begin(), Layers());
    }
    for (uint64_t half = 0; half < halves; ++half) {
      std::vector<uint64_t> offsets = before;
      offsets.insert(offsets.end(), lo.begin(), lo.end());
      offsets[before.size()] += half * parameter.shape[0] / 2;
      std::vector<uint64_t> sizes(before.size(), 1);
      sizes.insert(sizes.end(), size.begin(), size.end());
      const auto begin = values.begin() + static_cast<ptrdiff_t>(half * values.size() / halves);
      const std::vector<float> part(begin, begin + static_cast<ptrdiff_t>(values.size() / halves));
      file.Tensor(prefix + parameter.key, dtype, shape, offsets, sizes, Bytes(part, dtype));
    }
  };
  const bool apart = config_.ep > 1;
  for (uint32_t stage = 0; stage < config_.pp; ++stage) {
    for (const bool experts : {false, true}) {
      if (experts && !apart) continue;
      const uint32_t expert_ranks = experts ? config_.ep : 1;
      const uint32_t tensor_ranks = experts ? config_.etp : config_.tp;
      for (uint32_t expert = 0; expert < expert_ranks; ++expert) {
        for (uint32_t tensor = 0; tensor < tensor_ranks; ++tensor) {
          const uint32_t group = (stage * expert_ranks + expert) * tensor_ranks + tensor;
          std::string prefix = apart ? absl::StrFormat("chained_%d.", experts ? 1 : 0) : "";
          absl::StrAppendFormat(&prefix, "optimizer.distributed.dp_group_idx_%d.", group);
          for (uint32_t chunk = 0; chunk < config_.vpp; ++chunk) {
            const auto locals = Locals(stage, chunk, tensor, expert,
                                       apart ? std::optional<bool>(experts) : std::nullopt);
            const Layout layout = LayOut(locals, stage, chunk, experts);
            std::map<std::string, std::vector<float>> buffers;
            std::map<std::string, std::vector<float>> arrays;  // without the padding of buckets
            for (const char* state : {"fp32", "exp_avg", "exp_avg_sq"}) {
              buffers[state] = Buffer(locals, layout, state);
              arrays[state] = WithoutPadding(buffers[state], layout);
              arrays[state].resize(layout.padded, 0.0F);
            }
            for (size_t i = 0; i < locals.size(); ++i) {
              const Local& local = locals[i];
              // Every rank with the whole of a parameter would write it; one does. And the copy of
              // a tied embedding is the embedding.
              const bool copy = local.parameter->shared && local.name == "output_layer.weight";
              if ((local.parameter->cut == Cut::kWhole && local.rank > 0) || copy) continue;
              const auto part = [&](const std::string& state) {
                return Part(local.parameter->states.at(state), local.parameter->shape,
                            local.parameter->cut, local.rank, local.ranks);
              };
              add("", local, config_.weights, part("fp32"));
              if (form == Form::kBuckets || form == Form::kGathered) continue;
              for (const char* state : {"fp32", "exp_avg", "exp_avg_sq"}) {
                std::string key = state;
                if (key == "fp32") {
                  if (!config_.distributed && config_.weights == Dtype::kFloat32) continue;
                  key = config_.distributed ? "param" : "fp32_param";
                }
                std::vector<float> values = part(state);
                if (form == Form::kShifted) {
                  // Places of the padded buffer, used in the array without padding.
                  const auto begin =
                      arrays[state].begin() + static_cast<ptrdiff_t>(layout.begins[i]);
                  values.assign(begin, begin + static_cast<ptrdiff_t>(values.size()));
                }
                add(absl::StrCat("optimizer.state.", key, "."), local, Dtype::kFloat32, values);
              }
            }
            if (form != Form::kBuckets) continue;
            for (size_t b = 0; b < layout.bucket_begins.size(); ++b) {
              for (const char* state : {"fp32", "exp_avg", "exp_avg_sq"}) {
                const std::vector<float>& buffer = buffers[state];
                const uint64_t begin = layout.bucket_begins[b];
                const uint64_t end = layout.bucket_ends[b];
                const uint64_t share = (layout.bucket_padded_ends[b] - begin) / config_.dp;
                const std::string key = absl::StrFormat(
                    "%sgbuf_idx_%d.dtype_(torch.bfloat16, torch.float32).bucket_idx_%d.%s", prefix,
                    chunk, b, std::string_view(state) == "fp32" ? "param" : state);
                for (uint64_t at = begin; at < end; at += share) {
                  const uint64_t stop = std::min(end, at + share);
                  const std::vector<float> values(buffer.begin() + static_cast<ptrdiff_t>(at),
                                                  buffer.begin() + static_cast<ptrdiff_t>(stop));
                  file.Tensor(key, Dtype::kFloat32, {end - begin}, {at - begin}, {stop - at},
                              Bytes(values, Dtype::kFloat32));
                }
              }
            }
          }
          if (form == Form::kGathered) {
            TorchSample gathered;
            gathered.pickle.EmptyList();
            gathered.pickle.Mark();
            Gathered(gathered, stage, tensor, expert,
                     apart ? std::optional<bool>(experts) : std::nullopt);
            gathered.pickle.Appends();
            file.Object(prefix + "param_state/shard_0_1", std::move(gathered));
          }
          if (form != Form::kBuckets && form != Form::kGathered) continue;
          TorchSample object;
          object.pickle.EmptyList();
          object.pickle.Mark();
          BeginDict(object.pickle);
          Groups(object.pickle, experts, nullptr);
          object.pickle.SetItems();
          object.pickle.Appends();
          file.Object(prefix + "optimizer/shard_0_1", std::move(object));
        }
      }
    }
  }
  Files files;
  files["latest_checkpointed_iteration.txt"] = "7\n";
  files["iter_0000007/common.pt"] = CommonFile(form);
  file.Into(files, "iter_0000007/");
  return files;
}

}  // namespace holdfast::converter
