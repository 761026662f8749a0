#include "converter/torch_reader.h"

#include <algorithm>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "base/status_macros.h"
#include "converter/byte_source.h"
#include "converter/torch_file.h"
#include "converter/torch_index.h"
#include "converter/zip_reader.h"

namespace holdfast::converter {
namespace {

using Kind = TorchValue::Kind;

// How often one container is listed, if it stands in several places: sharing can be exponential.
constexpr int kListingsMax = 16;
constexpr size_t kFactBytesMax = 4096;
constexpr size_t kGroupsBytesMax = size_t{16} << 20;  // with the names of all parameters
// A view that repeats its elements (torch.Tensor.expand) is read up to this size, or this many
// times the bytes of its storage: sixteen bytes can be expanded to any size.
constexpr uint64_t kExpandedBytesMax = uint64_t{1} << 30;
constexpr uint64_t kExpandedTimesMax = 1024;

// Names under which people put a dict of weights.
bool IsWeightsName(std::string_view key) {
  constexpr std::string_view kNames[] = {"model", "module", "net", "network", "weights"};
  return key.ends_with("state_dict") || std::count(std::begin(kNames), std::end(kNames), key) != 0;
}

bool IsEmaName(std::string_view key) {
  const std::string lower = absl::AsciiStrToLower(absl::string_view(key.data(), key.size()));
  const std::vector<std::string> words = absl::StrSplit(lower, absl::ByAnyChar("_.-"));
  return std::count(words.begin(), words.end(), "ema") != 0;
}

// One step of a path: how it reads in a name, and unmistakably.
struct PathStep {
  std::string text;
  std::string bracketed;
};
using Path = std::vector<PathStep>;

PathStep StepOfKey(const TorchValue& key) {
  const std::string text = TorchKeyText(key);
  return {text, key.Is(Kind::kString) ? absl::StrCat("[", JsonQuote(text), "]")
                                      : absl::StrCat("[", text, "]")};
}

PathStep StepOfIndex(size_t index) { return {absl::StrCat(index), absl::StrCat("[", index, "]")}; }

std::string NameOf(const Path& path) {
  return absl::StrJoin(
      path, ".", [](std::string* out, const PathStep& step) { absl::StrAppend(out, step.text); });
}

// `names[7]`, `a["b.c"][0]`.
std::string BracketedName(const Path& path) {
  std::string name;
  for (size_t i = 0; i < path.size(); ++i) name += i == 0 ? path[i].text : path[i].bracketed;
  return name;
}

bool IsOptimizer(const TorchValue& dict) {
  const TorchValue groups = dict.Find("param_groups");
  return dict.Find("state").Is(Kind::kDict) && groups.Is(Kind::kList);
}

// A pickled torch.nn.Module: its __dict__.
TorchValue ModuleOf(const TorchValue& value) {
  if (!value.Is(Kind::kOpaque)) return {};
  const TorchValue attributes = value.attributes();
  const bool is_module = attributes.Find("_parameters").Is(Kind::kDict) &&
                         attributes.Find("_buffers").Is(Kind::kDict) &&
                         attributes.Find("_modules").Is(Kind::kDict);
  return is_module ? attributes : TorchValue();
}

// What kind of tensor this object is, if it is one that has no plain numbers; else "".
std::string ReasonNotRead(const TorchValue& value) {
  if (value.IsObject("torch._utils", "_rebuild_sparse_tensor")) {
    const TorchValue layout =
        value.args().present() && *value.args().ArraySize() != 0 ? value.args()[0] : TorchValue();
    std::string name = "?";
    if (layout.IsObject("torch.serialization", "_get_layout") && *layout.args().ArraySize() == 1 &&
        layout.args()[0].Is(Kind::kString)) {
      name = TorchText(layout.args()[0].String()->substr(0, 100));
    }
    return absl::StrFormat("is a sparse tensor (%s)", name);
  }
  if (value.IsObject("torch._utils", "_rebuild_qtensor")) {
    return "is quantised: its integers mean nothing without scale and zero point";
  }
  if (value.IsObject("torch._utils", "_rebuild_nested_tensor")) return "is a nested tensor";
  if (value.IsObject("torch._utils", "_rebuild_meta_tensor_no_storage")) {
    return "is on the device meta: the file has no numbers for it";
  }
  const std::string name = TorchText(value.ClassName().substr(0, 200));
  if (name == "torch.nn.parameter.UninitializedParameter" ||
      name == "torch.nn.parameter.UninitializedBuffer") {
    return "is not initialised: the file has no numbers for it";
  }
  if (!value.WrapperClass().empty()) {
    return absl::StrFormat("is a part of a %s: the folder of all ranks' files is needed", name);
  }
  if (value.IsObject("torch._tensor", "_rebuild_from_type_v2") && *value.args().ArraySize() >= 2) {
    const std::string type = TorchText(value.args()[1].ClassName().substr(0, 200));
    return type.ends_with(".NestedTensor")
               ? "is a nested tensor"
               : absl::StrFormat("is a %s, a subclass of torch.Tensor that is not known", type);
  }
  if (name.starts_with("torch._utils._rebuild")) return absl::StrFormat("is made by %s", name);
  return "";
}

// Whether a value is a tensor, or holds one. Each value is looked at once.
class TensorSearch {
 public:
  bool Holds(const TorchValue& value, size_t depth = 0) {
    if (!value.present()) return false;
    const Kind kind = value.kind();
    if (kind == Kind::kTensor) return true;
    if (kind != Kind::kList && kind != Kind::kTuple && kind != Kind::kDict &&
        kind != Kind::kOpaque) {
      return false;
    }
    if (depth >= kTorchNestingMax) return false;
    // What holds itself holds nothing more for that.
    const auto [place, is_new] = holds_.try_emplace(value.number(), false);
    if (!is_new) return place->second;
    const bool found = Look(value, kind, depth + 1);
    holds_[value.number()] = found;
    return found;
  }

