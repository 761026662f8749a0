#include "hook/selection.h"

#include <cstring>
#include <string_view>
#include <utility>
#include <vector>

#include "hook/abi/messages.h"

namespace holdfast::hook {
namespace {

constexpr size_t kPatternsMax = 1000;
constexpr size_t kPatternBytesMax = 4096;

struct Pattern {
  std::string_view text;
  uint32_t of;
};

Error Collect(const char* what, uint32_t of, const char* const* texts, size_t count,
              std::vector<Pattern>* patterns) {
  if (count > kPatternsMax) {
    return Error(HF_INVALID_ARGUMENT, "hf_restore_options.%s: expected at most %zu, found %zu",
                 what, kPatternsMax, count);
  }
  if (texts == nullptr && count > 0) {
    return Error(HF_INVALID_ARGUMENT, "hf_restore_options.%s is NULL", what);
  }
  for (size_t i = 0; i < count; ++i) {
    const size_t bytes = texts[i] == nullptr ? 0 : strnlen(texts[i], kPatternBytesMax + 1);
    if (bytes == 0 || bytes > kPatternBytesMax) {
      return Error(HF_INVALID_ARGUMENT,
                   "hf_restore_options.%s[%zu]: expected a pattern of 1 to %zu bytes, found %s",
                   what, i, kPatternBytesMax, bytes == 0 ? "none" : "a longer one");
    }
    patterns->push_back({{texts[i], bytes}, of});
  }
  return Error();
}

std::vector<std::byte> Serialize(const std::vector<Pattern>& patterns) {
  const abi::RestoreSelection header = {abi::kProtocolMagic, abi::kProtocolVersion,
                                        patterns.size()};
  uint64_t text_offset = sizeof(header) + patterns.size() * sizeof(abi::SelectionPattern);
  std::vector<std::byte> bytes(text_offset);
  std::memcpy(bytes.data(), &header, sizeof(header));
  for (size_t i = 0; i < patterns.size(); ++i) {
    const std::string_view text = patterns[i].text;
    const abi::SelectionPattern entry = {text_offset, static_cast<uint32_t>(text.size()),
                                         patterns[i].of};
    std::memcpy(bytes.data() + sizeof(header) + i * sizeof(entry), &entry, sizeof(entry));
    const auto* begin = reinterpret_cast<const std::byte*>(text.data());
    bytes.insert(bytes.end(), begin, begin + text.size());
    text_offset += text.size();
  }
  return bytes;
}

}  // namespace

Result<std::shared_ptr<const Selection>> Selection::Make(const hf_restore_options& options) {
  std::vector<Pattern> patterns;
  if (Error error = Collect("tensors", abi::SelectionPattern::kTensors, options.tensors,
                            options.tensor_count, &patterns);
      !error.ok()) {
    return error;
  }
  if (Error error = Collect("states", abi::SelectionPattern::kStates, options.states,
                            options.state_count, &patterns);
      !error.ok()) {
    return error;
  }
  if (patterns.empty()) return std::shared_ptr<const Selection>();
  if (patterns.size() > kPatternsMax) {
    return Error(HF_INVALID_ARGUMENT,
                 "hf_restore_options: expected at most %zu patterns, found %zu", kPatternsMax,
                 patterns.size());
  }
  const std::vector<std::byte> bytes = Serialize(patterns);
  Result<UniqueFd> memory = MakeSealedMemory("holdfast-selection", bytes);
  if (!memory.ok()) return memory.error();
  auto selection = std::make_shared<Selection>();
  selection->memory_ = std::move(memory.value());
  selection->bytes_ = bytes.size();
  return std::shared_ptr<const Selection>(std::move(selection));
}

}  // namespace holdfast::hook
