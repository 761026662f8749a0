// Torch files that a conversion writes: what each has in its pickle, and of which elements of which
// tensors its storages are made. Every writer of a torch format is a plan of such files; one loop
// writes them all.
#ifndef HOLDFAST_CONVERTER_TORCH_OUTPUT_H_
#define HOLDFAST_CONVERTER_TORCH_OUTPUT_H_

#include <cstdint>
#include <limits>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "converter/conversion_source.h"
#include "converter/output_files.h"
#include "converter/torch_pickle.h"
#include "format/dtype.h"
#include "io/file_system.h"

namespace holdfast::converter {

// ElementRange::tensor_state of elements that are zero: padding.
inline constexpr uint32_t kZeroElements = std::numeric_limits<uint32_t>::max();
// Of elements that stand in PlannedStorage::bytes.
inline constexpr uint32_t kGivenElements = kZeroElements - 1;

// Elements [begin, end) of a tensor state's row-major order, and of those at the same distance as
// often as it says: columns of a matrix.
struct ElementRange {
  uint32_t tensor_state = 0;
  uint64_t begin = 0;
  uint64_t end = 0;
  uint64_t repeat_count = 1;   // in all; more than 1 of tensor states only
  uint64_t repeat_stride = 0;  // from one begin to the next, at least end - begin

  uint64_t ElementCount() const { return (end - begin) * repeat_count; }
};

struct PlannedStorage {
  Dtype dtype = Dtype::kFloat32;  // tensors of another one are cast
  std::vector<ElementRange> ranges;
  std::string given;  // of kGivenElements, which are then the only range

  uint64_t ElementCount() const;
  uint64_t Bytes() const { return ElementCount() * ElementBytes(dtype); }
};

struct PlannedFile {
  std::string path;    // below the output's directory
  std::string pickle;  // data.pkl; empty: the file is `text`
  std::vector<PlannedStorage> storages;
  std::string text;
  uint64_t bytes = 0;
};

struct TorchFilesPlan {
  std::vector<PlannedFile> files;     // in the order of writing; what announces the others is last
  std::vector<std::string> left_out;  // what the format has no place for, in words
  std::vector<std::string> notes;     // what the framework wants besides, and the source has not
  uint64_t tensor_count = 0;          // tensor states that are in some file
  uint64_t bytes = 0;                 // of all files

  void Add(PlannedFile file);
  void AddText(std::string path, std::string text);
};

// One torch file, as it is being planned. Values are pushed in the order of the pickle.
//
// Threads: one. Lifetime: the index outlives it.
class TorchDraft {
 public:
  TorchDraft(const ForeignIndex& index, std::string path);

  TorchPickle& pickle() { return pickle_; }
  PickleWriter& out() { return pickle_.out(); }
  void Key(std::string_view key) { pickle_.out().String(key); }

  // Push a tensor. All of a tensor state, in a storage of its own; again: a view of the same.
  void Whole(uint32_t tensor_state, bool requires_grad = false);
  // The same in another dtype (IsCastable), flat or in its shape.
  enum class Form { kShaped, kFlat };
  void WholeAs(uint32_t tensor_state, Dtype dtype, Form form);
  // A tensor of this shape, row-major, of these elements one behind the other.
  void Ranges(Dtype dtype, std::span<const uint64_t> shape, std::vector<ElementRange> ranges,
              bool requires_grad = false);
  // Little-endian elements that are given here.
  void Given(Dtype dtype, std::span<const uint64_t> shape, std::string bytes);
  // A storage for several views: its number.
  uint32_t Buffer(Dtype dtype, std::vector<ElementRange> ranges);
  // Elements of a buffer from number `begin` on, as a tensor of this shape.
  void ViewOf(uint32_t buffer, std::span<const uint64_t> shape, uint64_t begin);
  // The first `elements` of a flat tensor of `ranges`, which are more: a view.
  void View(Dtype dtype, uint64_t elements, std::vector<ElementRange> ranges);

  // Tensor states of which it has elements.
  std::span<const uint32_t> used() const { return used_; }
  PlannedFile Finish() &&;

 private:
  uint32_t AddStorage(PlannedStorage storage);

  const ForeignIndex& index_;
  PlannedFile file_;
  TorchPickle pickle_;
  std::map<uint32_t, uint32_t> whole_;  // storages by tensor state
  std::vector<uint32_t> used_;
};

// The bytes of a file of which all storages are given or zero.
std::string TorchFileBytes(const PlannedFile& file);

// Writes one file of a plan.
absl::Status WriteTorchFile(OutputFiles& files, ConversionSource& source, const PlannedFile& file);

// Writes all files of the plan below `directory`, which exists and has none of them. `source` has
// the index of the plan. After OK they are durable; their names in `directory` itself are not.
absl::Status WriteTorchFiles(FileSystem& file_system, const std::string& directory,
                             ConversionSource& source, const TorchFilesPlan& plan,
                             const ConversionProgress& progress);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_TORCH_OUTPUT_H_