 private:
  bool Look(const TorchValue& value, Kind kind, size_t depth) {
    bool found = false;
    if (kind == Kind::kDict) {
      for (size_t i = 0; i < *value.EntryCount(); ++i) found |= Holds(value.Entry(i), depth);
    } else if (kind == Kind::kOpaque) {
      found = !ReasonNotRead(value).empty() || Holds(value.attributes(), depth) ||
              (value.pickle().Is(PickleValue::Type::kObject) &&
               value.pickle().making() == PickleValue::Making::kNew && Holds(value.args(), depth));
    } else {
      for (size_t i = 0; i < *value.ArraySize(); ++i) found |= Holds(value[i], depth);
    }
    return found;
  }

  std::unordered_map<uint32_t, bool> holds_;
};

// Brings one file into an index.
class TorchReader {
 public:
  TorchReader(const TorchFile& file, ForeignIndex& index)
      : file_(file), index_(index), pieces_(index, 0, 0, file) {}

  absl::Status Read() {
    Path path;
    RETURN_IF_ERROR(Look(file_.root(), path));
    for (const Found& found : weights_) RETURN_IF_ERROR(ReadWeights(found));
    for (const Found& found : optimizers_) RETURN_IF_ERROR(ReadOptimizer(found));
    const bool only_tensors = weights_.empty() && optimizers_.empty() && !has_module_;
    for (const Found& found : others_) {
      std::string state = found.state.empty() ? (only_tensors ? "tensor" : "other") : found.state;
      RETURN_IF_ERROR(AddTensor(NameOf(found.path), std::move(state), found.value, found.path));
    }
    FindStep();
    AddTorchDescription(file_, index_);
    index_.variant =
        file_.container() == TorchFile::Container::kLegacy ? "before torch 1.6" : "zip";
    if (file_.big_endian()) index_.variant += ", big-endian";
    if (cut_)
      index_.notes.push_back(absl::StrCat(file_.name(),
                                          ": containers that stand in many "
                                          "places, or very deep, are not listed in all"));
    return absl::OkStatus();
  }

