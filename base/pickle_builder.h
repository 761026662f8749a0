// The pickle machine without its byte code: a stack of values and marks, a memo, and the nodes of
// a PickleDocument. One call per effect of an opcode; base/pickle_reader.cc decodes them. Internal
// to the pickle reader.
//
// Everything is in flat arrays: nothing recurses, in building or in freeing, however deep the
// values are. Every opcode takes at least one byte and makes at most one node (an object that is
// given its first item or entry: one more), so nodes, stack, marks and memo are bounded by the
// bytes, and by values_max besides. Children move to the end of their array when their container
// has outgrown its room, and take twice of it there: three times what they need in all. The arrays
// of a large pickle begin as large as pickles of many small objects need them: growing would copy
// them, and what is reserved and not used is never touched.
//
// After the first error every call may do anything but crash; status() has that error.
#ifndef HOLDFAST_BASE_PICKLE_BUILDER_H_
#define HOLDFAST_BASE_PICKLE_BUILDER_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "base/pickle_reader.h"

namespace holdfast {

// Threads: one. Lifetime: the document outlives it.
class PickleBuilder {
 public:
  using Type = PickleValue::Type;
  using Making = PickleValue::Making;

  PickleBuilder(PickleDocument& document, const PickleOptions& options);

  const absl::Status& status() const { return status_; }
  bool ok() const { return status_.ok(); }
  bool stopped() const { return stopped_; }
  // Where the opcode begins that runs, for errors.
  void Begin(size_t offset) { begun_ = offset; }
  // kInvalidArgument, kPermissionDenied, or any other status, if there is none yet.
  void Refuse(std::string_view what) { Fail(absl::StatusCode::kInvalidArgument, what); }
  void Forbid(std::string_view what) { Fail(absl::StatusCode::kPermissionDenied, what); }
  void Fail(absl::StatusCode code, std::string_view what);

  void PushEmpty(Type type);  // None, and containers without values; tuples: PushEmptyTuple
  void PushEmptyTuple();
  void PushBool(bool value);
  void PushInteger(int64_t value);
  void PushDouble(double value);
  // A text that stands in the document's at this place.
  void PushPlace(Type type, size_t offset, size_t length);
  struct Place {
    size_t offset;
    size_t length;
  };
  void PushGlobal(Place module, Place name);
  // Module and name from the two topmost values; nothing and an error if they are no strings.
  std::optional<std::pair<Place, Place>> TakeNames();

  void Mark();
  void PopAny();  // a value or a mark
  void PopToMark();
  void Duplicate();
  void MakeTuple(size_t count);  // of the topmost values
  void MakeFromMark(Type type);
  // Adds the topmost values to the list, dict or object below them.
  void AddTop(Type type, size_t count);
  void AddMarked(Type type);
  void AddToSet();
  // Callee, arguments and perhaps a dict of arguments are the topmost values.
  enum class Kwargs : uint8_t { kNone, kTopmost };
  void MakeObject(Making making, Kwargs kwargs);
  void Build();
  void BinPersid();

  void Remember(uint64_t key);
  void RememberNext() { Remember(memo_count_); }
  void Recall(uint64_t key);
  void Stop();

 private:
  static constexpr uint32_t kMark = UINT32_MAX;
  static constexpr uint32_t kNoNode = PickleDocument::kNoNode;
  using Node = PickleDocument::Node;

  uint32_t Make(const Node& node);
  uint32_t Push(const Node& node);
  void PushAgain(uint32_t number);
  bool Extend(uint32_t object);
  uint32_t& ExtensionOf(uint32_t object, PickleDocument::Part part);
  std::string DescribeOf(uint32_t number) const;
  Node& At(uint32_t number);

  bool HasTop();
  uint32_t Pop();
  bool HasValues(size_t count);
  std::optional<size_t> CountToMark();
  void DropMark();
  bool HasRoom(size_t count);
  void MoveTop(uint32_t container, size_t count);
  uint32_t Receiver(Type type, uint32_t below);
  void AddBelow(Type type, size_t count, size_t marks);

  PickleDocument& document_;
  const size_t values_max_;
  const size_t depth_max_;
  std::vector<uint32_t> stack_;  // numbers of nodes; kMark where a container's values begin
  size_t marks_ = 0;
  std::vector<uint32_t> dense_memo_;
  std::map<uint64_t, uint32_t> sparse_memo_;
  size_t memo_count_ = 0;
  // Values that are pushed again instead of made anew: integers by a hash, the last one of each.
  static constexpr int kKnownIntegersBits = 10;
  std::array<uint32_t, size_t{1} << kKnownIntegersBits> known_integers_;
  uint32_t empty_tuple_ = kNoNode;
  size_t begun_ = 0;
  bool stopped_ = false;
  absl::Status status_;
};

}  // namespace holdfast

#endif  // HOLDFAST_BASE_PICKLE_BUILDER_H_
