// Goal: however small systemd's store, it holds at any instant a beginning of what the agent held a
// moment ago, or holds now, in the order in which that came; and as much of it as there is room
// for. Method: seeded random calls. The test is systemd: it takes one message after the other, and
// looks at its store after each.
#include "agent/service_manager.h"

#include <errno.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "io/unique_fd.h"
#include "tests/support/temporary_directory.h"

namespace holdfast {
namespace {

using Names = std::vector<std::string>;

ino_t InodeOf(int fd) {
  struct stat info {};
  EXPECT_EQ(fstat(fd, &info), 0);
  return info.st_ino;
}

bool IsBeginningOf(const Names& some, const Names& all) {
  return some.size() <= all.size() && std::equal(some.begin(), some.end(), all.begin());
}

size_t BytesOf(const Names& names) {
  size_t bytes = 0;
  for (const std::string& name : names) bytes += name.size() + 1;
  return bytes;
}

class Systemd {
 public:
  Systemd() {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path_.data(), path_.size());
    EXPECT_EQ(bind(socket_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)), 0);
  }
  const std::string& path() const { return path_; }
  const Names& store() const { return store_; }
  ino_t InodeKept(const std::string& name) const { return inodes_.at(name); }

  // The next message; false: there is none.
  bool TakeOne() {
    char text[1024];
    char control[CMSG_SPACE(sizeof(int))];
    iovec bytes{text, sizeof(text)};
    msghdr message{};
    message.msg_iov = &bytes;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    const ssize_t length = recvmsg(socket_.get(), &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (length < 0) {
      EXPECT_EQ(errno, EAGAIN);
      return false;
    }
    const std::string said(text, static_cast<size_t>(length));
    const std::string name = said.substr(said.find("FDNAME=") + 7);
    if (said.starts_with("FDSTOREREMOVE=1\n")) {
      std::erase(store_, name);
      return true;
    }
    EXPECT_EQ(said, "FDSTORE=1\nFDPOLL=0\nFDNAME=" + name);
    const cmsghdr* const header = CMSG_FIRSTHDR(&message);
    if (header == nullptr) {
      ADD_FAILURE() << "no descriptor came for " << name;
      return true;
    }
    int fd = -1;
    std::memcpy(&fd, CMSG_DATA(header), sizeof(fd));
    const UniqueFd owned(fd);
    inodes_[name] = InodeOf(fd);
    if (std::find(store_.begin(), store_.end(), name) == store_.end()) store_.push_back(name);
    return true;
  }

 private:
  const TemporaryDirectory place_;
  const std::string path_ = place_.Join("notify");
  const UniqueFd socket_{::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0)};
  Names store_;
  std::map<std::string, ino_t> inodes_;
};

// An agent's worker, as far as it keeps and drops.
class Agent {
 public:
  Agent(Systemd& systemd, uint32_t descriptors_max)
      : systemd_(systemd),
        max_(descriptors_max),
        manager_(std::make_unique<ServiceManager>(UnitOf())) {}

  void Keep(const std::string& name) {
    const Names before = live_;
    live_.push_back(name);
    fds_[name] = UniqueFd(memfd_create("kept", MFD_CLOEXEC));
    ASSERT_TRUE(fds_[name]);
    manager_->Keep(name, fds_[name].get());
    Check(before);
  }
  void Drop(const std::string& name) {
    const Names before = live_;
    std::erase(live_, name);
    fds_.erase(name);
    manager_->Drop(name, [this](const std::string& waiting) {
      const auto found = fds_.find(waiting);
      return found == fds_.end() ? -1 : found->second.get();
    });
    Check(before);
  }
  // It dies, and the next one is given all that it had.
  void Restart() {
    manager_ = std::make_unique<ServiceManager>(UnitOf());
    for (const std::string& name : live_) {
      manager_->Keep(name, fds_.at(name).get());
      Check(live_);
    }
  }
  const Names& live() const { return live_; }

 private:
  ServiceUnit UnitOf() const { return {systemd_.path(), max_, {}}; }
  void Check(const Names& before) {
    while (systemd_.TakeOne()) {
      const Names& store = systemd_.store();
      EXPECT_TRUE(IsBeginningOf(store, before) || IsBeginningOf(store, live_))
          << testing::PrintToString(store) << " of " << testing::PrintToString(live_);
      EXPECT_LE(store.size(), max_);
    }
    for (const std::string& name : systemd_.store()) {
      EXPECT_EQ(systemd_.InodeKept(name), InodeOf(fds_.at(name).get())) << name;
    }
    const size_t room = max_ > 0 ? max_ - 1 : 0;
    Names expected = live_;
    if (expected.size() > room) expected.resize(room);
    while (BytesOf(expected) > kKeptNamesBytesMax) expected.pop_back();
    EXPECT_EQ(systemd_.store(), expected);
  }

  Systemd& systemd_;
  const uint32_t max_;
  std::unique_ptr<ServiceManager> manager_;
  Names live_;  // in the order in which they came
  std::map<std::string, UniqueFd> fds_;
};

TEST(ServiceManager, TheStoreIsAtAnyInstantABeginningOfWhatThereIs) {
  const uint32_t seed = std::random_device()();
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  std::mt19937 random(seed);
  for (const uint32_t max : {0u, 1u, 2u, 3u, 7u, 100u}) {
    SCOPED_TRACE(max);
    Systemd systemd;
    Agent agent(systemd, max);
    for (int i = 0; i < 400 && !testing::Test::HasFailure(); ++i) {
      const bool keeps = agent.live().empty() || (agent.live().size() < 12 && random() % 2 == 0);
      if (keeps) {
        // Not in the order of their names.
        agent.Keep(absl::StrCat("memory/", random() % 9, "-", i));
      } else {
        agent.Drop(std::string(agent.live()[random() % agent.live().size()]));
      }
      if (random() % 20 == 0) agent.Restart();
    }
  }
}

TEST(ServiceManager, NamesHaveRoomAsWell) {
  Systemd systemd;
  Agent agent(systemd, 3000);
  const std::string filler(200, 'x');
  const size_t count = kKeptNamesBytesMax / filler.size() + 20;
  for (size_t i = 0; i < count; ++i) agent.Keep(absl::StrCat("memory/", i, filler));
  EXPECT_LT(systemd.store().size(), count);
  // A short one waits as well, and comes in its turn.
  agent.Keep("memory/s");
  while (agent.live().size() > 1) agent.Drop(std::string(agent.live().front()));
  EXPECT_THAT(systemd.store(), testing::ElementsAre("memory/s"));
}

}  // namespace
}  // namespace holdfast