 private:
  struct Found {
    Path path;
    TorchValue value;
    std::string state;
  };

  // Finds what there is below `value`, which stands at `path`.
  absl::Status Look(const TorchValue& value, Path& path) {
    const Kind kind = value.kind();
    if (kind == Kind::kTensor || (kind == Kind::kOpaque && !ReasonNotRead(value).empty())) {
      others_.push_back({path, value, StateOf(value, path)});
      return absl::OkStatus();
    }
    if (!search_.Holds(value)) {
      AddFact(path, value);
      return absl::OkStatus();
    }
    if (path.size() >= kTorchNestingMax || ++listings_[value.number()] > kListingsMax) {
      cut_ = true;
      return absl::OkStatus();
    }
    if (const TorchValue module = ModuleOf(value); module.present()) {
      has_module_ = true;
      return LookInModule(module, path, path.size());
    }
    if (kind == Kind::kDict) return LookInDict(value, path);
    if (kind == Kind::kOpaque) {
      if (value.args().present()) RETURN_IF_ERROR(LookInArray(value.args(), path));
      return value.attributes().present() ? LookInDict(value.attributes(), path) : absl::OkStatus();
    }
    return LookInArray(value, path);
  }

  absl::Status LookInArray(const TorchValue& array, Path& path) {
    for (size_t i = 0; i < *array.ArraySize(); ++i) {
      path.push_back(StepOfIndex(i));
      RETURN_IF_ERROR(Look(array[i], path));
      path.pop_back();
    }
    return absl::OkStatus();
  }

  absl::Status LookInDict(const TorchValue& dict, Path& path) {
    if (IsOptimizer(dict)) {
      optimizers_.push_back({path, dict, ""});
      return absl::OkStatus();
    }
    if (IsWeights(dict, path)) {
      const bool ema = std::any_of(path.begin(), path.end(),
                                   [](const PathStep& step) { return IsEmaName(step.text); });
      weights_.push_back({path, dict, ema ? "ema" : "param"});
      return absl::OkStatus();
    }
    for (size_t i = 0; i < *dict.EntryCount(); ++i) {
      path.push_back(StepOfKey(dict.Key(i)));
      RETURN_IF_ERROR(Look(dict.Entry(i), path));
      path.pop_back();
    }
    return absl::OkStatus();
  }

  // The weights of a module and of those in it, named from where the first one stands.
  absl::Status LookInModule(const TorchValue& module, Path& path, size_t begin) {
    const TorchValue unsaved = module.Find("_non_persistent_buffers_set");
    for (const std::string_view kind : {"_parameters", "_buffers"}) {
      const TorchValue dict = module.Find(kind);
      for (size_t i = 0; i < *dict.EntryCount(); ++i) {
        const TorchValue value = dict.Entry(i);
        if (!value.Is(Kind::kTensor) && !value.Is(Kind::kOpaque)) continue;
        Path inner(path.begin() + static_cast<ptrdiff_t>(begin), path.end());
        inner.push_back(StepOfKey(dict.Key(i)));
        const bool saved = kind == "_parameters" || !Contains(unsaved, inner.back().text);
        const std::string_view state = kind == "_parameters" ? "param" : saved ? "buffer" : "other";
        RETURN_IF_ERROR(AddTensor(NameOf(inner), std::string(state), value, inner));
      }
    }
    const TorchValue modules = module.Find("_modules");
    for (size_t i = 0; i < *modules.EntryCount(); ++i) {
      const TorchValue inner = ModuleOf(modules.Entry(i));
      if (!inner.present()) continue;
      if (path.size() >= kTorchNestingMax ||
          ++listings_[modules.Entry(i).number()] > kListingsMax) {
        cut_ = true;
        continue;
      }
      path.push_back(StepOfKey(modules.Key(i)));
      RETURN_IF_ERROR(LookInModule(inner, path, begin));
      path.pop_back();
    }
    return absl::OkStatus();
  }

