#include "checkpoint/restore_selection.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "base/suggestion.h"
#include "format/tensor_piece.h"
#include "hook/abi/messages.h"

namespace holdfast {
namespace {

constexpr size_t kNamesLookedAtMax = 10'000;  // for "did you mean"

absl::Status Invalid(const std::string& text) {
  return absl::InvalidArgumentError("restore selection: " + text);
}

// The patterns of one kind, and which of them have chosen something.
class Patterns {
 public:
  static absl::StatusOr<Patterns> Parse(const char* what, const std::vector<std::string>& texts) {
    Patterns patterns;
    for (const std::string& text : texts) {
      absl::StatusOr<NamePattern> pattern = NamePattern::Parse(text);
      if (!pattern.ok()) {
        return Invalid(absl::StrFormat("%s: expected %s, found \"%s\"", what,
                                       pattern.status().message(), text));
      }
      patterns.patterns_.push_back(*std::move(pattern));
    }
    patterns.used_.assign(texts.size(), false);
    patterns.fits_alone_.assign(texts.size(), false);
    return patterns;
  }

  // The patterns that the name fits.
  std::vector<uint32_t> Fitting(std::string_view name) {
    std::vector<uint32_t> fitting;
    for (uint32_t i = 0; i < patterns_.size(); ++i) {
      if (!patterns_[i].Match(name).has_value()) continue;
      fitting.push_back(i);
      fits_alone_[i] = true;
    }
    return fitting;
  }
  bool Chooses(const std::vector<uint32_t>& fitting) const {
    return patterns_.empty() || !fitting.empty();
  }
  void MarkUsed(const std::vector<uint32_t>& fitting) {
    for (const uint32_t i : fitting) used_[i] = true;
  }

  // OK if every pattern has chosen something. `names` are those that there are.
  absl::Status CheckUsed(const char* what, const std::vector<std::string>& texts,
                         const std::vector<std::string_view>& names) const {
    for (size_t i = 0; i < used_.size(); ++i) {
      if (used_[i]) continue;
      if (fits_alone_[i]) {
        return Invalid(absl::StrFormat(
            "%s: \"%s\" fits, but nothing that the other patterns choose as well", what, texts[i]));
      }
      return Invalid(absl::StrFormat("%s: nothing in the layout fits \"%s\"%s", what, texts[i],
                                     DidYouMean(texts[i], names)));
    }
    return absl::OkStatus();
  }

 private:
  std::vector<NamePattern> patterns_;
  std::vector<bool> used_;
  std::vector<bool> fits_alone_;
};

}  // namespace

absl::StatusOr<RestoreSelection> DecodeSelection(std::string_view bytes) {
  abi::RestoreSelection header;
  if (bytes.size() < sizeof(header)) {
    return Invalid(
        absl::StrFormat("expected at least %d bytes, found %d", sizeof(header), bytes.size()));
  }
  std::memcpy(&header, bytes.data(), sizeof(header));
  if (header.magic != abi::kProtocolMagic || header.version != abi::kProtocolVersion) {
    return Invalid(absl::StrFormat("expected magic 0x%08x, version %d, found 0x%08x, %d",
                                   abi::kProtocolMagic, abi::kProtocolVersion, header.magic,
                                   header.version));
  }
  if (header.pattern_count > kSelectionPatternsMax ||
      header.pattern_count > (bytes.size() - sizeof(header)) / sizeof(abi::SelectionPattern)) {
    return Invalid(absl::StrFormat("at most %d patterns, found %d, in %d bytes",
                                   kSelectionPatternsMax, header.pattern_count, bytes.size()));
  }
  RestoreSelection selection;
  uint64_t texts_bytes = 0;  // no overflow: a thousand, each within `bytes`
  for (uint64_t i = 0; i < header.pattern_count; ++i) {
    abi::SelectionPattern entry;
    std::memcpy(&entry, bytes.data() + sizeof(header) + i * sizeof(entry), sizeof(entry));
    if (entry.text_offset > bytes.size() || entry.text_bytes > bytes.size() - entry.text_offset) {
      return Invalid(absl::StrFormat("pattern %d: %d bytes at offset %d, found %d bytes in all", i,
                                     entry.text_bytes, entry.text_offset, bytes.size()));
    }
    // A text that many patterns share would be many in memory.
    texts_bytes += entry.text_bytes;
    if (texts_bytes > bytes.size()) {
      return Invalid(
          absl::StrFormat("patterns 0 to %d: texts of their own, found %d bytes of them "
                          "in %d bytes in all",
                          i, texts_bytes, bytes.size()));
    }
    const std::string text(bytes.substr(entry.text_offset, entry.text_bytes));
    RETURN_IF_ERROR(CheckName("pattern", text));
    if (entry.of != abi::SelectionPattern::kTensors && entry.of != abi::SelectionPattern::kStates) {
      return Invalid(absl::StrFormat(
          "pattern %d: expected one of tensors (0) or states (1), found %d", i, entry.of));
    }
    (entry.of == abi::SelectionPattern::kTensors ? selection.tensors : selection.states)
        .push_back(text);
  }
  return selection;
}

absl::StatusOr<std::vector<bool>> ChooseStates(const RestoreSelection& selection,
                                               const std::vector<TensorState>& tensor_states) {
  ASSIGN_OR_RETURN(Patterns tensors, Patterns::Parse("tensors", selection.tensors));
  ASSIGN_OR_RETURN(Patterns states, Patterns::Parse("states", selection.states));
  std::vector<bool> chosen(tensor_states.size(), false);
  std::vector<std::string_view> tensor_names;
  std::map<std::string_view, std::vector<uint32_t>> state_fitting;
  std::vector<uint32_t> tensor_fitting;
  for (size_t i = 0; i < tensor_states.size(); ++i) {
    const TensorState& each = tensor_states[i];
    // States of one tensor are neighbours.
    if (i == 0 || each.tensor != tensor_states[i - 1].tensor) {
      tensor_fitting = tensors.Fitting(each.tensor);
      if (tensor_names.size() < kNamesLookedAtMax) tensor_names.push_back(each.tensor);
    }
    const auto [state, is_new] = state_fitting.try_emplace(each.state);
    if (is_new) state->second = states.Fitting(each.state);
    if (!tensors.Chooses(tensor_fitting) || !states.Chooses(state->second)) continue;
    chosen[i] = true;
    tensors.MarkUsed(tensor_fitting);
    states.MarkUsed(state->second);
  }
  std::vector<std::string_view> state_names;
  for (const auto& [name, fitting] : state_fitting) state_names.push_back(name);
  RETURN_IF_ERROR(tensors.CheckUsed("tensors", selection.tensors, tensor_names));
  RETURN_IF_ERROR(states.CheckUsed("states", selection.states, state_names));
  return chosen;
}

}  // namespace holdfast
