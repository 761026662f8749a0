#include "examples/collectives/collectives.h"

#include <cstdlib>
#include <numeric>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "examples/collectives/fabric.h"
#include "examples/collectives/proxy.h"
#include "examples/collectives/ring.h"
#include "examples/collectives/status_macros.h"

namespace collectives {
namespace {

constexpr size_t kChunkBytesMax = size_t{16} << 20;

std::string Environment(const char* name, const std::string& otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : value;
}

absl::StatusOr<uint32_t> NumberFromEnvironment(const char* name, uint32_t min, uint32_t max) {
  const std::string text = Environment(name, "");
  uint32_t value = 0;
  if (!absl::SimpleAtoi(text, &value) || value < min || value > max) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "%s='%s': expected a number from %d to %d (torchrun and examples/launch set it)", name,
        text, min, max));
  }
  return value;
}

Handle Refused(const std::string& name, const std::string& text) {
  auto operation = std::make_shared<Operation>();
  operation->Finish(
      absl::InvalidArgumentError(absl::StrFormat("communicator '%s': %s", name, text)));
  return Handle(std::move(operation));
}

}  // namespace

absl::StatusOr<Options> Options::FromEnvironment() {
  Options options;
  ASSIGN_OR_RETURN(options.world_size, NumberFromEnvironment("WORLD_SIZE", 1, 65536));
  ASSIGN_OR_RETURN(options.rank, NumberFromEnvironment("RANK", 0, options.world_size - 1));
  options.master_address = Environment("MASTER_ADDR", options.master_address);
  ASSIGN_OR_RETURN(const uint32_t port, NumberFromEnvironment("MASTER_PORT", 1, 65535));
  options.master_port = static_cast<uint16_t>(port);
  options.bind_address = Environment("COLLECTIVES_BIND_ADDR", options.bind_address);
  options.token = absl::StrCat(Environment("TORCHELASTIC_RUN_ID", ""), "/",
                               Environment("TORCHELASTIC_RESTART_COUNT", ""));
  const std::string lost_peer = Environment("COLLECTIVES_LOST_PEER", "fail");
  if (lost_peer != "fail" && lost_peer != "hang") {
    return absl::InvalidArgumentError(
        absl::StrFormat("COLLECTIVES_LOST_PEER='%s': expected fail or hang", lost_peer));
  }
  options.lost_peer = lost_peer == "hang" ? LostPeer::kHang : LostPeer::kFail;
  if (std::getenv("COLLECTIVES_TIMEOUT_SECONDS") != nullptr) {
    ASSIGN_OR_RETURN(const uint32_t seconds,
                     NumberFromEnvironment("COLLECTIVES_TIMEOUT_SECONDS", 1, 1'000'000));
    options.operation_timeout = options.rendezvous_timeout = absl::Seconds(seconds);
  }
  return options;
}

bool Handle::Done() const { return operation_->Done(); }
absl::Status Handle::Wait() const { return operation_->Wait(); }

Communicator::Communicator(std::unique_ptr<Proxy> proxy) : proxy_(std::move(proxy)) {}
Communicator::~Communicator() = default;

const std::string& Communicator::name() const { return proxy_->name(); }
uint32_t Communicator::size() const { return static_cast<uint32_t>(proxy_->place().size); }
uint32_t Communicator::rank() const { return static_cast<uint32_t>(proxy_->place().rank); }

Handle Communicator::AllReduce(std::span<int64_t> data) {
  return proxy_->SubmitCollective(std::make_shared<Operation>(), OperationKind::kAllReduce,
                                  AllReduceProgram(proxy_->place(), std::as_writable_bytes(data),
                                                   sizeof(int64_t), Combine::kSumInt64));
}

Handle Communicator::AllReduce(std::span<float> data) {
  return proxy_->SubmitCollective(std::make_shared<Operation>(), OperationKind::kAllReduce,
                                  AllReduceProgram(proxy_->place(), std::as_writable_bytes(data),
                                                   sizeof(float), Combine::kSumFloat32));
}