  static bool Contains(const TorchValue& set, std::string_view text) {
    if (!set.Is(Kind::kSet)) return false;
    for (size_t i = 0; i < *set.ArraySize(); ++i) {
      if (set[i].Is(Kind::kString) && *set[i].String() == text) return true;
    }
    return false;
  }

  // What Module.state_dict() made says so in an attribute of its OrderedDict; what a user copied
  // from it into a dict of his own is known by its name.
  static bool IsWeights(const TorchValue& dict, const Path& path) {
    const PickleValue raw = dict.pickle();
    if (raw.Is(PickleValue::Type::kObject) && raw.state().Find("_metadata").present()) return true;
    if (path.empty() || !(IsWeightsName(path.back().text) || IsEmaName(path.back().text))) {
      return false;
    }
    for (size_t i = 0; i < *dict.EntryCount(); ++i) {
      const TorchValue value = dict.Entry(i);
      const bool is_tensor = value.Is(Kind::kTensor) || !ReasonNotRead(value).empty();
      if (!is_tensor || !dict.Key(i).Is(Kind::kString)) return false;
    }
    return true;
  }

  // What a tensor outside of weights and optimizers says of itself.
  static std::string StateOf(const TorchValue& value, const Path& path) {
    if (value.IsParameter()) return "param";
    for (const PathStep& step : path) {
      const std::string lower = absl::AsciiStrToLower(step.text);
      const std::vector<std::string> words = absl::StrSplit(lower, absl::ByAnyChar("_.-"));
      if (std::count(words.begin(), words.end(), "rng") != 0) return "rng";
    }
    return "";
  }

  // The path, with which names begin where several structures of one kind are in the file.
  static std::string PrefixOf(const Found& found, const std::vector<Found>& all) {
    const auto alike = std::count_if(all.begin(), all.end(), [&found](const Found& other) {
      return other.state == found.state;
    });
    return alike > 1 && !found.path.empty() ? absl::StrCat(NameOf(found.path), ".") : "";
  }

  // How much of all these names is what wrappers put before every one.
  static size_t WrapperBytes(const std::vector<std::string>& names) {
    constexpr std::string_view kWrappers[] = {"module.", "_orig_mod."};
    size_t bytes = 0;
    for (bool again = !names.empty(); again;) {
      again = false;
      for (const std::string_view wrapper : kWrappers) {
        const bool all = std::all_of(names.begin(), names.end(), [&](const std::string& name) {
          return name.size() > bytes + wrapper.size() &&
                 std::string_view(name).substr(bytes).starts_with(wrapper);
        });
        if (all) bytes += wrapper.size();
        again = again || all;
      }
    }
    return bytes;
  }

  absl::Status ReadWeights(const Found& found) {
    const TorchValue& dict = found.value;
    const size_t count = *dict.EntryCount();
    std::vector<std::string> names;
    for (size_t i = 0; i < count; ++i) names.push_back(TorchKeyText(dict.Key(i)));
    const size_t dropped = WrapperBytes(names);
    if (dropped != 0) {
      index_.notes.push_back(absl::StrFormat("%s: \"%s\" before all names is left out",
                                             file_.name(), names[0].substr(0, dropped)));
    }
    const std::string prefix = PrefixOf(found, weights_);
    Path path = found.path;
    for (size_t i = 0; i < count; ++i) {
      const TorchValue value = dict.Entry(i);
      path.push_back(StepOfKey(dict.Key(i)));
      if (value.Is(Kind::kTensor) || !ReasonNotRead(value).empty()) {
        const std::string name = absl::StrCat(prefix, path.back().text.substr(dropped));
        RETURN_IF_ERROR(AddTensor(name, found.state, value, path));
      } else {
        AddFact(path, value);  // _extra_state of a module
      }
      path.pop_back();
    }
    return absl::OkStatus();
  }

