// What the trainer gives and what the agent answers: checked once, so that a capture need not.
#include "hook/registration.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "hook/op_pieces.h"
#include "hook/test_agent.h"
#include "hook/test_job.h"

namespace holdfast::hook {
namespace {

TEST(DocumentTest, WrongBuffersAndBlobsAreNamed) {
  char byte = 0;
  const auto refused = [](std::vector<hf_buffer> buffers, std::vector<hf_blob_slot> blobs,
                          const char* named) {
    const auto made = Document::Make("{}", buffers, blobs);
    ASSERT_FALSE(made.ok()) << named;
    EXPECT_EQ(made.error().code(), HF_INVALID_ARGUMENT);
    EXPECT_NE(std::string(made.error().text()).find(named), std::string::npos)
        << made.error().text();
  };
  refused({{nullptr, &byte, 1, 0}}, {}, "buffer 0");
  refused({{"", &byte, 1, 0}}, {}, "buffer 0");
  refused({{"a", &byte, 1, 0}, {"b", &byte, 1, 64}}, {}, "'b'");
  refused({{"a", nullptr, 1, 0}}, {}, "'a'");
  refused({}, {{nullptr, HF_BLOB_RANK, 1}}, "blob 0");
  refused({}, {{"x", static_cast<hf_blob_scope>(2), 1}}, "'x'");
  refused({}, {{"x", HF_BLOB_RANK, 1}, {"y", HF_BLOB_RANK, 1}, {"x", HF_BLOB_GLOBAL, 1}}, "'x'");
  EXPECT_FALSE(Document::Make(nullptr, {}, {}).ok());
  EXPECT_TRUE(Document::Make("", {}, {}).ok());
  // A long name is cut in the text, between characters.
  std::string name;
  while (name.size() < 4096) name += "\xc3\xa4";
  const auto long_name =
      Document::Make("{}", std::vector<hf_buffer>{{name.c_str(), nullptr, 1, 0}}, {});
  const std::string text = long_name.error().text();
  EXPECT_NE(text.find("...'"), std::string::npos) << text;
  EXPECT_NE(text.find("data is NULL"), std::string::npos) << text;
  EXPECT_EQ((text.find("...'") - text.find("\xc3")) % 2, 0u);
}

TEST(DocumentTest, BlobsAreFoundByName) {
  std::vector<std::string> names;
  for (int i = 0; i < 50; ++i) names.push_back("blob" + std::to_string((i * 37) % 50));
  std::vector<hf_blob_slot> slots;
  for (const std::string& name : names) slots.push_back({name.c_str(), HF_BLOB_RANK, 1});
  const auto made = Document::Make("{}", {}, slots);
  ASSERT_TRUE(made.ok());
  for (size_t i = 0; i < names.size(); ++i) {
    EXPECT_EQ(made.value()->FindBlob(names[i]), static_cast<int64_t>(i));
  }
  for (const char* absent : {"", "blob", "blob5x", "zzz"}) {
    EXPECT_EQ(made.value()->FindBlob(absent), -1);
  }
}

TEST(RunsFitTest, AgreesWithWideArithmeticAtTheEdges) {
  const uint64_t max = std::numeric_limits<uint64_t>::max();
  const std::vector<uint64_t> values = {0, 1,        2,       3,           7,       8,
                                        9, 1u << 31, max / 2, max / 2 + 1, max - 1, max};
  for (const uint64_t offset : values) {
    for (const uint64_t run : values) {
      for (const uint64_t count : values) {
        for (const uint64_t stride : values) {
          for (const uint64_t bytes : values) {
            bool fits = true;
            if (run > 0 && count > 0) {
              const long double end = static_cast<long double>(offset) +
                                      static_cast<long double>(count - 1) * stride + run;
              const long double total = static_cast<long double>(run) * count;
              // long double has 64 bits of mantissa: exact where it matters, below 2^64.
              fits = end <= static_cast<long double>(bytes) && total <= 18446744073709551615.0L;
            }
            ASSERT_EQ(RunsFit(offset, run, count, stride, bytes), fits)
                << offset << " " << run << " " << count << " " << stride << " " << bytes;
          }
        }
      }
    }
  }
}

// An agent's answer for one buffer and one blob, good until changed.
struct Answer {
  abi::RegisterReply reply = {};
  std::shared_ptr<TestMemory> memory = TestMemory::Make(4 * 4096);
  std::shared_ptr<TestMemory> shared = TestMemory::Make(8192);
  std::shared_ptr<TestMemory> plan = TestMemory::Make(
      sizeof(abi::CapturePlan) + 2 * sizeof(abi::CaptureOp) + sizeof(abi::BlobArea));
  abi::RegistrationMemory& registration() {
    return *reinterpret_cast<abi::RegistrationMemory*>(shared->data());
  }
  abi::CapturePlan& header() { return *reinterpret_cast<abi::CapturePlan*>(plan->data()); }
  abi::CaptureOp& op(int i) {
    return reinterpret_cast<abi::CaptureOp*>(plan->data() + sizeof(abi::CapturePlan))[i];
  }
  abi::BlobArea& blob() {
    return *reinterpret_cast<abi::BlobArea*>(plan->data() + sizeof(abi::CapturePlan) +
                                             2 * sizeof(abi::CaptureOp));
  }