Handle Communicator::ReduceScatter(std::span<int64_t> data) {
  return proxy_->SubmitCollective(
      std::make_shared<Operation>(), OperationKind::kReduceScatter,
      ReduceScatterProgram(proxy_->place(), std::as_writable_bytes(data), sizeof(int64_t),
                           Combine::kSumInt64));
}

Handle Communicator::ReduceScatter(std::span<float> data) {
  return proxy_->SubmitCollective(
      std::make_shared<Operation>(), OperationKind::kReduceScatter,
      ReduceScatterProgram(proxy_->place(), std::as_writable_bytes(data), sizeof(float),
                           Combine::kSumFloat32));
}

Handle Communicator::AllGather(std::span<std::byte> data, size_t element_bytes) {
  if (element_bytes == 0 || data.size() % element_bytes != 0) {
    return Refused(name(), absl::StrFormat("all_gather of %d bytes in elements of %d", data.size(),
                                           element_bytes));
  }
  return proxy_->SubmitCollective(std::make_shared<Operation>(), OperationKind::kAllGather,
                                  AllGatherProgram(proxy_->place(), data, element_bytes));
}

Handle Communicator::Broadcast(std::span<std::byte> data, uint32_t root) {
  if (root >= size()) {
    return Refused(name(), absl::StrFormat("broadcast from rank %d of %d", root, size()));
  }
  return proxy_->SubmitCollective(
      std::make_shared<Operation>(), OperationKind::kBroadcast,
      BroadcastProgram(proxy_->place(), data, root, proxy_->chunk_bytes()));
}

Handle Communicator::Barrier() {
  auto operation = std::make_shared<Operation>();
  RingProgram program = BarrierProgram(proxy_->place(), operation->token());
  return proxy_->SubmitCollective(std::move(operation), OperationKind::kBarrier,
                                  std::move(program));
}

Handle Communicator::Send(std::span<const std::byte> data, uint32_t to) {
  if (to >= size() || to == rank()) {
    return Refused(name(),
                   absl::StrFormat("send from rank %d to rank %d of %d", rank(), to, size()));
  }
  return proxy_->SubmitSend(to, data);
}

Handle Communicator::Receive(std::span<std::byte> data, uint32_t from) {
  if (from >= size() || from == rank()) {
    return Refused(name(),
                   absl::StrFormat("receive at rank %d from rank %d of %d", rank(), from, size()));
  }
  return proxy_->SubmitReceive(from, data);
}

Context::Context(std::unique_ptr<Fabric> fabric) : fabric_(std::move(fabric)) {}
Context::~Context() = default;

absl::StatusOr<std::unique_ptr<Context>> Context::Create(Options options) {
  if (options.rank >= options.world_size || options.chunk_bytes == 0 ||
      options.chunk_bytes % 8 != 0 || options.chunk_bytes > kChunkBytesMax) {
    return absl::InvalidArgumentError(
        absl::StrFormat("rank %d of %d, chunks of %d bytes: expected a rank below the world size "
                        "and chunks of a multiple of 8 up to %d",
                        options.rank, options.world_size, options.chunk_bytes, kChunkBytesMax));
  }
  ASSIGN_OR_RETURN(std::unique_ptr<Fabric> fabric, Fabric::Create(std::move(options)));
  return std::unique_ptr<Context>(new Context(std::move(fabric)));
}

absl::StatusOr<std::unique_ptr<Communicator>> Context::CreateCommunicator(
    const std::string& name, const std::vector<uint32_t>& ranks) {
  ASSIGN_OR_RETURN(std::unique_ptr<Proxy> proxy, Proxy::Create(*fabric_, name, ranks));
  return std::make_unique<Communicator>(std::move(proxy));
}

absl::StatusOr<std::unique_ptr<Communicator>> Context::CreateCommunicator(const std::string& name) {
  std::vector<uint32_t> ranks(fabric_->options().world_size);
  std::iota(ranks.begin(), ranks.end(), 0U);
  return CreateCommunicator(name, ranks);
}

}  // namespace collectives
