// A job against a TestAgent, with random buffers and plans and an oracle for images: the common
// ground of hook/'s tests.
#ifndef HOLDFAST_HOOK_TEST_JOB_H_
#define HOLDFAST_HOOK_TEST_JOB_H_

#include <algorithm>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "hook/job.h"
#include "hook/test_agent.h"

namespace holdfast::hook {

inline constexpr int64_t kPatienceNs = 120 * kNsPerSecond;
// The agent fills the memory with this; what is not written keeps it.
inline constexpr std::byte kUntouched{0xee};

inline Settings TestSettings(const TestAgent& agent) {
  Settings settings;
  settings.job = "test";
  settings.rank = 2;
  settings.world_size = 4;
  settings.local_rank = 2;
  settings.socket_path = agent.socket_path();
  settings.check_source = CheckSource::kNone;
  settings.capture_head_start_ns = 0;
  return settings;
}

// Buffers of random bytes, and what hf_register needs of them.
class TestBuffers {
 public:
  void Add(const std::string& name, uint64_t bytes, uint32_t group, std::mt19937& random) {
    std::vector<std::byte>& data = data_.emplace_back(bytes);
    for (std::byte& byte : data) byte = static_cast<std::byte>(random() % 200);
    names_.push_back(name);
    groups_.push_back(group);
  }
  size_t count() const { return data_.size(); }
  std::vector<std::byte>& data(size_t index) { return data_[index]; }
  const std::vector<std::byte>& data(size_t index) const { return data_[index]; }
  uint32_t group(size_t index) const { return groups_[index]; }
  std::vector<hf_buffer> List() {
    std::vector<hf_buffer> list;
    for (size_t i = 0; i < data_.size(); ++i) {
      list.push_back({names_[i].c_str(), data_[i].data(), data_[i].size(), groups_[i]});
    }
    return list;
  }

 private:
  std::vector<std::string> names_;
  std::vector<std::vector<std::byte>> data_;
  std::vector<uint32_t> groups_;
};

inline TestBuffers RandomBuffers(std::mt19937& random, size_t count, uint64_t bytes_max,
                                 uint32_t group_count = 5) {
  TestBuffers buffers;
  for (size_t i = 0; i < count; ++i) {
    const uint64_t bytes = random() % 8 == 0 ? random() % 2 : random() % (bytes_max + 1);
    buffers.Add("state/tensor" + std::to_string(i), bytes, random() % group_count, random);
  }
  return buffers;
}

// Random strided operations of the buffers at random places of the image, in order.
inline TestPlan RandomPlan(std::mt19937& random, const TestBuffers& buffers, uint64_t block_bytes) {
  TestPlan plan;
  plan.block_bytes = block_bytes;
  uint64_t at = random() % 5000;
  std::vector<size_t> order(buffers.count());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);
  for (const size_t index : order) {
    const uint64_t bytes = buffers.data(index).size();
    abi::CaptureOp op = {};
    op.image_offset = at;
    op.buffer_index = static_cast<uint32_t>(index);
    op.group = buffers.group(index);
    if (bytes > 0) {
      op.count = 1 + random() % 50;
      op.buffer_stride = bytes / op.count;
      if (op.buffer_stride == 0) {
        op.count = 1;
        op.buffer_stride = bytes;
      }
      op.run_bytes = 1 + random() % op.buffer_stride;
      op.buffer_offset = random() % (op.buffer_stride - op.run_bytes + 1);
    }
    plan.ops.push_back(op);
    at += OpBytes(op) + (random() % 3 == 0 ? random() % 9000 : 0);
  }
  plan.block_count = static_cast<uint32_t>((at + block_bytes) / block_bytes);
  plan.shuffle_seed = static_cast<uint32_t>(random());
  return plan;
}

// The image as the operations say, byte by byte.
inline std::vector<std::byte> OracleImage(const TestPlan& plan, const TestBuffers& buffers) {
  std::vector<std::byte> image(plan.block_bytes * plan.block_count, kUntouched);
  for (const abi::CaptureOp& op : plan.ops) {
    for (uint64_t run = 0; run < op.count; ++run) {
      for (uint64_t i = 0; i < op.run_bytes; ++i) {
        image[op.image_offset + run * op.run_bytes + i] =
            buffers.data(op.buffer_index)[op.buffer_offset + run * op.buffer_stride + i];
      }
    }
  }
  return image;
}

// Where two images differ first; -1: nowhere. Shorter to print than two vectors.
inline int64_t FirstDifference(const std::vector<std::byte>& a, const std::vector<std::byte>& b) {
  if (a.size() != b.size()) return 0;
  const auto at = std::mismatch(a.begin(), a.end(), b.begin());
  return at.first == a.end() ? -1 : at.first - a.begin();
}

inline hf_save_options NoOptions() {
  hf_save_options options = {};
  options.struct_bytes = sizeof(options);
  return options;
}

inline Result<std::unique_ptr<Job>> OpenTestJob(const Settings& settings, SourceReader* reader,
                                                uint64_t seed = 1) {
  return Job::Open(settings, reader, seed, Deadline::After(kPatienceNs));
}

inline Error RegisterAll(Job& job, TestBuffers& buffers,
                         const std::vector<hf_blob_slot>& blobs = {}) {
  return job.Register("{\"holdfast_layout\": 1}", buffers.List(), blobs,
                      Deadline::After(kPatienceNs));
}

}  // namespace holdfast::hook

#endif  // HOLDFAST_HOOK_TEST_JOB_H_
