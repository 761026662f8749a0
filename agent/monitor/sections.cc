#include "agent/monitor/sections.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "base/utf8.h"

namespace holdfast {
namespace {

using monitor::SectionKind;

constexpr std::array<std::pair<std::string_view, SectionKind>, 26> kKinds = {{
    {"data", SectionKind::kData},
    {"data_loader", SectionKind::kData},
    {"data_loading", SectionKind::kData},
    {"dataloader", SectionKind::kData},
    {"input", SectionKind::kData},
    {"load_batch", SectionKind::kData},
    {"next_batch", SectionKind::kData},
    {"checkpoint", SectionKind::kCheckpoint},
    {"load_checkpoint", SectionKind::kCheckpoint},
    {"restore", SectionKind::kCheckpoint},
    {"save", SectionKind::kCheckpoint},
    {"save_checkpoint", SectionKind::kCheckpoint},
    {"eval", SectionKind::kEvaluation},
    {"evaluate", SectionKind::kEvaluation},
    {"evaluation", SectionKind::kEvaluation},
    {"test", SectionKind::kEvaluation},
    {"validate", SectionKind::kEvaluation},
    {"validation", SectionKind::kEvaluation},
    {"autotune", SectionKind::kCompile},
    {"compilation", SectionKind::kCompile},
    {"compile", SectionKind::kCompile},
    {"graph_capture", SectionKind::kCompile},
    {"jit", SectionKind::kCompile},
    {"warmup", SectionKind::kCompile},
    {"garbage_collection", SectionKind::kCollection},
    {"gc", SectionKind::kCollection},
}};

// "Data-Loading 3" -> "data_loading".
std::string WordsOf(std::string_view name) {
  std::string words;
  for (const char c : name) {
    if (c >= 'A' && c <= 'Z') {
      words += static_cast<char>(c - 'A' + 'a');
    } else if ((c >= 'a' && c <= 'z') || c == '_') {
      words += c;
    } else if (c == '-' || c == ' ') {
      words += '_';
    } else {
      break;
    }
  }
  while (!words.empty() && words.back() == '_') words.pop_back();
  return words;
}

std::string NameAt(const abi::BoardHeader& header, uint32_t level) {
  char text[abi::kBoardSectionNameBytes];
  for (size_t i = 0; i < sizeof(text) / 8; ++i) {
    const uint64_t word = header.section_names[level][i].load(std::memory_order_acquire);
    std::memcpy(text + 8 * i, &word, 8);
  }
  return std::string(text, strnlen(text, sizeof(text) - 1));
}

}  // namespace

SectionKind SectionKindOf(std::string_view name) {
  const std::string words = WordsOf(name);
  for (const auto& [known, kind] : kKinds) {
    if (known == words) return kind;
  }
  return SectionKind::kCompute;
}

void SectionTracker::Sample(const abi::BoardHeader& header, absl::Duration passed) {
  if (!stack_.empty() && SectionKindOf(stack_.back().name) == SectionKind::kData) {
    data_us_ += static_cast<uint64_t>(absl::ToInt64Microseconds(std::min(passed, kSampleMax)));
  }
  const uint32_t depth =
      std::min(header.section_depth.load(std::memory_order_acquire), abi::kBoardSectionDepth);
  const uint64_t changed = header.section_ticks.load(std::memory_order_acquire);
  if (changed == changed_ && depth == stack_.size()) return;
  changed_ = changed;
  std::vector<Level> stack;
  for (uint32_t level = 0; level < depth; ++level) {
    std::string name = NameAt(header, level);
    if (!IsUtf8(name)) name = "?";
    // The innermost one has just begun, unless what was inside it has just ended.
    const bool was_open = level < stack_.size() && stack_[level].name == name &&
                          (level + 1 < depth || depth < stack_.size());
    stack.push_back({std::move(name), was_open ? stack_[level].since : changed});
  }
  stack_ = std::move(stack);
}

std::vector<monitor::Section> SectionTracker::Open(const TickInstant& now) const {
  std::vector<monitor::Section> open;
  const size_t first = stack_.size() - std::min(stack_.size(), monitor::kSectionsMax);
  for (size_t level = first; level < stack_.size(); ++level) {
    const Level& one = stack_[level];
    open.push_back({SectionKindOf(one.name), now.MicrosSince(one.since), one.name});
  }
  return open;
}

}  // namespace holdfast
