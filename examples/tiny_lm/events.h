// What the program says: one JSON object per line on standard output, each line in one write(2), so
// that the lines of several ranks into one pipe do not mix.
#ifndef HOLDFAST_EXAMPLES_TINY_LM_EVENTS_H_
#define HOLDFAST_EXAMPLES_TINY_LM_EVENTS_H_

#include <cstdint>
#include <string>

namespace tiny_lm {

// `text` in quotes, with what JSON forbids escaped.
std::string JsonString(const std::string& text);

// Threads: one at a time.
class EventLog {
 public:
  explicit EventLog(uint32_t rank) : rank_(rank) {}
  void set_attempt(uint32_t attempt) { attempt_ = attempt; }
  // Prints {"event": `event`, "attempt": ..., "rank": ..., `members`}. `members` is JSON text
  // without braces, or empty.
  void Print(const std::string& event, const std::string& members) const;

 private:
  const uint32_t rank_;
  uint32_t attempt_ = 0;
};

}  // namespace tiny_lm

#endif  // HOLDFAST_EXAMPLES_TINY_LM_EVENTS_H_
