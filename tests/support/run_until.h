// For tests of what runs on an event loop of its own.
#ifndef HOLDFAST_TESTS_SUPPORT_RUN_UNTIL_H_
#define HOLDFAST_TESTS_SUPPORT_RUN_UNTIL_H_

#include <functional>

#include "absl/time/time.h"
#include "base/clock.h"
#include "io/epoll_loop.h"

namespace holdfast {

// Runs the loop until `holds`; false if it does not within a minute.
inline bool RunUntil(EpollLoop& loop, const std::function<bool()>& holds) {
  const absl::Duration end = RealClock().Elapsed() + absl::Seconds(60);
  while (!holds()) {
    if (RealClock().Elapsed() > end) return false;
    const EventLoop::TimerId timer = loop.RunAfter(absl::Milliseconds(5), [&loop] { loop.Stop(); });
    loop.Run();
    loop.CancelTimer(timer);
  }
  return true;
}

}  // namespace holdfast

#endif  // HOLDFAST_TESTS_SUPPORT_RUN_UNTIL_H_
