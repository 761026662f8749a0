#include "converter/megatron_reader.h"

#include <algorithm>
#include <array>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "converter/deepspeed_states.h"
#include "converter/megatron_model.h"
#include "converter/megatron_optimizer.h"
#include "converter/megatron_state.h"
#include "converter/names_file.h"
#include "converter/torch_index.h"

namespace holdfast::converter {
namespace {

constexpr size_t kFactBytesMax = size_t{1} << 16;

// What a rank's file holds beside tensors of the model: for display, of the first rank.
absl::Status AddFacts(const TorchValue& root, ForeignIndex& index) {
  ASSIGN_OR_RETURN(const size_t count, root.EntryCount());
  for (size_t i = 0; i < count; ++i) {
    if (!root.Key(i).Is(TorchValue::Kind::kString)) continue;
    ASSIGN_OR_RETURN(const std::string_view key, root.Key(i).String());
    if (key.starts_with("model") || key == "optimizer" || key == "rng_state") continue;
    const TorchValue value = root.Entry(i);
    const TorchValue attributes = value.attributes();  // of argparse.Namespace
    index.scalars.push_back(
        {std::string(key), TorchJson(attributes.present() ? attributes : value, kFactBytesMax)});
  }
  const std::vector<TorchValue> optimizers = MegatronOptimizers(root.Find("optimizer"));
  for (size_t i = 0; i < optimizers.size(); ++i) {
    const std::string name = optimizers.size() == 1 ? "" : absl::StrCat(i, ".");
    const TorchValue inner = MegatronInnerOptimizer(optimizers[i]);
    if (inner.present() && inner.Find("param_groups").present()) {
      index.scalars.push_back({absl::StrCat("optimizer.", name, "param_groups"),
                               TorchJson(inner.Find("param_groups"), kFactBytesMax)});
    }
    const TorchValue scaler = optimizers[i].Find("grad_scaler");
    if (scaler.present()) {
      index.scalars.push_back(
          {absl::StrCat("optimizer.", name, "grad_scaler"), TorchJson(scaler, kFactBytesMax)});
    }
  }
  return absl::OkStatus();
}

// Random states are each rank's own: tensors get the rank's name in front, the rest is shown.
absl::Status AddRandomStates(const MegatronRank& rank, PieceTable& table) {
  const TorchValue states = rank.torch->root().Find("rng_state");
  if (!states.Is(TorchValue::Kind::kList) && !states.Is(TorchValue::Kind::kTuple)) {
    return absl::OkStatus();
  }
  ASSIGN_OR_RETURN(const size_t count, states.ArraySize());
  const auto add = [&](const std::string& name, const TorchValue& value) -> absl::Status {
    if (value.Is(TorchValue::Kind::kTensor)) {
      ASSIGN_OR_RETURN(const TorchTensor* const tensor, value.Tensor());
      ASSIGN_OR_RETURN(const StoredTensor stored, Locate(*rank.torch, rank.files->model, *tensor));
      ASSIGN_OR_RETURN(const uint32_t number, table.State(name, "rng", stored.dtype, stored.shape));
      return table.AddWhole(number, stored);
    }
    table.index().scalars.push_back({name, TorchJson(value, kFactBytesMax)});
    return absl::OkStatus();
  };
  for (size_t i = 0; i < count; ++i) {
    if (!states[i].Is(TorchValue::Kind::kDict)) continue;
    ASSIGN_OR_RETURN(const size_t keys, states[i].EntryCount());
    for (size_t k = 0; k < keys; ++k) {
      const std::string name = absl::StrFormat("%s.rng_state.%d.%s", rank.files->directory, i,
                                               TorchKeyText(states[i].Key(k)));
      const TorchValue value = states[i].Entry(k);
      if (!value.Is(TorchValue::Kind::kDict)) {
        RETURN_IF_ERROR(add(name, value));
        continue;
      }
      ASSIGN_OR_RETURN(const size_t trackers, value.EntryCount());
      for (size_t t = 0; t < trackers; ++t) {
        RETURN_IF_ERROR(add(absl::StrCat(name, ".", TorchKeyText(value.Key(t))), value.Entry(t)));
      }
    }
  }
  return absl::OkStatus();
}

// What the tensors of the index are not.
void Keep(const ForeignFolder& folder, const MegatronModel& model, ForeignIndex& index) {
  MegatronKeeper keeper(folder);
  for (const MegatronRank& rank : model.ranks()) {
    const MegatronKeptFrom from{
        .torch = rank.torch.get(), .file = rank.files->model, .begin_bytes = 0};
    const TorchValue root = rank.torch->root();
    if (&rank == &model.ranks().front()) {
      keeper.AddCommon(from, root);
      uint32_t number = 0;
      for (const TorchValue& optimizer : MegatronOptimizers(root.Find("optimizer"))) {
        keeper.AddOptimizer(from, number++, optimizer);
      }
    }
    keeper.AddRandom(from, absl::StrCat(rank.stage, ".", rank.tensor, ".", rank.expert),
                     root.Find("rng_state"));
    for (const MegatronExtra& extra : rank.extras) {
      keeper.AddExtra(from, extra.global, extra.value);
    }
  }
  keeper.Finish(index);
}

}  // namespace

void DescribeMegatron(const MegatronFiles& files, const MegatronArguments& arguments,
                      ForeignIndex& index) {
  if (!files.tag.empty()) index.layout.push_back({"tag", JsonQuote(files.tag)});
  if (!arguments.present) {
    index.notes.push_back("no training arguments (args): degrees of parallelism are not known");
    return;
  }
  const std::array<std::pair<const char*, uint64_t>, 6> degrees = {{
      {"tp", arguments.tensor_ranks},
      {"pp", arguments.pipeline_ranks},
      {"vpp", arguments.virtual_stages},
      {"ep", arguments.expert_ranks},
      {"etp", arguments.expert_tensor_ranks},
      {"dp", arguments.data_ranks},
  }};
  for (const auto& [name, degree] : degrees) index.layout.push_back({name, absl::StrCat(degree)});
}

absl::Status AddMegatronFacts(const TorchValue& root, ForeignIndex& index) {
  RETURN_IF_ERROR(AddFacts(root, index));
  const TorchValue iteration = root.Find("iteration");
  if (iteration.Is(TorchValue::Kind::kInteger)) {
    const absl::StatusOr<uint64_t> step = iteration.Uint64();
    if (step.ok()) {
      index.has_step = true;
      index.step = *step;
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<bool> RecognizesMegatron(const ForeignFolder& folder) {
  return HoldsMegatron(folder);
}

absl::StatusOr<ForeignIndex> ReadMegatron(const ForeignFolder& folder, const ReadOptions& options) {
  ASSIGN_OR_RETURN(const MegatronFiles files, FindMegatronFiles(folder, options.tag));
  return files.kind == MegatronFiles::Kind::kLegacy ? ReadMegatronLegacy(folder, files, options)
                                                    : ReadMegatronDist(folder, files, options);
}

absl::StatusOr<ForeignIndex> ReadMegatronLegacy(const ForeignFolder& folder,
                                                const MegatronFiles& files,
                                                const ReadOptions& options) {
  ASSIGN_OR_RETURN(const NamesFile names, ParseNamesFile(options.names));
  PieceTable table;
  ASSIGN_OR_RETURN(const std::unique_ptr<MegatronModel> model,
                   MegatronModel::Read(folder, files, table));
  MegatronOptimizer optimizer(folder, *model, names.parameters, table);
  RETURN_IF_ERROR(optimizer.FindStates());
  RETURN_IF_ERROR(model->AddWeights());
  RETURN_IF_ERROR(optimizer.AddStates());
  bool distributed = false;
  for (const MegatronRank& rank : model->ranks()) {
    distributed = distributed || rank.files->optimizer.has_value();
    RETURN_IF_ERROR(AddRandomStates(rank, table));
  }
  table.index().variant = distributed ? "legacy, distributed optimizer" : "legacy";
  DescribeMegatron(files, model->arguments(), table.index());
  RETURN_IF_ERROR(AddMegatronFacts(model->ranks().front().torch->root(), table.index()));
  Keep(folder, *model, table.index());
  return table.Take();
}

}  // namespace holdfast::converter
