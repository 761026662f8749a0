// Ctrl-C, for verbs that have something to undo: the signal becomes a question that they ask now
// and then. A second one ends the process as usual.
#ifndef HOLDFAST_CLI_INTERRUPT_H_
#define HOLDFAST_CLI_INTERRUPT_H_

#include <csignal>

namespace holdfast::cli {

// While it lives, SIGINT, SIGTERM and SIGHUP set a flag; those that were ignored stay so (nohup, a
// script's background process). One at a time. Threads: requested() any.
class InterruptFlag {
 public:
  InterruptFlag();
  ~InterruptFlag();
  InterruptFlag(const InterruptFlag&) = delete;
  InterruptFlag& operator=(const InterruptFlag&) = delete;

  bool requested() const;

 private:
  struct sigaction before_[3];
};

}  // namespace holdfast::cli

#endif  // HOLDFAST_CLI_INTERRUPT_H_
