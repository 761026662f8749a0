#include "converter/compare.h"

#include <algorithm>
#include <array>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <utility>

#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "converter/whole_tensor_reader.h"

namespace holdfast::converter {
namespace {

using Key = std::pair<std::string_view, std::string_view>;  // tensor, state

bool IsOfTheOneClass(std::string_view state) {
  constexpr std::array<std::string_view, 6> kStates = {"param", "buffer", "tensor",
                                                       "other", "rng",    "ema"};
  return std::find(kStates.begin(), kStates.end(), state) != kStates.end();
}

// Names that have more than one state of the class.
std::set<std::string_view> Ambiguous(const ForeignIndex& index) {
  std::map<std::string_view, int> counts;
  std::set<std::string_view> found;
  for (const TensorState& state : index.tensor_states) {
    if (IsOfTheOneClass(state.state) && ++counts[state.tensor] > 1) found.insert(state.tensor);
  }
  return found;
}

std::map<Key, uint32_t> StatesOf(const ForeignIndex& index,
                                 const std::set<std::string_view>& ambiguous) {
  std::map<Key, uint32_t> states;
  for (uint32_t i = 0; i < index.tensor_states.size(); ++i) {
    const TensorState& state = index.tensor_states[i];
    const bool as_one = IsOfTheOneClass(state.state) && !ambiguous.contains(state.tensor);
    states[{state.tensor, as_one ? std::string_view("param") : std::string_view(state.state)}] = i;
  }
  return states;
}

// What a side does not have, and may have had: it has lost something, or holds something that
// nobody here can read. That is told by name where the other side knows the name, too; else it may
// be anything.
class Absences {
 public:
  Absences(const ForeignIndex& of, const ForeignIndex& other) : has_lost_(!of.losses.empty()) {
    for (const Unreadable& each : of.unreadable) unreadable_.insert(each.name);
    if (unreadable_.empty()) return;
    std::set<std::string_view> unknown = unreadable_;
    for (const TensorState& state : other.tensor_states) unknown.erase(state.tensor);
    for (const Unreadable& each : other.unreadable) unknown.erase(each.name);
    hides_something_ = !unknown.empty();
  }

  // Why it cannot be said that the side does not have this tensor; empty: it has not.
  std::string_view WhyUnknown(std::string_view tensor) const {
    if (has_lost_) return "which has lost something";
    if (unreadable_.contains(tensor)) return "where it cannot be read";
    return hides_something_ ? "which holds something that cannot be read" : "";
  }

 private:
  const bool has_lost_;
  bool hides_something_ = false;
  std::set<std::string_view> unreadable_;
};

class Comparer {
 public:
  Comparer(const CompareSide& a, const CompareSide& b,
           const std::function<bool(uint64_t, uint64_t)>& progress)
      : a_(a),
        b_(b),
        progress_(progress),
        a_reader_(a.folder, a.index),
        b_reader_(b.folder, b.index),
        absent_in_a_(a.index, b.index),
        absent_in_b_(b.index, a.index) {}

  absl::StatusOr<Comparison> Run() {
    std::set<std::string_view> ambiguous = Ambiguous(a_.index);
    ambiguous.merge(Ambiguous(b_.index));
    const std::map<Key, uint32_t> in_a = StatesOf(a_.index, ambiguous);
    const std::map<Key, uint32_t> in_b = StatesOf(b_.index, ambiguous);
    for (const auto& [key, number] : in_a) {
      if (const auto other = in_b.find(key); other != in_b.end() && Alike(number, other->second)) {
        total_ += 2 * a_.index.tensor_states[number].Bytes();
      }
    }
    auto b = in_b.begin();
    for (const auto& [key, number] : in_a) {
      for (; b != in_b.end() && b->first < key; ++b) OnlyInB(b->second);
      if (b == in_b.end() || b->first != key) {
        OnlyInA(number);
        continue;
      }
      RETURN_IF_ERROR(CompareStates(number, b->second));
      ++b;
    }
    for (; b != in_b.end(); ++b) OnlyInB(b->second);
    NameWhatIsNotCompared("A", a_.index);
    NameWhatIsNotCompared("B", b_.index);
    return std::move(result_);
  }

 private:
  bool Alike(uint32_t a, uint32_t b) const {
    const TensorState& x = a_.index.tensor_states[a];
    const TensorState& y = b_.index.tensor_states[b];
    return x.dtype == y.dtype && x.shape == y.shape;
  }