  absl::Status ReadOptimizer(const Found& found) {
    const TorchValue groups = found.value.Find("param_groups");
    std::map<int64_t, std::string> names;
    std::vector<std::string> all_names;
    for (size_t i = 0; i < *groups.ArraySize(); ++i) {
      const TorchValue ids = groups[i].Find("params");
      const TorchValue given = groups[i].Find("param_names");
      if (!ids.Is(Kind::kList) || !given.Is(Kind::kList) ||
          *ids.ArraySize() != *given.ArraySize()) {
        continue;
      }
      for (size_t j = 0; j < *ids.ArraySize(); ++j) {
        const absl::StatusOr<int64_t> id = ids[j].Int64();
        if (!id.ok() || !given[j].Is(Kind::kString)) continue;
        names[*id] = TorchKeyText(given[j]);
        all_names.push_back(names[*id]);
      }
    }
    const size_t dropped = WrapperBytes(all_names);
    const std::string prefix = PrefixOf(found, optimizers_);
    const TorchValue states = found.value.Find("state");
    Path path = found.path;
    path.push_back({"state", "[\"state\"]"});
    bool unnamed = false;
    for (size_t i = 0; i < *states.EntryCount(); ++i) {
      const TorchValue key = states.Key(i);
      const auto known = key.Int64().ok() ? names.find(*key.Int64()) : names.end();
      unnamed = unnamed || (known == names.end() && key.Is(Kind::kInteger));
      const std::string name = absl::StrCat(
          prefix, known == names.end() ? TorchKeyText(key) : known->second.substr(dropped));
      path.push_back(StepOfKey(key));
      RETURN_IF_ERROR(ReadStates(name, "", states.Entry(i), path, 0));
      path.pop_back();
    }
    if (unnamed) {
      index_.notes.push_back(absl::StrFormat(
          "%s: %s names its parameters by their positions in the groups: which names they have is "
          "not in the file",
          file_.name(), found.path.empty() ? "the optimizer" : NameOf(found.path)));
    }
    path = found.path;
    path.push_back({"param_groups", "[\"param_groups\"]"});
    index_.scalars.push_back({NameOf(path), TorchJson(groups, kGroupsBytesMax)});
    return absl::OkStatus();
  }

  // The states of one parameter: {'exp_avg': tensor, ...}, perhaps in further dicts.
  absl::Status ReadStates(const std::string& name, const std::string& state,
                          const TorchValue& value, Path& path, size_t depth) {
    if (value.Is(Kind::kTensor) || !ReasonNotRead(value).empty()) {
      return AddTensor(name, state.empty() ? "other" : state, value, path);
    }
    if (!value.Is(Kind::kDict) || depth >= kTorchNestingMax) {
      AddFact(path, value);
      return absl::OkStatus();
    }
    if (++listings_[value.number()] > kListingsMax) {
      cut_ = true;
      return absl::OkStatus();
    }
    for (size_t i = 0; i < *value.EntryCount(); ++i) {
      path.push_back(StepOfKey(value.Key(i)));
      const std::string inner = absl::StrCat(state, state.empty() ? "" : ".", path.back().text);
      RETURN_IF_ERROR(ReadStates(name, inner, value.Entry(i), path, depth + 1));
      path.pop_back();
    }
    return absl::OkStatus();
  }

