#include "converter/megatron_state.h"

#include <algorithm>
#include <array>
#include <optional>
#include <span>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/pickle_copy.h"
#include "base/pickle_reader.h"
#include "base/status_macros.h"
#include "converter/torch_index.h"

namespace holdfast::converter {
namespace {

constexpr std::string_view kTensorId = "tensor";
constexpr std::array<std::string_view, 3> kNotCommon = {"optimizer", "rng_state",
                                                        "rerun_state_machine"};

absl::Status BadTensor(const std::string& why) {
  return absl::DataLossError(absl::StrCat("a kept tensor: ", why));
}

// ("tensor", dtype, shape, bytes).
absl::Status PushKeptTensor(const TorchValue& id, TorchDraft& draft) {
  if (!id.Is(TorchValue::Kind::kTuple) || *id.ArraySize() != 4 ||
      id[0].String().value_or("") != kTensorId) {
    return BadTensor(
        absl::StrCat("expected (\"tensor\", dtype, shape, bytes), found ", id.Describe()));
  }
  ASSIGN_OR_RETURN(const std::string_view name, id[1].String());
  const std::optional<Dtype> dtype = DtypeFromName(name);
  if (!dtype.has_value()) return BadTensor(absl::StrFormat("dtype %s", name.substr(0, 100)));
  ASSIGN_OR_RETURN(const std::vector<uint64_t> shape, id[2].Uint64s());
  if (shape.size() > kTorchDimsMax) {
    return BadTensor(absl::StrFormat("%d dimensions", shape.size()));
  }
  uint64_t elements = 1;
  for (const uint64_t size : shape) {
    if (__builtin_mul_overflow(elements, size, &elements)) return BadTensor("its shape");
  }
  std::string_view bytes;
  if (elements > 0) {
    ASSIGN_OR_RETURN(bytes, id[3].Bytes());
  }
  if (elements > kMegatronKeptTensorBytesMax || bytes.size() != elements * ElementBytes(*dtype)) {
    return BadTensor(
        absl::StrFormat("expected %d elements, found %d bytes", elements, bytes.size()));
  }
  draft.Given(*dtype, shape, std::string(bytes));
  return absl::OkStatus();
}

}  // namespace

// ------------------------------------------------------------------ what the reader keeps

MegatronKeeper::MegatronKeeper(const ForeignFolder& folder) : folder_(folder) {
  for (Dict* const dict : {&common_, &optimizers_, &random_, &extra_}) {
    dict->out.EmptyDict();
    dict->out.Mark();
  }
}

void MegatronKeeper::AddCommon(const MegatronKeptFrom& from, const TorchValue& root) {
  if (!root.Is(TorchValue::Kind::kDict)) return;
  const size_t count = *root.EntryCount();
  for (size_t i = 0; i < count; ++i) {
    if (!root.Key(i).Is(TorchValue::Kind::kString)) continue;
    const std::string_view key = *root.Key(i).String();
    if (key.starts_with("model") || std::ranges::find(kNotCommon, key) != kNotCommon.end())
      continue;
    AddCommonEntry(from, key, root.Entry(i));
  }
}

void MegatronKeeper::AddCommonEntry(const MegatronKeptFrom& from, std::string_view key,
                                    const TorchValue& value) {
  Add(common_, from, key, value);
}

void MegatronKeeper::AddOptimizer(const MegatronKeptFrom& from, uint32_t number,
                                  const TorchValue& optimizer) {
  if (!optimizer.Is(TorchValue::Kind::kDict)) return;
  TorchValue inner = optimizer;
  if (!inner.Find("param_groups").present()) inner = optimizer.Find("optimizer");
  if (inner.Is(TorchValue::Kind::kDict) && inner.Find("param_groups").present()) {
    Add(optimizers_, from, absl::StrCat(number, ".param_groups"), inner.Find("param_groups"));
  }
  if (const TorchValue scaler = optimizer.Find("grad_scaler"); scaler.present()) {
    Add(optimizers_, from, absl::StrCat(number, ".grad_scaler"), scaler);
  }
}

void MegatronKeeper::AddRandom(const MegatronKeptFrom& from, const std::string& rank,
                               const TorchValue& value) {
  if (value.present()) Add(random_, from, rank, value);
}

void MegatronKeeper::AddExtra(const MegatronKeptFrom& from, const std::string& name,
                              const TorchValue& value) {
  Add(extra_, from, name, value);
}

void MegatronKeeper::Add(Dict& dict, const MegatronKeptFrom& from, std::string_view key,
                         const TorchValue& value) {
  if (dict.full || dict.keys.contains(key)) return;
  PickleWriter trial;  // after an error a writer is of no use
  absl::Status status = Push(from, value, trial);
  if (status.ok() && dict.out.size() + trial.size() > kMegatronBlobBytesMax) {
    dict.full = true;
    status = absl::ResourceExhaustedError(
        absl::StrFormat("it, and what follows: more than %d bytes", kMegatronBlobBytesMax));
  }
  if (!status.ok()) {
    notes_.push_back(absl::StrFormat("%s: \"%s\" is not kept for other formats: %s",
                                     from.torch->name(), TorchText(key), status.message()));
    return;
  }
  dict.keys.emplace(key);
  dict.out.String(key);
  // The same calls as those of the trial: they do not fail.
  if (!Push(from, value, dict.out).ok()) dict.out.None();
}

absl::Status MegatronKeeper::Push(const MegatronKeptFrom& from, const TorchValue& value,
                                  PickleWriter& out) const {
  PickleCopier copier(out, [&](PickleValue each) -> absl::StatusOr<bool> {
    const TorchValue meaning = value.Same(each);
    if (!meaning.Is(TorchValue::Kind::kTensor)) return false;
    ASSIGN_OR_RETURN(const TorchTensor* const tensor, meaning.Tensor());
    RETURN_IF_ERROR(PushTensor(from, *tensor, out));
    return true;
  });
  return copier.Copy(value.pickle());
}

absl::Status MegatronKeeper::PushTensor(const MegatronKeptFrom& from, const TorchTensor& tensor,
                                        PickleWriter& out) const {
  const TorchStorage& storage = from.torch->storages()[tensor.storage];
  if (!tensor.IsContiguous() || tensor.conj || tensor.neg || from.torch->big_endian() ||
      !storage.written || tensor.Bytes() > kMegatronKeptTensorBytesMax) {
    return absl::UnimplementedError(absl::StrFormat(
        "a tensor of %d bytes that is large, or not stored as it is", tensor.Bytes()));
  }
  std::string bytes(tensor.Bytes(), '\0');
  const uint64_t at =
      from.begin_bytes + storage.offset + tensor.offset * ElementBytes(tensor.dtype);
  RETURN_IF_ERROR(folder_.ReadAt(from.file, at, std::as_writable_bytes(std::span(bytes))));
  out.Mark();
  out.String(kTensorId);
  out.String(DtypeName(tensor.dtype));
  out.Mark();
  for (const uint64_t size : tensor.shape) out.Int(static_cast<int64_t>(size));
  out.Tuple();
  out.Bytes(bytes);
  out.Tuple();
  out.PersistentId();
  return absl::OkStatus();
}

void MegatronKeeper::Finish(ForeignIndex& index) {
  const std::array<std::pair<const char*, Dict*>, 4> dicts = {{
      {kMegatronCommonBlob, &common_},
      {kMegatronOptimizersBlob, &optimizers_},
      {kMegatronRandomBlob, &random_},
      {kMegatronExtraBlob, &extra_},
  }};
  for (const auto& [name, dict] : dicts) {
    if (dict->keys.empty()) continue;
    dict->out.SetItems();
    index.blobs.push_back({name, index.AddInline(std::move(dict->out).Finish())});
  }
  index.notes.insert(index.notes.end(), notes_.begin(), notes_.end());
}

// ------------------------------------------------------------------ what writers find

bool IsMegatronStateBlob(std::string_view name) {
  return name == kMegatronCommonBlob || name == kMegatronOptimizersBlob ||
         name == kMegatronRandomBlob || name == kMegatronExtraBlob;
}

absl::StatusOr<std::unique_ptr<MegatronState>> MegatronState::Read(ConversionSource& source) {
  auto state = std::make_unique<MegatronState>();
  const ForeignIndex& index = source.index();
  for (uint32_t i = 0; i < index.blobs.size(); ++i) {
    const std::string& name = index.blobs[i].name;
    if (!IsMegatronStateBlob(name)) continue;
    if (index.extents[index.blobs[i].extent].decoded_bytes > kMegatronBlobBytesMax) {
      return absl::DataLossError(
          absl::StrFormat("%s: expected at most %d bytes, found %d", name, kMegatronBlobBytesMax,
                          index.extents[index.blobs[i].extent].decoded_bytes));
    }
    std::string bytes;
    RETURN_IF_ERROR(source.ReadBlob(i, [&](std::span<const std::byte> part) {
      bytes.append(reinterpret_cast<const char*>(part.data()), part.size());
      return absl::OkStatus();
    }));
    absl::StatusOr<std::unique_ptr<TorchFile>> file = TorchFile::OpenPickle(name, std::move(bytes));
    if (!file.ok()) return absl::DataLossError(file.status().message());
    if (!(*file)->root().Is(TorchValue::Kind::kDict)) {
      return absl::DataLossError((*file)->root().Mismatch("a dict").message());
    }
    std::unique_ptr<TorchFile>& place = name == kMegatronCommonBlob       ? state->common_
                                        : name == kMegatronOptimizersBlob ? state->optimizers_
                                        : name == kMegatronRandomBlob     ? state->random_
                                                                          : state->extra_;
    place = *std::move(file);
  }
  return state;
}

TorchValue MegatronState::RootOf(const std::unique_ptr<TorchFile>& file) {
  return file == nullptr ? TorchValue() : file->root();
}

TorchValue MegatronState::Common(std::string_view key) const {
  return common_ == nullptr ? TorchValue() : common_->root().Find(key);
}

TorchValue MegatronState::OfOptimizer(uint32_t optimizer, std::string_view what) const {
  if (optimizers_ == nullptr) return {};
  return optimizers_->root().Find(absl::StrCat(optimizer, ".", std::string(what)));
}

TorchValue MegatronState::Groups(uint32_t optimizer) const {
  return OfOptimizer(optimizer, "param_groups");
}

TorchValue MegatronState::Scaler(uint32_t optimizer) const {
  return OfOptimizer(optimizer, "grad_scaler");
}

absl::Status PushKept(const TorchValue& value, TorchDraft& draft) {
  PickleCopier copier(draft.out(), [&](PickleValue each) -> absl::StatusOr<bool> {
    if (!each.Is(PickleValue::Type::kPersistent)) return false;
    RETURN_IF_ERROR(PushKeptTensor(value.Same(each.persistent_id()), draft));
    return true;
  });
  const absl::Status status = copier.Copy(value.pickle());
  if (status.ok()) return status;
  return absl::DataLossError(absl::StrCat("what was kept of Megatron's state: ", status.message()));
}

}  // namespace holdfast::converter
