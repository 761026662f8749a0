// What a Megatron checkpoint holds beside the tensors of its model and optimizer (arguments,
// schedulers, parameter groups, random states, extra states of modules), kept so that it can be
// written again with every class as it was, though nobody here knows what the classes mean.
//
// The reader writes it anew, as pickles of ours (base/pickle_copy.h), into blobs of the index; so
// what a writer opens later, outside of the sandbox, are never the bytes of the source. A small
// tensor is a persistent id in them, ("tensor", dtype, shape, bytes).
#ifndef HOLDFAST_CONVERTER_MEGATRON_STATE_H_
#define HOLDFAST_CONVERTER_MEGATRON_STATE_H_

#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/pickle_writer.h"
#include "converter/conversion_source.h"
#include "converter/foreign_folder.h"
#include "converter/foreign_index.h"
#include "converter/torch_file.h"
#include "converter/torch_output.h"

namespace holdfast::converter {

// Each is a dict with text as keys.
//   common       entries of the root: "args", "opt_param_scheduler", ...
//   optimizers   "<number>.param_groups" and "<number>.grad_scaler" of each chained optimizer
//   random       "<stage>.<tensor rank>.<expert rank>": that rank's rng_state, a list
//   extra        names of modules' extra states, layers and experts numbered over the whole model
inline constexpr char kMegatronCommonBlob[] = "megatron/common.pkl";
inline constexpr char kMegatronOptimizersBlob[] = "megatron/optimizers.pkl";
inline constexpr char kMegatronRandomBlob[] = "megatron/rng_state.pkl";
inline constexpr char kMegatronExtraBlob[] = "megatron/extra_state.pkl";

// Of each blob, and of a tensor in one: larger ones are not kept.
inline constexpr size_t kMegatronBlobBytesMax = size_t{12} << 20;
inline constexpr uint64_t kMegatronKeptTensorBytesMax = uint64_t{1} << 20;

// Where the value of an entry lies: its file, and the begin of its torch file in it.
struct MegatronKeptFrom {
  const TorchFile* torch = nullptr;
  uint32_t file = 0;
  uint64_t begin_bytes = 0;
};

// For the reader. What cannot be kept (see PickleCopier; larger than the limits above) is noted in
// the index.
//
// Threads: one. Lifetime: the folder outlives it.
class MegatronKeeper {
 public:
  explicit MegatronKeeper(const ForeignFolder& folder);

  // Entries of the root but those of model, optimizer and random states.
  void AddCommon(const MegatronKeptFrom& from, const TorchValue& root);
  // Of each name or number the first counts.
  void AddCommonEntry(const MegatronKeptFrom& from, std::string_view key, const TorchValue& value);
  void AddOptimizer(const MegatronKeptFrom& from, uint32_t number, const TorchValue& optimizer);
  void AddRandom(const MegatronKeptFrom& from, const std::string& rank, const TorchValue& value);
  void AddExtra(const MegatronKeptFrom& from, const std::string& name, const TorchValue& value);
  // Adds the blobs that have entries. Nothing may be added after it.
  void Finish(ForeignIndex& index);

 private:
  struct Dict {
    PickleWriter out;
    std::set<std::string, std::less<>> keys;
    bool full = false;
  };

  void Add(Dict& dict, const MegatronKeptFrom& from, std::string_view key, const TorchValue& value);
  absl::Status Push(const MegatronKeptFrom& from, const TorchValue& value, PickleWriter& out) const;
  absl::Status PushTensor(const MegatronKeptFrom& from, const TorchTensor& tensor,
                          PickleWriter& out) const;

  const ForeignFolder& folder_;
  Dict common_;
  Dict optimizers_;
  Dict random_;
  Dict extra_;
  std::vector<std::string> notes_;
};

// For writers: what was kept. Of an index without such blobs everything is absent.
//
// Threads: any, once read. Lifetime: owns everything; values refer to it.
class MegatronState {
 public:
  // Errors: kDataLoss (a blob that is none of MegatronKeeper's), those of reading.
  static absl::StatusOr<std::unique_ptr<MegatronState>> Read(ConversionSource& source);

  bool present() const { return common_ != nullptr; }
  TorchValue common() const { return RootOf(common_); }  // dicts, or absent
  TorchValue optimizers() const { return RootOf(optimizers_); }
  TorchValue random() const { return RootOf(random_); }
  TorchValue extra() const { return RootOf(extra_); }
  TorchValue Common(std::string_view key) const;
  // Of a chained optimizer; absent if there is none of this number.
  TorchValue Groups(uint32_t optimizer) const;
  TorchValue Scaler(uint32_t optimizer) const;

 private:
  static TorchValue RootOf(const std::unique_ptr<TorchFile>& file);
  TorchValue OfOptimizer(uint32_t optimizer, std::string_view what) const;

  std::unique_ptr<TorchFile> common_;
  std::unique_ptr<TorchFile> optimizers_;
  std::unique_ptr<TorchFile> random_;
  std::unique_ptr<TorchFile> extra_;
};

// Whether this blob is one of those above.
bool IsMegatronStateBlob(std::string_view name);

// Pushes a value of a MegatronState. Errors: kDataLoss (it was not written by MegatronKeeper).
absl::Status PushKept(const TorchValue& value, TorchDraft& draft);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_MEGATRON_STATE_H_