  absl::Status AddTensor(std::string name, std::string state, const TorchValue& value,
                         const Path& path) {
    if (!names_.emplace(name, state).second) {
      name = BracketedName(path);
      if (!names_.emplace(name, state).second) {
        cut_ = true;  // the same container at the same place of a shared one
        return absl::OkStatus();
      }
    }
    if (name.size() > kNameBytesMax) {
      index_.unreadable.push_back({name.substr(0, 100) + "...",
                                   absl::StrFormat("has a name of %d bytes: at most %d are read",
                                                   name.size(), kNameBytesMax)});
      return absl::OkStatus();
    }
    if (!value.Is(Kind::kTensor)) {
      const std::string reason = ReasonNotRead(value);
      index_.unreadable.push_back(
          {std::move(name), reason.empty() ? "is " + value.Describe() : reason});
      return absl::OkStatus();
    }
    const TorchTensor& tensor = **value.Tensor();
    const uint64_t stored = file_.storages()[tensor.storage].bytes;
    if (tensor.Bytes() > kExpandedBytesMax && tensor.Bytes() / kExpandedTimesMax > stored) {
      index_.unreadable.push_back(
          {std::move(name),
           absl::StrFormat("repeats the %d bytes of its storage to %d", stored, tensor.Bytes())});
      return absl::OkStatus();
    }
    ASSIGN_OR_RETURN(const uint32_t number,
                     pieces_.AddWhole(std::move(name), std::move(state), tensor));
    if (tensor.ElementCount() == 0) return absl::OkStatus();
    // Two names for the same elements.
    const auto [place, is_new] = first_.try_emplace(
        {tensor.storage, tensor.offset, tensor.dtype, tensor.shape, tensor.strides, tensor.conj,
         tensor.neg, index_.tensor_states[number].state},
        number);
    if (!is_new) index_.aliases.push_back({number, place->second});
    return absl::OkStatus();
  }

  void AddFact(const Path& path, const TorchValue& value) {
    if (path.empty() || index_.scalars.size() >= kLinesMax / 2) return;
    index_.scalars.push_back({NameOf(path), TorchJson(value, kFactBytesMax)});
  }

  void FindStep() {
    for (const std::string_view key : {"global_step", "step", "iteration"}) {
      const absl::StatusOr<uint64_t> step = file_.root().Find(key).Uint64();
      if (!step.ok() || index_.has_step) continue;
      index_.has_step = true;
      index_.step = *step;
    }
  }

  const TorchFile& file_;
  ForeignIndex& index_;
  TorchPieces pieces_;
  TensorSearch search_;
  std::vector<Found> weights_;
  std::vector<Found> optimizers_;
  std::vector<Found> others_;
  bool has_module_ = false;
  bool cut_ = false;
  std::unordered_map<uint32_t, int> listings_;
  std::set<std::pair<std::string, std::string>> names_;
  std::map<std::tuple<uint32_t, uint64_t, Dtype, std::vector<uint64_t>, std::vector<uint64_t>, bool,
                      bool, std::string>,
           uint32_t>
      first_;
};

}  // namespace

absl::StatusOr<bool> RecognizesTorch(const ForeignFolder& folder) {
  if (!folder.single_file()) return false;
  // A tar of torch 0.1 begins with one of its members.
  constexpr std::string_view kTarMembers[] = {"storages", "tensors", "pickle", "sys_info"};
  ASSIGN_OR_RETURN(const std::string head, folder.ReadHead(0, 512));
  if (head.size() == 512 && std::string_view(head).substr(257).starts_with("ustar")) {
    const std::string_view member = std::string_view(head).substr(0, head.find('\0'));
    return std::count(std::begin(kTarMembers), std::end(kTarMembers), member) != 0;
  }
  const bool like_zip = ZipDirectory::BeginsLikeZip(head);
  if (!like_zip && TorchFile::BeginsLikeTorch(head)) return true;
  const absl::StatusOr<ZipDirectory> zip = ZipDirectory::Read(FolderSource(folder, 0));
  // What begins like an archive and is broken is said by Read.
  if (!zip.ok()) return like_zip;
  for (const ZipEntry& entry : zip->entries()) {
    if (entry.name.ends_with("/data.pkl") || entry.name.ends_with("/archive_format")) return true;
  }
  return false;
}

absl::StatusOr<ForeignIndex> ReadTorch(const ForeignFolder& folder, const ReadOptions&) {
  const FolderSource source(folder, 0);
  ASSIGN_OR_RETURN(const std::unique_ptr<TorchFile> file, TorchFile::Open(source));
  return IndexOfTorchFile(*file);
}

absl::StatusOr<ForeignIndex> IndexOfTorchFile(const TorchFile& file) {
  ForeignIndex index;
  RETURN_IF_ERROR(TorchReader(file, index).Read());
  return index;
}

}  // namespace holdfast::converter
