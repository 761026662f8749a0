#include "agent/run/shim.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/close_range.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <climits>
#include <cstring>
#include <filesystem>
#include <string>
#include <utility>

#include "agent/run/process_tree.h"
#include "base/check.h"

extern char** environ;

namespace holdfast {
namespace {

constexpr int64_t kNsPerMs = 1'000'000;
constexpr int64_t kNsPerSecond = 1'000'000'000;
constexpr size_t kReadBytes = size_t{64} << 10;
// Of the rank's last words, read in one go when it has ended: a full pipe of the largest size that
// an ordinary user may set, and then some of what a process that it has left behind goes on
// writing.
constexpr size_t kLastWordsBytesMax = size_t{2} << 20;

int64_t NowNs() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * kNsPerSecond + now.tv_nsec;
}

// The pointers that execve(2) wants.
std::vector<char*> Pointers(const std::vector<std::string>& texts) {
  std::vector<char*> pointers;
  for (const std::string& text : texts) {
    pointers.push_back(const_cast<char*>(text.c_str()));  // execve does not write there
  }
  pointers.push_back(nullptr);
  return pointers;
}

// In the rank's process, before it is the rank: nothing here allocates.
int BecomeRank(const ShimSpec& spec, pid_t shim, const std::array<int, 3>& streams, char** command,
               char** environment) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != shim) return ECANCELED;  // it died before the line above
  if (setsid() < 0) return errno;
  for (int number = 0; number < 3; ++number) {
    if (dup2(streams[static_cast<size_t>(number)], number) < 0) return errno;
  }
  if (syscall(SYS_close_range, 3, UINT_MAX, CLOSE_RANGE_CLOEXEC) != 0 && errno != ENOSYS) {
    return errno;
  }
  for (const ShimSpec::Limit& limit : spec.limits) {
    const auto resource = static_cast<__rlimit_resource>(limit.resource);
    rlimit now{};
    if (getrlimit(resource, &now) != 0) continue;
    now.rlim_cur = std::min<rlim_t>(limit.soft, now.rlim_max);
    // Dropped: the rank goes on with the agent's limit.
    (void)setrlimit(resource, &now);
  }
  // Not as the agent, which never takes the core from a trainer (agent/limits.h). Dropped: then it
  // is.
  const sched_param no_priority{};
  (void)sched_setscheduler(0, SCHED_OTHER, &no_priority);
  umask(static_cast<mode_t>(spec.umask));
  if (chdir(spec.working_directory.c_str()) != 0) return errno;
  for (int number = 1; number < NSIG; ++number) signal(number, SIG_DFL);
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  environ = environment;  // execvp looks into its PATH
  execvp(command[0], command);
  return errno;
}

}  // namespace

Shim::Shim(ShimSpec spec)
    : spec_(std::move(spec)),
      listener_(spec_.listener),
      output_(spec_.log_directory, spec_.log_bytes_max) {
  state_.magic = kShimMagic;
  state_.version = kShimVersion;
  state_.rank = spec_.rank;
}

Shim::~Shim() = default;

bool Shim::BlockSignals() {
  for (const int number : {SIGPIPE, SIGHUP, SIGINT, SIGTERM, SIGQUIT, SIGUSR1, SIGUSR2}) {
    signal(number, SIG_IGN);
  }
  sigset_t child;
  sigemptyset(&child);
  sigaddset(&child, SIGCHLD);
  sigprocmask(SIG_SETMASK, &child, nullptr);
  signals_.Reset(signalfd(-1, &child, SFD_CLOEXEC | SFD_NONBLOCK));
  return static_cast<bool>(signals_);
}

int Shim::Run() {
  if (!BlockSignals() || prctl(PR_SET_CHILD_SUBREAPER, 1) != 0) return 1;
  fcntl(listener_.get(), F_SETFD, FD_CLOEXEC);
  fcntl(listener_.get(), F_SETFL, O_NONBLOCK);
  // Before the thread of the output is there: a fork of one thread only.
  StartRank();
  output_.Start();
  if (rank_ == 0) RankEnded(127 << 8);
  while (!IsOver()) Wait();
  unlink((spec_.directory + "/" + kShimSocketName).c_str());
  // Not the destructors: the log's storage may hang, and with it the thread that writes there.
  _exit(0);
}

