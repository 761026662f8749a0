// A keeper of descriptors for tests of what the agent's monitor keeps.
#ifndef HOLDFAST_AGENT_MONITOR_TABLE_KEEPER_TESTING_H_
#define HOLDFAST_AGENT_MONITOR_TABLE_KEEPER_TESTING_H_

#include <unistd.h>

#include <cstddef>
#include <map>
#include <string>
#include <vector>

#include "checkpoint/descriptor_keeper.h"
#include "gtest/gtest.h"

namespace holdfast {

// Model: a keeper's table. Not modelled: the keeper.
class TableKeeper final : public DescriptorKeeper {
 public:
  void Keep(const std::string& name, int fd) override {
    EXPECT_TRUE(fds_.emplace(name, dup(fd)).second) << name;
  }
  void Drop(const std::string& name) override { fds_.erase(name); }
  std::vector<KeptDescriptor> HandOver() const {
    std::vector<KeptDescriptor> kept;
    for (const auto& [name, fd] : fds_) kept.push_back({name, UniqueFd(dup(fd.get()))});
    return kept;
  }
  size_t size() const { return fds_.size(); }

 private:
  std::map<std::string, UniqueFd> fds_;
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_MONITOR_TABLE_KEEPER_TESTING_H_