  void OnlyInA(uint32_t number) {
    const TensorState& state = a_.index.tensor_states[number];
    if (IsUnknown("A", state, "B", absent_in_b_)) return;
    Add({Comparison::Kind::kOnlyInA, state, std::nullopt, {}});
  }
  void OnlyInB(uint32_t number) {
    const TensorState& state = b_.index.tensor_states[number];
    if (IsUnknown("B", state, "A", absent_in_a_)) return;
    Add({Comparison::Kind::kOnlyInB, std::nullopt, state, {}});
  }

  // Whether nobody can say that the other side does not have it; it is named then.
  bool IsUnknown(std::string_view side, const TensorState& state, std::string_view other,
                 const Absences& absences) {
    const std::string_view why = absences.WhyUnknown(state.tensor);
    if (why.empty()) return false;
    result_.not_compared.push_back(
        absl::StrFormat("%s: %s: not found in %s, %s", side, Describe(state), other, why));
    return true;
  }

  void NameWhatIsNotCompared(std::string_view side, const ForeignIndex& index) {
    for (const Unreadable& each : index.unreadable) {
      result_.not_compared.push_back(absl::StrFormat("%s: %s %s", side, each.name, each.reason));
    }
    for (const std::string& loss : index.losses) {
      result_.not_compared.push_back(absl::StrFormat("%s: lost: %s", side, loss));
    }
  }

  void Add(Comparison::Difference difference) {
    ++result_.different_count;
    if (result_.differences.size() < Comparison::kDifferencesMax) {
      result_.differences.push_back(std::move(difference));
    }
  }

  absl::Status CompareStates(uint32_t a, uint32_t b) {
    const TensorState& x = a_.index.tensor_states[a];
    const TensorState& y = b_.index.tensor_states[b];
    if (!Alike(a, b)) {
      Add({Comparison::Kind::kOtherKind, x, y, {}});
      return absl::OkStatus();
    }
    const uint64_t element_bytes = ElementBytes(x.dtype);
    const uint64_t step = WholeTensorReader::kWindowBytes / element_bytes;
    const uint64_t elements = x.ElementCount();
    ElementDifferences found;
    for (uint64_t begin = 0; begin < elements; begin += step) {
      const uint64_t end = std::min(elements, begin + step);
      a_bytes_.resize((end - begin) * element_bytes);
      b_bytes_.resize(a_bytes_.size());
      const absl::Status status = ReadBoth(a, b, begin, end);
      if (absl::IsDataLoss(status)) {
        result_.not_compared.emplace_back(status.message());
        return absl::OkStatus();
      }
      RETURN_IF_ERROR(status);
      found += CompareElements(x.dtype, a_bytes_, b_bytes_, begin);
      done_ += 2 * a_bytes_.size();
      if (progress_ != nullptr && !progress_(done_, total_)) {
        return absl::CancelledError("diff was stopped");
      }
    }
    if (found.count == 0) {
      ++result_.equal_count;
    } else {
      Add({Comparison::Kind::kContents, x, y, found});
    }
    return absl::OkStatus();
  }

  absl::Status ReadBoth(uint32_t a, uint32_t b, uint64_t begin, uint64_t end) {
    const auto named = [](const char* side, const absl::Status& status) {
      return absl::Status(status.code(), absl::StrFormat("%s: %s", side, status.message()));
    };
    const absl::Status of_a = a_reader_.ReadRange(a, begin, end, a_bytes_);
    if (!of_a.ok()) return named("A", of_a);
    const absl::Status of_b = b_reader_.ReadRange(b, begin, end, b_bytes_);
    return of_b.ok() ? of_b : named("B", of_b);
  }

  const CompareSide& a_;
  const CompareSide& b_;
  const std::function<bool(uint64_t, uint64_t)>& progress_;
  WholeTensorReader a_reader_;
  WholeTensorReader b_reader_;
  const Absences absent_in_a_;
  const Absences absent_in_b_;
  Comparison result_;
  uint64_t total_ = 0;
  uint64_t done_ = 0;
  std::vector<std::byte> a_bytes_;
  std::vector<std::byte> b_bytes_;
};

}  // namespace

absl::StatusOr<Comparison> Compare(const CompareSide& a, const CompareSide& b,
                                   const std::function<bool(uint64_t, uint64_t)>& progress) {
  return Comparer(a, b, progress).Run();
}

}  // namespace holdfast::converter