void Shim::StartRank() {
  std::error_code error;
  std::filesystem::create_directories(spec_.log_directory, error);
  state_.start_error = error.value();
  int outputs[2][2];
  int failure[2];
  const UniqueFd nowhere(open("/dev/null", O_RDONLY | O_CLOEXEC));
  if (state_.start_error != 0) return;
  if (!nowhere || pipe2(outputs[0], O_CLOEXEC) != 0 || pipe2(outputs[1], O_CLOEXEC) != 0 ||
      pipe2(failure, O_CLOEXEC) != 0) {
    state_.start_error = errno;  // and a process without descriptors ends soon, with all of these
    return;
  }
  const std::vector<char*> command = Pointers(spec_.command);
  const std::vector<char*> environment = Pointers(spec_.environment);
  const pid_t self = getpid();
  state_.started_ns = NowNs();
  const pid_t child = fork();
  if (child == 0) {
    const int why =
        BecomeRank(spec_, self, {nowhere.get(), outputs[0][1], outputs[1][1]},
                   const_cast<char**>(command.data()), const_cast<char**>(environment.data()));
    [[maybe_unused]] const ssize_t told = write(failure[1], &why, sizeof(why));
    _exit(127);
  }
  if (child < 0) state_.start_error = errno;
  for (size_t i = 0; i < 2; ++i) {
    close(outputs[i][1]);
    fcntl(outputs[i][0], F_SETFL, O_NONBLOCK);
    pipes_.push_back({UniqueFd(outputs[i][0]), static_cast<Stream>(i)});
  }
  close(failure[1]);
  int why = 0;
  // Ends at once: with exec, with the child's death, or with what it says.
  if (read(failure[0], &why, sizeof(why)) == static_cast<ssize_t>(sizeof(why))) {
    state_.start_error = why;
  }
  close(failure[0]);
  if (child < 0) return;
  if (state_.start_error != 0) {
    waitpid(child, nullptr, 0);
    return;
  }
  rank_ = child;
  state_.rank_pid = child;
}

int Shim::PollMilliseconds(int64_t now_ns) const {
  int64_t until_ns = INT64_MAX;
  if (kills_tree_ && state_.tree_has_ended == 0) until_ns = next_kill_ns_;
  if (state_.has_ended != 0 && state_.is_recorded == 0) {
    until_ns = std::min(until_ns, now_ns + kNsPerSecond);
  }
  if (told_ns_ != 0 && state_.tree_has_ended != 0) {
    until_ns = std::min(until_ns, told_ns_ + int64_t{spec_.linger_seconds} * kNsPerSecond);
  }
  if (until_ns == INT64_MAX) return -1;
  return static_cast<int>(std::clamp<int64_t>((until_ns - now_ns) / kNsPerMs + 1, 0, 60'000));
}

void Shim::Wait() {
  const int64_t now_ns = NowNs();
  const size_t room = output_.Room(now_ns);
  std::vector<pollfd> ready;
  ready.push_back({listener_.get(), POLLIN, 0});
  ready.push_back({signals_.get(), POLLIN, 0});
  ready.push_back({output_.progress_fd(), POLLIN, 0});
  for (const Pipe& pipe : pipes_) {
    ready.push_back({room > 0 && pipe.read_end ? pipe.read_end.get() : -1, POLLIN, 0});
  }
  const size_t connections_at = ready.size();
  const size_t connection_count = connections_.size();
  for (const UniqueFd& connection : connections_) ready.push_back({connection.get(), POLLIN, 0});
  int wait_ms = PollMilliseconds(now_ns);
  // The pipe is looked at again when the log has had its time.
  if (room == 0) wait_ms = wait_ms < 0 ? 100 : std::min(wait_ms, 100);
  poll(ready.data(), ready.size(), wait_ms);

  output_.DrainProgress();
  for (size_t i = 0; i < pipes_.size(); ++i) {
    if (ready[3 + i].revents != 0) ReadPipe(pipes_[i], output_.Room(now_ns));
  }
  signalfd_siginfo info{};
  // What it says is known from waitpid(2).
  while (read(signals_.get(), &info, sizeof(info)) > 0) continue;
  Reap();
  // From behind: one that has ended is taken out.
  for (size_t i = connection_count; i-- > 0;) {
    if (ready[connections_at + i].revents != 0) Serve(i);
  }
  if ((ready[0].revents & POLLIN) != 0) Accept();
  KillTreeIfDue();
  CheckRecord();
}

void Shim::Accept() {
  for (;;) {
    UniqueFd connection(accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!connection) return;
    // The oldest gives way: it is the one whose agent is dead.
    if (connections_.size() >= kConnectionsMax) connections_.erase(connections_.begin());
    if (TellOne(connection.get())) connections_.push_back(std::move(connection));
  }
}

void Shim::Serve(size_t index) {
  for (;;) {
    ShimRequest request{};
    const ssize_t got = recv(connections_[index].get(), &request, sizeof(request), MSG_DONTWAIT);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && errno == EAGAIN) return;
    if (got != static_cast<ssize_t>(sizeof(request)) || request.magic != kShimMagic) {
      connections_.erase(connections_.begin() + static_cast<ptrdiff_t>(index));
      return;
    }
    Obey(request);
  }
}

void Shim::Obey(const ShimRequest& request) {
  switch (request.type) {
    case ShimRequestType::kWatch:
      return;
    case ShimRequestType::kSignal: {
      // Its number is its own until it is reaped.
      if (rank_ == 0 || state_.has_ended != 0) return;
      const char rank_state = ProcessState(rank_);
      const bool is_stopped = rank_state == 'T' || rank_state == 't';
      const int number = request.signal_number;
      kill(-rank_, number == SIGTERM && is_stopped ? SIGKILL : number);
      return;
    }
    case ShimRequestType::kRelease:
      is_released_ = true;
      [[fallthrough]];
    case ShimRequestType::kKillTree:
      kills_tree_ = true;
      next_kill_ns_ = 0;
      return;
  }
}

bool Shim::TellOne(int connection) {
  ShimState state = state_;
  state.output_bytes = output_.bytes();
  state.output_bytes_dropped = output_.dropped_bytes();
  // Not before its log is complete and it is on disk, if it can be.
  state.has_ended &= is_told_ ? 1 : 0;
  state.tree_has_ended &= is_told_ ? 1 : 0;
  return send(connection, &state, sizeof(state), MSG_NOSIGNAL | MSG_DONTWAIT) ==
         static_cast<ssize_t>(sizeof(state));
}

// One that does not read is closed: it comes again, and is told the state then.
void Shim::Tell() {
  for (size_t i = connections_.size(); i-- > 0;) {
    if (!TellOne(connections_[i].get())) {
      connections_.erase(connections_.begin() + static_cast<ptrdiff_t>(i));
    }
  }
}

void Shim::ReadPipe(Pipe& pipe, size_t bytes_max) {
  std::array<char, kReadBytes> bytes;
  while (bytes_max > 0) {
    const ssize_t got = read(pipe.read_end.get(), bytes.data(), std::min(bytes.size(), bytes_max));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) {
      pipe.read_end.Reset();
      return;
    }
    output_.Put(pipe.stream, bytes.data(), static_cast<size_t>(got));
    bytes_max -= static_cast<size_t>(got);
  }
}

