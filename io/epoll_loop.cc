#include "io/epoll_loop.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "base/check.h"
#include "io/errno_status.h"

namespace holdfast {
namespace {

constexpr int kEventsPerRound = 64;
constexpr uint64_t kWakeWatch = 0;  // the number of the eventfd; real watches begin at 1
// Epoll's time stands still while the machine is suspended and the clock's does not, so the clock
// is looked at again at least this often.
constexpr absl::Duration kWaitMax = absl::Seconds(10);

}  // namespace

absl::StatusOr<std::unique_ptr<EpollLoop>> EpollLoop::Create(const Clock& clock) {
  UniqueFd epoll_fd(epoll_create1(EPOLL_CLOEXEC));
  if (!epoll_fd) return ErrnoStatus(errno, "create", "epoll of the event loop");
  UniqueFd wake_fd(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  if (!wake_fd) return ErrnoStatus(errno, "create", "eventfd of the event loop");
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = kWakeWatch;
  if (epoll_ctl(epoll_fd.get(), EPOLL_CTL_ADD, wake_fd.get(), &event) != 0) {
    return ErrnoStatus(errno, "watch", "eventfd of the event loop");
  }
  return std::unique_ptr<EpollLoop>(new EpollLoop(clock, std::move(epoll_fd), std::move(wake_fd)));
}

EpollLoop::EpollLoop(const Clock& clock, UniqueFd epoll_fd, UniqueFd wake_fd)
    : clock_(clock), epoll_fd_(std::move(epoll_fd)), wake_fd_(std::move(wake_fd)) {}

EpollLoop::~EpollLoop() = default;

void EpollLoop::Run() {
  // What Stop() before Run() left behind ends this Run() at once: the exchange below sees it.
  while (!stopped_.exchange(false)) {
    RunReady(WaitMilliseconds());
    RunTimers();
    RunPosted();
  }
}

void EpollLoop::Stop() {
  stopped_ = true;
  Wake();
}

void EpollLoop::Wake() {
  const uint64_t one = 1;
  // EAGAIN: the counter is full, so it is readable.
  if (write(wake_fd_.get(), &one, sizeof(one)) < 0) CHECK(errno == EAGAIN);
}

void EpollLoop::Post(std::function<void()> work) {
  bool first;
  {
    MutexLock lock(mutex_);
    first = posted_.empty();
    posted_.push_back(std::move(work));
  }
  if (first) Wake();
}

EventLoop::TimerId EpollLoop::RunAfter(absl::Duration delay, std::function<void()> work) {
  const TimerId id = next_timer_id_++;
  const absl::Duration due = clock_.Elapsed() + std::max(delay, absl::ZeroDuration());
  timers_.emplace(std::make_pair(due, id), std::move(work));
  timer_due_.emplace(id, due);
  return id;
}

void EpollLoop::CancelTimer(TimerId id) {
  const auto due = timer_due_.find(id);
  if (due == timer_due_.end()) return;
  timers_.erase({due->second, id});
  timer_due_.erase(due);
}

void EpollLoop::Watch(int fd, FdEvents events, std::function<void()> ready) {
  CHECK(fd >= 0);
  Unwatch(fd);
  const auto wanted = static_cast<uint32_t>(events);
  epoll_event event{};
  if ((wanted & static_cast<uint32_t>(FdEvents::kReadable)) != 0) event.events |= EPOLLIN;
  if ((wanted & static_cast<uint32_t>(FdEvents::kWritable)) != 0) event.events |= EPOLLOUT;
  event.data.u64 = next_watch_;
  CHECK(epoll_ctl(epoll_fd_.get(), EPOLL_CTL_ADD, fd, &event) == 0);
  watches_[next_watch_] = {fd, std::make_shared<std::function<void()>>(std::move(ready))};
  watch_of_fd_[fd] = next_watch_++;
}

void EpollLoop::Unwatch(int fd) {
  const auto watch = watch_of_fd_.find(fd);
  if (watch == watch_of_fd_.end()) return;
  CHECK(epoll_ctl(epoll_fd_.get(), EPOLL_CTL_DEL, fd, nullptr) == 0);  // fails if closed before
  watches_.erase(watch->second);
  watch_of_fd_.erase(watch);
}

int EpollLoop::WaitMilliseconds() {
  {
    MutexLock lock(mutex_);
    if (!posted_.empty() || stopped_) return 0;
  }
  absl::Duration wait = kWaitMax;
  if (!timers_.empty()) wait = std::min(wait, timers_.begin()->first.first - clock_.Elapsed());
  if (wait <= absl::ZeroDuration()) return 0;
  return static_cast<int>(absl::ToInt64Milliseconds(absl::Ceil(wait, absl::Milliseconds(1))));
}

void EpollLoop::RunReady(int wait_milliseconds) {
  epoll_event events[kEventsPerRound];
  const int count = epoll_wait(epoll_fd_.get(), events, kEventsPerRound, wait_milliseconds);
  CHECK(count >= 0 || errno == EINTR);
  for (int i = 0; i < count && !stopped_; ++i) {  // what is left out is ready again next time
    if (events[i].data.u64 == kWakeWatch) {
      uint64_t posts;
      if (read(wake_fd_.get(), &posts, sizeof(posts)) < 0) CHECK(errno == EAGAIN || errno == EINTR);
      continue;
    }
    const uint64_t id = events[i].data.u64;  // a copy: epoll_event is packed
    const auto watch = watches_.find(id);
    if (watch == watches_.end()) continue;  // unwatched earlier in this round
    const std::shared_ptr<std::function<void()>> ready = watch->second.ready;
    (*ready)();
  }
}

void EpollLoop::RunTimers() {
  if (timers_.empty()) return;
  // One look at the clock and at the newest timer, so that a timer that starts another with no
  // delay does not keep the loop here.
  const absl::Duration now = clock_.Elapsed();
  const TimerId newest = next_timer_id_;
  while (!timers_.empty() && timers_.begin()->first.first <= now &&
         timers_.begin()->first.second < newest && !stopped_) {
    const auto timer = timers_.extract(timers_.begin());
    timer_due_.erase(timer.key().second);
    timer.mapped()();
  }
}

void EpollLoop::RunPosted() {
  std::deque<std::function<void()>> batch;
  {
    MutexLock lock(mutex_);
    batch.swap(posted_);
  }
  while (!batch.empty() && !stopped_) {
    const std::function<void()> work = std::move(batch.front());
    batch.pop_front();
    work();
  }
  // After Stop(), what has not run stays, before what was posted meanwhile.
  MutexLock lock(mutex_);
  posted_.insert(posted_.begin(), std::make_move_iterator(batch.begin()),
                 std::make_move_iterator(batch.end()));
}

}  // namespace holdfast
