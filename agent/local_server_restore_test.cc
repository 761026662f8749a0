// Restores over the socket: what reaches the engine, and what comes back in which order.
#include <fcntl.h>

#include <string>
#include <vector>

#include "agent/local_server_testing.h"
#include "gmock/gmock.h"

namespace holdfast {
namespace {

using ::testing::HasSubstr;

TEST_F(LocalServerTest, RestoreSendsMapsThenTheReplyThenTheEnd) {
  const UniqueFd socket = OpenSession();
  Request(socket, abi::MessageType::kRestore, abi::RestoreRequest{7, 0});
  for (uint32_t map = 1; map <= 2; ++map) {
    const auto body = HearReply<abi::ImageMap>(socket, abi::MessageType::kImageMap, 1);
    EXPECT_EQ(body.map_id, map);
    EXPECT_EQ(*ReadAll(last_fds_[0].get(), 100), absl::StrCat("map ", map));
  }
  const auto reply = HearReply<abi::RestoreReply>(socket, abi::MessageType::kRestoreReply, 2);
  EXPECT_EQ(reply.step, 100u);
  EXPECT_EQ(reply.attempt, 3u);
  EXPECT_EQ(reply.tensor_states, 5u);
  EXPECT_EQ(reply.tensor_states_left_out, 6u);
  EXPECT_EQ(reply.restore_from, 2u);
  engine_->restore_ended(RestoreEnded{10, 4});
  const auto done = HearReply<abi::RestoreDone>(socket, abi::MessageType::kRestoreDone, 0);
  EXPECT_EQ(done.bytes, 10u);
  EXPECT_EQ(done.bytes_from_memory, 4u);
}

// The bytes of a selection of these tensors' names.
std::string SelectionOf(const std::vector<std::string>& patterns) {
  const abi::RestoreSelection header = {abi::kProtocolMagic, abi::kProtocolVersion,
                                        patterns.size()};
  std::string bytes(reinterpret_cast<const char*>(&header), sizeof(header));
  std::string texts;
  for (const std::string& pattern : patterns) {
    const abi::SelectionPattern entry = {
        sizeof(header) + patterns.size() * sizeof(entry) + texts.size(),
        static_cast<uint32_t>(pattern.size()), abi::SelectionPattern::kTensors};
    bytes.append(reinterpret_cast<const char*>(&entry), sizeof(entry));
    texts += pattern;
  }
  return bytes + texts;
}

TEST_F(LocalServerTest, ASelectionReachesTheEngineOrIsRefused) {
  const UniqueFd socket = OpenSession();
  engine_->map_count = 0;
  const std::string selection = SelectionOf({"layers.*", "wte"});
  const auto ask = [&](uint64_t bytes, std::vector<UniqueFd> fds) {
    Request(socket, abi::MessageType::kRestore, abi::RestoreRequest{7, bytes}, std::move(fds));
  };
  ask(selection.size(), Fds(*SealedMemfd("selection", selection)));
  EXPECT_EQ(HearReply<abi::RestoreReply>(socket, abi::MessageType::kRestoreReply, 2).status.code,
            0);
  ask(0, {});
  EXPECT_EQ(HearReply<abi::RestoreReply>(socket, abi::MessageType::kRestoreReply, 2).status.code,
            0);
  ASSERT_EQ(engine_->selections.size(), 2u);
  EXPECT_EQ(engine_->selections[0].tensors, (std::vector<std::string>{"layers.*", "wte"}));
  EXPECT_TRUE(engine_->selections[0].states.empty());
  EXPECT_TRUE(engine_->selections[1].is_everything());

  const auto refused = [&] {
    const auto reply = HearReply<abi::RestoreReply>(socket, abi::MessageType::kRestoreReply, 0);
    EXPECT_EQ(reply.status.code, static_cast<int>(absl::StatusCode::kInvalidArgument));
    return std::string(reply.status.text);
  };
  ask(selection.size(), {});
  EXPECT_THAT(refused(), HasSubstr("found 0 descriptors"));
  ask(0, Fds(*SealedMemfd("selection", selection)));
  EXPECT_THAT(refused(), HasSubstr("found 1 descriptors"));
  ask(selection.size() - 1, Fds(*SealedMemfd("selection", selection)));
  EXPECT_THAT(refused(), HasSubstr("restore selection"));
  ask(selection.size(), Fds(UniqueFd(open("/dev/null", O_RDONLY))));
  EXPECT_THAT(refused(), HasSubstr("restore selection"));
  ask(3, Fds(*SealedMemfd("selection", "abc")));
  EXPECT_THAT(refused(), HasSubstr("restore selection"));
  EXPECT_EQ(engine_->selections.size(), 2u);
}

TEST_F(LocalServerTest, ARestoreIsCancelledBehindItsReplyWithoutAnAnswer) {
  const UniqueFd socket = OpenSession();
  engine_->immediate = false;
  Request(socket, abi::MessageType::kRestore, abi::RestoreRequest{7, 0});
  ASSERT_EQ(SendPacket(socket.get(), Packet{abi::MessageType::kRestoreCancel, 0, {}, {}}),
            Sent::kYes);
  Pump();
  EXPECT_TRUE(engine_->cancelled.empty());  // it is for what the engine has begun
  ASSERT_EQ(engine_->answers.size(), 1u);
  engine_->map_count = 0;
  engine_->answers[0]();
  HearReply<abi::RestoreReply>(socket, abi::MessageType::kRestoreReply, 2);
  EXPECT_TRUE(PumpUntil([&] { return engine_->cancelled.contains(SessionId{1}); }));
  // The connection is still good.
  engine_->immediate = true;
  Request(socket, abi::MessageType::kRestore, abi::RestoreRequest{7, 0});
  HearReply<abi::RestoreReply>(socket, abi::MessageType::kRestoreReply, 2);
}

}  // namespace
}  // namespace holdfast
