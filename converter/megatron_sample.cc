#include "converter/megatron_sample.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <span>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "converter/rounding.h"

namespace holdfast::converter {
namespace {

constexpr uint64_t kHidden = 8, kHeads = 24, kUnits = 16, kVocabulary = 32;

uint64_t Product(const std::vector<uint64_t>& shape) {
  return std::accumulate(shape.begin(), shape.end(), uint64_t{1}, std::multiplies<>());
}

uint64_t Up(uint64_t value, uint64_t multiple) {
  while (value % multiple != 0) ++value;
  return value;
}

}  // namespace

// ------------------------------------------------------------------ the model

MegatronSample::MegatronSample(const MegatronSampleConfig& config) : config_(config) {
  CHECK(config.tp % config.etp == 0 && config.etp * config.ep % config.tp == 0);
  const uint64_t units = config_.gated ? 2 * kUnits : kUnits;
  Add("embedding.word_embeddings.weight", Cut::kRows, {kVocabulary, kHidden}, {}, {});
  for (uint32_t layer = 0; layer < Layers(); ++layer) {
    const auto add = [&](const std::string& name, Cut cut, std::vector<uint64_t> shape,
                         std::optional<uint32_t> expert = {}) {
      Add(name, cut, std::move(shape), layer, expert);
    };
    add("input_layernorm.weight", Cut::kWhole, {kHidden});
    add("self_attention.linear_proj.weight", Cut::kColumns, {kHidden, kHidden});
    if (config_.bias) add("self_attention.linear_proj.bias", Cut::kWhole, {kHidden});
    add("self_attention.linear_qkv.weight", Cut::kRows, {kHeads, kHidden});
    if (config_.bias) add("self_attention.linear_qkv.bias", Cut::kRows, {kHeads});
    add("pre_mlp_layernorm.weight", Cut::kWhole, {kHidden});
    const Cut first = config_.gated ? Cut::kHalves : Cut::kRows;
    if (config_.experts == 0) {
      add("mlp.linear_fc1.weight", first, {units, kHidden});
      if (config_.bias) add("mlp.linear_fc1.bias", first, {units});
      add("mlp.linear_fc2.weight", Cut::kColumns, {kHidden, kUnits});
      if (config_.bias) add("mlp.linear_fc2.bias", Cut::kWhole, {kHidden});
      continue;
    }
    add("mlp.router.weight", Cut::kWhole, {config_.experts, kHidden});
    for (uint32_t expert = 0; expert < config_.experts; ++expert) {
      add("linear_fc1.weight", first, {units, kHidden}, expert);
      add("linear_fc2.weight", Cut::kColumns, {kHidden, kUnits}, expert);
    }
  }
  Add("decoder.final_layernorm.weight", Cut::kWhole, {kHidden}, {}, {});
  if (!config_.tied || config_.pp > 1) {
    Add("output_layer.weight", Cut::kRows, {kVocabulary, kHidden}, {}, {});
  }
  std::mt19937_64 random(config_.seed);
  std::normal_distribution<float> normal;
  for (Parameter& parameter : parameters_) {
    for (const char* state : {"fp32", "exp_avg", "exp_avg_sq"}) {
      std::vector<float>& values = parameter.states[state];
      values.resize(Product(parameter.shape));
      for (float& value : values) value = normal(random);
    }
  }
  if (config_.tied && config_.pp > 1) {
    parameters_.back().states = parameters_.front().states;
    parameters_.front().shared = parameters_.back().shared = true;
  }
}

void MegatronSample::Add(std::string name, Cut cut, std::vector<uint64_t> shape,
                         std::optional<uint32_t> layer, std::optional<uint32_t> expert) {
  Parameter parameter{.name = name,
                      .key = name,
                      .layer = layer,
                      .expert = expert,
                      .cut = cut,
                      .shape = std::move(shape),
                      .states = {}};
  if (layer.has_value()) {
    std::string key = name;
    if (name == "input_layernorm.weight") key = "self_attention.linear_qkv.layer_norm_weight";
    if (name == "pre_mlp_layernorm.weight") key = "mlp.linear_fc1.layer_norm_weight";
    if (expert.has_value()) {
      key = absl::StrCat("mlp.experts.experts.", name);
      name = absl::StrCat("mlp.experts.local_experts.", *expert, ".", name);
    }
    parameter.name = absl::StrCat("decoder.layers.", *layer, ".", name);
    parameter.key = absl::StrCat("decoder.layers.", key);
  }
  parameters_.push_back(std::move(parameter));
}

std::string MegatronSample::Bytes(const std::vector<float>& values, Dtype dtype) const {
  std::string bytes(values.size() * ElementBytes(dtype), '\0');
  const auto out = std::as_writable_bytes(std::span(bytes.data(), bytes.size()));
  if (dtype == Dtype::kFloat32) {
    std::memcpy(bytes.data(), values.data(), bytes.size());
  } else {
    RoundElements(Dtype::kFloat32, dtype, std::as_bytes(std::span(values)), out);
  }
  return bytes;
}

std::vector<float> MegatronSample::Part(const std::vector<float>& values,
                                        const std::vector<uint64_t>& shape, Cut cut, uint32_t rank,
                                        uint32_t ranks) {
  if (cut == Cut::kWhole || ranks == 1) return values;
  const uint64_t columns = shape.size() == 2 ? shape[1] : 1;
  std::vector<float> part;
  for (uint64_t row = 0; row < shape[0]; ++row) {
    for (uint64_t column = 0; column < columns; ++column) {
      const uint64_t half = shape[0] / 2;
      const uint64_t owner = cut == Cut::kRows      ? row * ranks / shape[0]
                             : cut == Cut::kColumns ? column * ranks / columns
                                                    : row % half * ranks / half;
      if (owner == rank) part.push_back(values[row * columns + column]);
    }
  }
  return part;
}

uint32_t MegatronSample::LayersOf(uint32_t stage) const {
  if (stage == 0 && config_.first.has_value()) return *config_.first / config_.vpp;
  if (stage + 1 == config_.pp && config_.last.has_value()) return *config_.last / config_.vpp;
  return config_.layers_per_chunk;
}

uint32_t MegatronSample::FirstLayer(uint32_t stage, uint32_t chunk) const {
  uint32_t layer = 0;
  for (uint32_t before = 0; before < chunk * config_.pp + stage; ++before) {
    layer += LayersOf(before % config_.pp);
  }
  return layer;
}

std::vector<MegatronSample::Local> MegatronSample::Locals(uint32_t stage, uint32_t chunk,
                                                          uint32_t tensor, uint32_t expert_rank,
                                                          std::optional<bool> experts) const {
  std::vector<Local> locals;
  const uint32_t here = chunk * config_.pp + stage;
  const uint32_t places = config_.pp * config_.vpp;
  for (const Parameter& parameter : parameters_) {
    const bool expert = parameter.expert.has_value();
    if (experts.has_value() && expert != *experts) continue;
    std::string name = parameter.name;
    if (parameter.layer.has_value()) {
      const uint32_t begin = FirstLayer(stage, chunk);
      if (*parameter.layer < begin || *parameter.layer >= begin + LayersOf(stage)) continue;
      name.replace(0, absl::StrCat("decoder.layers.", *parameter.layer).size(),
                   absl::StrCat("decoder.layers.", *parameter.layer - begin));
    } else if (parameter.name.starts_with("embedding.") ? here != 0 : here + 1 != places) {
      continue;
    }
    Local local{
        .parameter = &parameter, .name = {}, .rank = tensor, .ranks = config_.tp, .shape = {}};
    if (expert) {
      const uint32_t per_rank = config_.experts / config_.ep;
      if (*parameter.expert / per_rank != expert_rank) continue;
      const std::string global = absl::StrCat(".local_experts.", *parameter.expert, ".");
      name.replace(name.find(global), global.size(),
                   absl::StrCat(".local_experts.", *parameter.expert % per_rank, "."));
      local.rank = tensor % config_.etp;
      local.ranks = config_.etp;
    }
    local.name = std::move(name);
    local.shape = parameter.shape;
    if (parameter.cut == Cut::kColumns) local.shape[1] /= local.ranks;
    if (parameter.cut == Cut::kRows || parameter.cut == Cut::kHalves) local.shape[0] /= local.ranks;
    locals.push_back(std::move(local));
  }
  return locals;
}

MegatronSample::Layout MegatronSample::LayOut(const std::vector<Local>& locals, uint32_t stage,
                                              uint32_t chunk, bool experts) const {
  const uint64_t ranks =
      experts ? config_.dp * config_.tp / (config_.ep * config_.etp) : config_.dp;
  const uint64_t multiple = std::lcm(ranks, uint64_t{128});
  const bool buckets = config_.bucket.has_value() && stage == 0 && chunk == 0;
  Layout layout;
  layout.begins.resize(locals.size());
  layout.paddings.resize(locals.size());
  uint64_t at = 0;
  uint64_t begin = 0;
  const auto close = [&](uint64_t end) {
    layout.bucket_begins.push_back(begin);
    layout.bucket_ends.push_back(end);
    begin = at = Up(end, multiple);
    layout.bucket_padded_ends.push_back(begin);
    layout.unpadded += end - layout.bucket_begins.back();
  };
  bool open = false;
  for (size_t i = locals.size(); i-- > 0;) {
    at = Up(at, 64);
    const bool shared = locals[i].parameter->shared;
    if (shared && open) close(at);
    layout.begins[i] = at;
    layout.paddings[i] = begin - layout.unpadded;
    at += Product(locals[i].shape);
    open = true;
    if (shared || (buckets && at - begin >= *config_.bucket)) {
      close(at);
      open = false;
    }
  }
  if (open) close(at);
  layout.padded = begin;
  return layout;
}

std::vector<float> MegatronSample::Buffer(const std::vector<Local>& locals, const Layout& layout,
                                          const std::string& state) const {
  // Gaps hold what memory held: something that no reader may take for a value.
  std::vector<float> buffer(layout.padded, 12345.0F);
  for (size_t i = 0; i < locals.size(); ++i) {
    const Local& local = locals[i];
    const std::vector<float> part = Part(local.parameter->states.at(state), local.parameter->shape,
                                         local.parameter->cut, local.rank, local.ranks);
    std::ranges::copy(part, buffer.begin() + static_cast<ptrdiff_t>(layout.begins[i]));
  }
  return buffer;
}

std::vector<float> MegatronSample::WithoutPadding(const std::vector<float>& buffer,
                                                  const Layout& layout) {
  std::vector<float> values;
  for (size_t b = 0; b < layout.bucket_begins.size(); ++b) {
    values.insert(values.end(), buffer.begin() + static_cast<ptrdiff_t>(layout.bucket_begins[b]),
                  buffer.begin() + static_cast<ptrdiff_t>(layout.bucket_ends[b]));
  }
  return values;
}

std::map<std::pair<std::string, std::string>, MegatronSample::Truth> MegatronSample::Expected()
    const {
  std::map<std::pair<std::string, std::string>, Truth> expected;
  for (const Parameter& parameter : parameters_) {
    const auto& master = parameter.states.at("fp32");
    expected[{parameter.name, "param"}] = {config_.weights, parameter.shape,
                                           Bytes(master, config_.weights)};
    for (const auto& [state, values] : parameter.states) {
      // An ordinary optimizer of fp32 weights has no masters beside them.
      if (state == "fp32" && !config_.distributed && config_.weights == Dtype::kFloat32) continue;
      expected[{parameter.name, state}] = {Dtype::kFloat32, parameter.shape,
                                           Bytes(values, Dtype::kFloat32)};
    }
    expected[{parameter.name, "step"}] = {Dtype::kFloat32, {}, Bytes({3.0F}, Dtype::kFloat32)};
  }
  return expected;
}

// ------------------------------------------------------------------ what both forms have

void MegatronSample::Arguments(PickleWriter& pickle) const {
  pickle.Global("argparse", "Namespace");
  pickle.Tuple(0);
  pickle.NewObject();
  BeginDict(pickle);
  Entry(pickle, "tensor_model_parallel_size", config_.tp);
  Entry(pickle, "pipeline_model_parallel_size", config_.pp);
  pickle.String("virtual_pipeline_model_parallel_size");
  if (config_.vpp > 1) {
    pickle.Int(config_.vpp);
  } else {
    pickle.None();
  }
  Entry(pickle, "expert_model_parallel_size", config_.ep);
  Entry(pickle, "expert_tensor_parallel_size", config_.etp);
  Entry(pickle, "data_parallel_size", config_.dp);
  Entry(pickle, "num_attention_heads", 4);
  Entry(pickle, "num_layers", static_cast<int64_t>(Layers()));
  if (config_.first.has_value()) Entry(pickle, "decoder_first_pipeline_num_layers", *config_.first);
  if (config_.last.has_value()) Entry(pickle, "decoder_last_pipeline_num_layers", *config_.last);
  Flag(pickle, "swiglu", config_.gated);
  Flag(pickle, "untie_embeddings_and_output_weights", !config_.tied);
  Flag(pickle, "use_distributed_optimizer", config_.distributed);
  Flag(pickle, "overlap_grad_reduce", config_.bucket.has_value());
  pickle.String("ddp_bucket_size");
  if (config_.bucket.has_value()) {
    pickle.Int(static_cast<int64_t>(*config_.bucket));
  } else {
    pickle.None();
  }
  if (config_.free_layout) {
    pickle.String("pipeline_model_parallel_layout");
    pickle.String("Et|tL");
  }
  pickle.String("transformer_impl");
  pickle.String("local");
  pickle.SetItems();
  pickle.Build();
}

void MegatronSample::Groups(PickleWriter& pickle, bool experts,
                            const std::vector<std::vector<int64_t>>* ids) const {
  pickle.String("param_groups");
  pickle.EmptyList();
  pickle.Mark();
  for (size_t g = 0; g < 2; ++g) {
    BeginDict(pickle);
    pickle.String("wd_mult");
    pickle.Float(g == 0 ? 1.0 : 0.0);
    Flag(pickle, "is_expert_parallel", experts);
    if (ids == nullptr) {
      pickle.String("step");
      pickle.Float(3.0);
    } else {
      pickle.String("params");
      pickle.EmptyList();
      pickle.Mark();
      for (const int64_t id : (*ids)[g]) pickle.Int(id);
      pickle.Appends();
    }
    pickle.SetItems();
  }
  pickle.Appends();
}

// ------------------------------------------------------------------ legacy

void MegatronSample::OrdinaryOptimizer(TorchSample& torch, const std::vector<Local>& locals,
                                       bool experts) const {
  PickleWriter& pickle = torch.pickle;
  std::vector<std::vector<int64_t>> ids(2);
  std::vector<std::vector<const Local*>> groups(2);
  for (const Local& local : locals) {
    const bool decayed = local.shape.size() != 1 && !local.name.ends_with(".bias");
    groups[decayed ? 0 : 1].push_back(&local);
  }
  const auto part = [](const Local& local, const std::string& state) {
    return Part(local.parameter->states.at(state), local.parameter->shape, local.parameter->cut,
                local.rank, local.ranks);
  };
  const bool masters = config_.weights != Dtype::kFloat32;
  if (masters) {
    BeginDict(pickle);
    pickle.String("optimizer");
  }
  BeginDict(pickle);
  pickle.String("state");
  BeginDict(pickle);
  int64_t id = 0;
  for (size_t g = 0; g < 2; ++g) {
    for (const Local* const local : groups[g]) {
      ids[g].push_back(id);
      pickle.Int(id++);
      BeginDict(pickle);
      pickle.String("step");
      torch.Tensor(Dtype::kFloat32, Bytes({3.0F}, Dtype::kFloat32), {});
      for (const char* state : {"exp_avg", "exp_avg_sq"}) {
        pickle.String(state);
        torch.Tensor(Dtype::kFloat32, Bytes(part(*local, state), Dtype::kFloat32), local->shape);
      }
      pickle.SetItems();
    }
  }
  pickle.SetItems();
  Groups(pickle, experts, &ids);
  pickle.SetItems();
  if (!masters) return;
  pickle.String("fp32_from_fp16_params");
  pickle.EmptyList();
  pickle.Mark();
  for (const auto& group : groups) {
    pickle.EmptyList();
    pickle.Mark();
    for (const Local* const local : group) {
      torch.Tensor(Dtype::kFloat32, Bytes(part(*local, "fp32"), Dtype::kFloat32), local->shape);
    }
    pickle.Appends();
  }
  pickle.Appends();
  pickle.SetItems();
}

std::string MegatronSample::ModelFile(uint32_t stage, uint32_t tensor, uint32_t expert) const {
  TorchSample torch;
  PickleWriter& pickle = torch.pickle;
  BeginDict(pickle);
  pickle.String("args");
  Arguments(pickle);
  Entry(pickle, "iteration", 7);
  pickle.String("opt_param_scheduler");
  BeginDict(pickle);
  Entry(pickle, "num_steps", 56);
  pickle.SetItems();
  for (uint32_t chunk = 0; chunk < config_.vpp; ++chunk) {
    pickle.String(config_.vpp > 1 ? absl::StrCat("model", chunk) : "model");
    // One storage per buffer: of dense parameters, and of experts where they are parallel.
    std::map<std::string, std::pair<uint32_t, uint64_t>> places;
    for (const bool experts : {false, true}) {
      if (experts && config_.ep == 1) continue;
      const auto locals = Locals(stage, chunk, tensor, expert,
                                 config_.ep > 1 ? std::optional<bool>(experts) : std::nullopt);
      const Layout layout = LayOut(locals, stage, chunk, experts);
      const uint32_t storage =
          torch.AddStorage(config_.weights, Bytes(Buffer(locals, layout, "fp32"), config_.weights));
      for (size_t i = 0; i < locals.size(); ++i) {
        places[locals[i].name] = {storage, layout.begins[i]};
      }
    }
    BeginDict(pickle);
    for (const Local& local : Locals(stage, chunk, tensor, expert, {})) {
      pickle.String(local.name);
      torch.Tensor(places.at(local.name).first, places.at(local.name).second, local.shape);
    }
    pickle.String("decoder.final_layernorm._extra_state");
    pickle.None();
    pickle.SetItems();
  }
  pickle.String("optimizer");
  const bool list = config_.ep > 1;
  if (list) {
    pickle.EmptyList();
    pickle.Mark();
  }
  for (const bool experts : {false, true}) {
    if (experts && !list) continue;
    if (config_.distributed) {
      BeginDict(pickle);
      pickle.String("optimizer");
      BeginDict(pickle);
      Groups(pickle, experts, nullptr);
      pickle.SetItems();
      pickle.SetItems();
      continue;
    }
    std::vector<Local> all;
    for (uint32_t chunk = 0; chunk < config_.vpp; ++chunk) {
      const auto locals =
          Locals(stage, chunk, tensor, expert, list ? std::optional<bool>(experts) : std::nullopt);
      all.insert(all.end(), locals.begin(), locals.end());
    }
    OrdinaryOptimizer(torch, all, experts);
  }
  if (list) pickle.Appends();
  pickle.SetItems();
  return std::move(torch).Bytes();
}

void MegatronSample::Gathered(TorchSample& torch, uint32_t stage, uint32_t tensor, uint32_t expert,
                              std::optional<bool> experts) const {
  PickleWriter& pickle = torch.pickle;
  BeginDict(pickle);
  Flag(pickle, "buckets_coalesced", true);
  for (uint32_t chunk = 0; chunk < config_.vpp; ++chunk) {
    const auto locals = Locals(stage, chunk, tensor, expert, experts);
    const Layout layout = LayOut(locals, stage, chunk, experts.value_or(false));
    pickle.Int(chunk);
    BeginDict(pickle);
    pickle.Global("torch", config_.weights == Dtype::kBfloat16 ? "bfloat16" : "float32");
    pickle.Global("torch", "float32");
    pickle.Tuple(2);
    BeginDict(pickle);
    for (const char* state : {"fp32", "exp_avg", "exp_avg_sq"}) {
      pickle.String(std::string_view(state) == "fp32" ? "param" : state);
      const auto values = WithoutPadding(Buffer(locals, layout, state), layout);
      torch.Tensor(Dtype::kFloat32, Bytes(values, Dtype::kFloat32), {values.size()});
    }
    Entry(pickle, "numel_unpadded", static_cast<int64_t>(layout.unpadded));
    pickle.SetItems();
    pickle.SetItems();
  }
  pickle.SetItems();
}

std::string MegatronSample::OptimizerFile(uint32_t stage, uint32_t tensor, uint32_t expert,
                                          Dense dense) const {
  TorchSample torch;
  PickleWriter& pickle = torch.pickle;
  const bool list = config_.ep > 1;
  if (list) {
    pickle.EmptyList();
    pickle.Mark();
  }
  for (const bool experts : {false, true}) {
    if (experts && !list) continue;
    if (!experts && dense == Dense::kElsewhere) {
      pickle.None();
      continue;
    }
    Gathered(torch, stage, tensor, expert, list ? std::optional<bool>(experts) : std::nullopt);
  }
  if (list) pickle.Appends();
  return std::move(torch).Bytes();
}

MegatronSample::Files MegatronSample::Legacy() const {
  Files files;
  files["latest_checkpointed_iteration.txt"] = "7";
  for (uint32_t stage = 0; stage < config_.pp; ++stage) {
    // The first ranks of the stage, until experts' data parallelism repeats them: both kinds of
    // tensor-parallel ranks count along the same ranks. The first `tp` have the dense states.
    for (uint32_t rank = 0; rank < config_.etp * config_.ep; ++rank) {
      const uint32_t tensor = rank % config_.tp;
      const uint32_t expert = rank / config_.etp;
      std::string directory = absl::StrFormat("iter_0000007/mp_rank_%02d", tensor);
      if (config_.pp > 1) absl::StrAppendFormat(&directory, "_%03d", stage);
      if (config_.ep > 1) absl::StrAppendFormat(&directory, "_%03d", expert);
      files[directory + "/model_optim_rng.pt"] = ModelFile(stage, tensor, expert);
      if (!config_.distributed) continue;
      files[directory + "/distrib_optim.pt"] = OptimizerFile(
          stage, tensor, expert, rank < config_.tp ? Dense::kHere : Dense::kElsewhere);
    }
  }
  return files;
}

}  // namespace holdfast::converter