void Shim::ReadWhatIsThere() {
  for (Pipe& pipe : pipes_) {
    if (pipe.read_end) ReadPipe(pipe, kLastWordsBytesMax);
  }
}

void Shim::Reap() {
  for (;;) {
    int status = 0;
    const pid_t pid = waitpid(-1, &status, WNOHANG);
    if (pid < 0 && errno == EINTR) continue;
    if (pid == rank_ && pid > 0) RankEnded(status);
    if (pid > 0) continue;
    const bool nobody = pid < 0 && errno == ECHILD;
    if (nobody && state_.has_ended != 0 && state_.tree_has_ended == 0) {
      ReadWhatIsThere();
      state_.tree_has_ended = 1;
      if (is_told_) Tell();
    }
    return;
  }
}

void Shim::RankEnded(int wait_status) {
  ReadWhatIsThere();
  state_.wait_status = wait_status;
  state_.has_ended = 1;
  state_.ended_ns = NowNs();
  if (rank_ == 0) state_.tree_has_ended = 1;
  next_kill_ns_ = 0;
}

// The exit is told when its log is complete, or would not be soon.
void Shim::CheckRecord() {
  if (state_.has_ended == 0) return;
  const bool waits = output_.waiting_bytes() > 0 && NowNs() - state_.ended_ns < kLastOutputNs;
  if (waits) return;
  const bool was_recorded = state_.is_recorded != 0;
  if (!was_recorded && WriteRecord()) {
    state_.is_recorded = 1;
    told_ns_ = NowNs();
  }
  if (!is_told_ || (state_.is_recorded != 0) != was_recorded) {
    is_told_ = true;
    Tell();
  }
}

bool Shim::WriteRecord() {
  ExitRecord record;
  record.rank = spec_.rank;
  record.rank_pid = state_.rank_pid;
  record.wait_status = state_.wait_status;
  record.start_error = state_.start_error;
  record.started_ns = state_.started_ns;
  record.ended_ns = state_.ended_ns;
  const std::string text = EncodeExitRecord(record);
  const std::string path = spec_.directory + "/" + kExitRecordName;
  const std::string partial = path + ".partial";
  const UniqueFd file(open(partial.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
  return file && write(file.get(), text.data(), text.size()) == static_cast<ssize_t>(text.size()) &&
         rename(partial.c_str(), path.c_str()) == 0;
}

void Shim::KillTreeIfDue() {
  if (!kills_tree_ || state_.tree_has_ended != 0) return;
  const int64_t now_ns = NowNs();
  if (now_ns < next_kill_ns_) return;
  SignalDescendants(getpid(), SIGKILL);
  next_kill_ns_ = now_ns + kKillEveryNs;
}

bool Shim::IsOver() const {
  if (state_.tree_has_ended == 0 || !is_told_) return false;
  if (is_released_) return true;
  return told_ns_ != 0 && NowNs() - told_ns_ >= int64_t{spec_.linger_seconds} * kNsPerSecond;
}

}  // namespace holdfast