  Answer() {
    reply.registration_id = 5;
    reply.memory_bytes = memory->bytes();
    reply.registration_memory_bytes = shared->bytes();
    reply.capture_plan_bytes = plan->bytes();
    reply.image_bytes = 2 * 4096;
    reply.block_bytes = 4096;
    abi::RegistrationMemory& memory_header = registration();
    memory_header.magic = abi::kRegistrationMemoryMagic;
    memory_header.version = abi::kProtocolVersion;
    memory_header.registration_id = 5;
    memory_header.slot_count = 2;
    memory_header.block_count = 2;
    memory_header.blob_count = 1;
    memory_header.block_bytes = 4096;
    memory_header.block_table_offset = 7040;
    memory_header.block_done_offset = 7104;
    memory_header.blob_bytes_offset = 7168;
    static_assert(sizeof(abi::RegistrationMemory) <= 7040);
    header() = {abi::kProtocolMagic, abi::kProtocolVersion, 2, 1, 2 * 4096, 2 * 4096};
    op(0) = {100, 0, 50, 10, 60, 0, 0};
    op(1) = {5000, 600, 400, 1, 0, 0, 63};
    blob() = {6000, 16};
  }

  Result<std::shared_ptr<Registration>> Make() {
    static char buffer[1000];
    const std::vector<hf_buffer> buffers = {{"b", buffer, sizeof(buffer), 0}};
    const std::vector<hf_blob_slot> blobs = {{"rng", HF_BLOB_RANK, 16}};
    UniqueFd fds[3] = {UniqueFd(dup(memory->fd())), UniqueFd(dup(shared->fd())),
                       UniqueFd(dup(plan->fd()))};
    return Registration::Make(Document::Make("{}", buffers, blobs).value(), reply, fds);
  }
};

TEST(RegistrationTest, ASlotMayBeLongerThanItsImage) {
  Answer answer;
  answer.reply.image_bytes = answer.header().image_bytes = 4096;
  answer.blob() = {4000, 16};
  const auto made = answer.Make();
  ASSERT_TRUE(made.ok()) << made.error().text();
  EXPECT_EQ(made.value()->image_bytes(), 4096u);
  EXPECT_EQ(made.value()->block_count(), 2u);
  EXPECT_EQ(made.value()->copied_blocks().size(), 2u);
  // A blob is stored, so it is in the image.
  answer.blob() = {4090, 16};
  EXPECT_FALSE(answer.Make().ok());
}

TEST(RegistrationTest, AnAnswerThatContradictsItselfIsRefused) {
  ASSERT_TRUE(Answer().Make().ok()) << Answer().Make().error().text();
  using Change = std::function<void(Answer&)>;
  const std::vector<Change> changes = {
      [](Answer& a) { a.reply.memory_bytes += 1; },
      [](Answer& a) { a.reply.registration_memory_bytes += 1; },
      [](Answer& a) { a.reply.registration_memory_bytes = 100; },
      [](Answer& a) { a.reply.capture_plan_bytes += 1; },
      [](Answer& a) { a.reply.capture_plan_bytes = 0; },
      [](Answer& a) { a.reply.capture_plan_bytes -= 1; },
      [](Answer& a) { a.reply.registration_id = 6; },
      [](Answer& a) { a.reply.image_bytes = 4096; },
      [](Answer& a) { a.reply.block_bytes = 0; },
      [](Answer& a) { a.reply.block_bytes = 8192; },
      [](Answer& a) { a.registration().magic ^= 1; },
      [](Answer& a) { a.registration().version = abi::kProtocolVersion + 1; },
      [](Answer& a) { a.registration().registration_id = 6; },
      [](Answer& a) { a.registration().slot_count = 0; },
      [](Answer& a) { a.registration().slot_count = abi::kSlotsMax + 1; },
      [](Answer& a) { a.registration().block_count = 3; },
      [](Answer& a) { a.registration().block_count = UINT32_MAX; },
      [](Answer& a) { a.registration().blob_count = 0; },
      [](Answer& a) { a.registration().block_bytes = 1; },
      [](Answer& a) { a.registration().block_table_offset = 8192 - 8; },
      [](Answer& a) { a.registration().block_table_offset = 7041; },
      [](Answer& a) { a.registration().block_table_offset = UINT64_MAX - 7; },
      [](Answer& a) { a.registration().block_done_offset = 8192; },
      [](Answer& a) { a.registration().blob_bytes_offset = 8192 - 8; },
      [](Answer& a) { a.header().magic ^= 1; },
      [](Answer& a) { a.header().version = 0; },
      [](Answer& a) { a.header().op_count = 3; },
      [](Answer& a) { a.header().op_count = UINT64_MAX; },
      [](Answer& a) { a.header().blob_count = 0; },
      [](Answer& a) { a.header().image_bytes = 4096; },
      [](Answer& a) { a.header().slot_bytes = 3 * 4096; },
      // An image that is longer than its slot.
      [](Answer& a) { a.header().image_bytes = a.reply.image_bytes = 3 * 4096; },
      [](Answer& a) { a.header().image_bytes = a.reply.image_bytes = 4097; },
      [](Answer& a) { a.op(0).buffer_index = 1; },
      [](Answer& a) { a.op(0).group = 64; },
      [](Answer& a) { a.op(0).buffer_offset = 411; },
      [](Answer& a) { a.op(0).buffer_offset = UINT64_MAX; },
      [](Answer& a) { a.op(0).run_bytes = 461; },
      [](Answer& a) { a.op(0).count = 18; },
      [](Answer& a) { a.op(0).count = UINT64_MAX / 25; },
      [](Answer& a) { a.op(0).buffer_stride = 1000; },
      [](Answer& a) { a.op(0).image_offset = 4501; },  // into the next one
      [](Answer& a) { a.op(0).image_offset = UINT64_MAX; },
      [](Answer& a) { a.op(1).image_offset = 8192 - 399; },
      [](Answer& a) { std::swap(a.op(0), a.op(1)); },
      [](Answer& a) { a.blob().image_offset = 8192 - 15; },
      [](Answer& a) { a.blob().image_offset = UINT64_MAX; },
      [](Answer& a) { a.blob().capacity_bytes = UINT64_MAX; },
  };
  for (size_t i = 0; i < changes.size(); ++i) {
    Answer answer;
    changes[i](answer);
    const auto made = answer.Make();
    EXPECT_FALSE(made.ok()) << "change " << i;
    EXPECT_EQ(made.error().code(), HF_INTERNAL) << "change " << i << made.error().text();
  }
}

TEST(RegistrationTest, LookupsOfRandomPlansEqualBruteForce) {
  const uint32_t seed = std::random_device()();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  HostSourceReader reader;
  TestAgent agent;
  for (int round = 0; round < 30; ++round) {
    TestBuffers buffers = RandomBuffers(random, random() % 20, 5000);
    const TestPlan plan = RandomPlan(random, buffers, uint64_t{64} << random() % 8);
    agent.SetPlan([plan](const TestDocument&) { return plan; });
    LinkOptions options;
    options.socket_path = agent.socket_path();
    options.open = {};
    const UniqueFd doorbell = std::move(MakeEventFd().value());
    options.doorbell_fd = doorbell.get();
    options.connect_first = [&](Deadline deadline) {
      return ConnectToAgent(agent.socket_path(), deadline);
    };
    auto link = Link::Open(std::move(options), Deadline::After(kPatienceNs));
    ASSERT_TRUE(link.ok()) << link.error().text();
    const std::vector<hf_buffer> list = buffers.List();
    ASSERT_TRUE(link.value()
                    ->Register(Document::Make("{}", list, {}).value(), Deadline::After(kPatienceNs))
                    .ok());
    const auto registration = link.value()->registration().value();
    // Byte by byte: which groups has a block, which is its first operation?
    std::vector<uint64_t> groups(plan.block_count, 0);
    std::vector<uint32_t> first(plan.block_count, UINT32_MAX);
    for (uint32_t i = 0; i < plan.ops.size(); ++i) {
      for (uint64_t byte = 0; byte < OpBytes(plan.ops[i]); ++byte) {
        const uint64_t block = (plan.ops[i].image_offset + byte) / plan.block_bytes;
        groups[block] |= uint64_t{1} << plan.ops[i].group;
        first[block] = std::min(first[block], i);
      }
    }
    std::vector<uint32_t> copied;
    std::vector<uint32_t> others;
    for (uint32_t group = 0; group < kGroupCount; ++group) {
      uint32_t blocks = 0;
      for (uint32_t block = 0; block < plan.block_count; ++block) {
        blocks += groups[block] >> group & 1;
        const bool lowest = (groups[block] & ((uint64_t{2} << group) - 1)) == uint64_t{1} << group;
        if (lowest) copied.push_back(block);
      }
      EXPECT_EQ(registration->blocks_of_group(group), blocks);
    }
    for (uint32_t block = 0; block < plan.block_count; ++block) {
      EXPECT_EQ(registration->groups_of_block(block), groups[block]);
      if (groups[block] == 0) others.push_back(block);
      if (groups[block] != 0) {
        EXPECT_EQ(registration->first_op(block), first[block]);
      }
    }
    EXPECT_TRUE(std::equal(copied.begin(), copied.end(), registration->copied_blocks().begin(),
                           registration->copied_blocks().end()));
    EXPECT_TRUE(std::equal(others.begin(), others.end(), registration->other_blocks().begin(),
                           registration->other_blocks().end()));
  }
}

TEST(OpPiecesTest, PiecesOfEveryRangeAreItsBytesInOrder) {
  const abi::CaptureOp op = {0, 1000, 5, 4, 9, 0, 0};
  std::vector<uint64_t> source;  // of each byte
  for (uint64_t run = 0; run < op.count; ++run) {
    for (uint64_t i = 0; i < op.run_bytes; ++i) source.push_back(1000 + run * 9 + i);
  }
  for (uint64_t begin = 0; begin <= source.size(); ++begin) {
    for (uint64_t end = begin; end <= source.size(); ++end) {
      for (const uint64_t piece_max : {1u, 2u, 4u, 5u, 6u, 10u, 11u, 100u}) {
        uint64_t at = begin;
        EXPECT_TRUE(ForEachPiece(op, begin, end, piece_max, [&](const Piece& piece) {
          EXPECT_LE(piece.run_bytes * piece.count, std::max<uint64_t>(piece_max, 0));
          EXPECT_EQ(piece.image_skip, at);
          for (uint64_t run = 0; run < piece.count; ++run) {
            for (uint64_t i = 0; i < piece.run_bytes; ++i) {
              EXPECT_EQ(piece.buffer_offset + run * piece.stride + i, source[at]);
              ++at;
            }
          }
          return true;
        }));
        EXPECT_EQ(at, end);
      }
    }
  }
  int calls = 0;
  EXPECT_FALSE(ForEachPiece(op, 0, 20, 5, [&](const Piece&) { return ++calls < 2; }));
  EXPECT_EQ(calls, 2);
}

}  // namespace
}  // namespace holdfast::hook
