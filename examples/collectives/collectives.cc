#include "examples/collectives/collectives.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "examples/collectives/device.h"
#include "examples/collectives/fabric.h"
#include "examples/collectives/profiler.h"
#include "examples/collectives/proxy.h"
#include "examples/collectives/ring.h"
#include "examples/collectives/status_macros.h"

namespace collectives {
namespace {

constexpr uint32_t kChunkBytesMax = 16u << 20;
constexpr uint32_t kRingsMax = 8;

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

// What an element is called in NCCL's interface. Only its size matters to anybody.
const char* DataTypeOf(size_t element_bytes) {
  switch (element_bytes) {
    case 2:
      return "ncclFloat16";
    case 4:
      return "ncclFloat32";
    case 8:
      return "ncclInt64";
    default:
      return "ncclInt8";
  }
}

// Elements of one rank as NCCL counts them, the same on all ranks.
size_t CountPerRank(size_t count, uint32_t ranks) { return (count + ranks - 1) / ranks; }

// Performs the program that `make` gives for each ring that the data are worth.
template <typename MakeProgram>
Handle SubmitOnRings(Proxy& proxy, OperationKind kind, size_t bytes, CallInfo info,
                     const MakeProgram& make) {
  std::shared_ptr<Operation> operation = proxy.NewOperation(kind);
  const uint32_t ring_count = proxy.RingCountFor(bytes);
  for (uint32_t ring = 0; ring < ring_count; ++ring) {
    const RingPlace place = proxy.PlaceIn(ring, ring_count);
    AppendRingFlows(place, make(place), ring, proxy.chunk_bytes(), operation->flows);
  }
  operation->channel_count = ring_count;
  info.kind = kind;
  info.channels = ring_count;
  return proxy.Submit(std::move(operation), info);
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
  const std::string timed = "hang:";
  uint32_t silence_seconds = 0;
  const bool is_timed = lost_peer.starts_with(timed) &&
                        absl::SimpleAtoi(lost_peer.substr(timed.size()), &silence_seconds) &&
                        silence_seconds > 0;
  if (lost_peer != "fail" && lost_peer != "hang" && !is_timed) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "COLLECTIVES_LOST_PEER='%s': expected fail, hang or hang:SECONDS", lost_peer));
  }
  options.lost_peer = lost_peer == "fail" ? LostPeer::kFail : LostPeer::kHang;
  if (is_timed) options.lost_peer_silence = absl::Seconds(silence_seconds);
  if (std::getenv("COLLECTIVES_RINGS") != nullptr) {
    ASSIGN_OR_RETURN(options.ring_count, NumberFromEnvironment("COLLECTIVES_RINGS", 1, kRingsMax));
  }
  if (std::getenv("COLLECTIVES_CHUNK_BYTES") != nullptr) {
    ASSIGN_OR_RETURN(options.chunk_bytes,
                     NumberFromEnvironment("COLLECTIVES_CHUNK_BYTES", 8, kChunkBytesMax));
  }
  options.profiler_plugin = Environment("NCCL_PROFILER_PLUGIN", "");
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
uint32_t Communicator::size() const { return proxy_->size(); }
uint32_t Communicator::rank() const { return proxy_->rank(); }

Handle Communicator::AllReduce(std::span<int64_t> data) {
  return Reduce(OperationKind::kAllReduce, std::as_writable_bytes(data), sizeof(int64_t));
}
Handle Communicator::AllReduce(std::span<float> data) {
  return Reduce(OperationKind::kAllReduce, std::as_writable_bytes(data), sizeof(float));
}
Handle Communicator::ReduceScatter(std::span<int64_t> data) {
  return Reduce(OperationKind::kReduceScatter, std::as_writable_bytes(data), sizeof(int64_t));
}
Handle Communicator::ReduceScatter(std::span<float> data) {
  return Reduce(OperationKind::kReduceScatter, std::as_writable_bytes(data), sizeof(float));
}

Handle Communicator::Reduce(OperationKind kind, std::span<std::byte> data, size_t element_bytes) {
  const Combine sum = element_bytes == sizeof(int64_t) ? Combine::kSumInt64 : Combine::kSumFloat32;
  const size_t count = data.size() / element_bytes;
  const bool all = kind == OperationKind::kAllReduce;
  return SubmitOnRings(
      *proxy_, kind, data.size(),
      {.count = all ? count : CountPerRank(count, size()), .data_type = DataTypeOf(element_bytes)},
      [&](const RingPlace& place) {
        return all ? AllReduceProgram(place, data, element_bytes, sum)
                   : ReduceScatterProgram(place, data, element_bytes, sum);
      });
}

Handle Communicator::AllGather(std::span<std::byte> data, size_t element_bytes) {
  if (element_bytes == 0 || data.size() % element_bytes != 0) {
    return Refused(name(), absl::StrFormat("all_gather of %d bytes in elements of %d", data.size(),
                                           element_bytes));
  }
  return SubmitOnRings(
      *proxy_, OperationKind::kAllGather, data.size(),
      {.count = CountPerRank(data.size() / element_bytes, size()),
       .data_type = DataTypeOf(element_bytes)},
      [&](const RingPlace& place) { return AllGatherProgram(place, data, element_bytes); });
}

Handle Communicator::Broadcast(std::span<std::byte> data, uint32_t root) {
  if (root >= size()) {
    return Refused(name(), absl::StrFormat("broadcast from rank %d of %d", root, size()));
  }
  return SubmitOnRings(*proxy_, OperationKind::kBroadcast, data.size(),
                       {.count = data.size(), .root = root}, [&](const RingPlace& place) {
                         return BroadcastProgram(place, data, root, proxy_->chunk_bytes());
                       });
}

Handle Communicator::AllToAll(std::span<const std::byte> send, std::span<std::byte> receive) {
  if (send.size() != receive.size() || send.size() % size() != 0) {
    return Refused(name(), absl::StrFormat("all_to_all of %d bytes into %d: expected %d equal "
                                           "blocks in each",
                                           send.size(), receive.size(), size()));
  }
  const size_t block_bytes = send.size() / size();
  const size_t own = rank() * block_bytes;
  if (block_bytes > 0) std::memcpy(receive.data() + own, send.data() + own, block_bytes);
  return proxy_->SubmitAllToAll(send, receive, block_bytes);
}

Handle Communicator::Barrier() {
  std::shared_ptr<Operation> operation = proxy_->NewOperation(OperationKind::kBarrier);
  const RingPlace place = proxy_->PlaceIn(0, 1);
  AppendRingFlows(place, BarrierProgram(place, operation->token()), 0, proxy_->chunk_bytes(),
                  operation->flows);
  operation->channel_count = 1;
  return proxy_->Submit(std::move(operation), {.kind = OperationKind::kBarrier, .count = 1});
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

Context::Context(std::unique_ptr<Fabric> fabric)
    : fabric_(std::move(fabric)), device_(Device::Start()) {}
Context::~Context() = default;

absl::StatusOr<std::unique_ptr<Context>> Context::Create(Options options) {
  if (options.rank >= options.world_size || options.chunk_bytes == 0 ||
      options.chunk_bytes % 8 != 0 || options.chunk_bytes > kChunkBytesMax ||
      options.ring_count == 0 || options.ring_count > kRingsMax) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "rank %d of %d, chunks of %d bytes, %d rings: expected a rank below the world size, chunks "
        "of a multiple of 8 up to %d, and 1 to %d rings",
        options.rank, options.world_size, options.chunk_bytes, options.ring_count, kChunkBytesMax,
        kRingsMax));
  }
  ASSIGN_OR_RETURN(std::unique_ptr<Fabric> fabric, Fabric::Create(std::move(options)));
  return std::unique_ptr<Context>(new Context(std::move(fabric)));
}

// As in NCCL, a plugin that could not be loaded is not tried again.
std::shared_ptr<ProfilerPlugin> Context::Plugin() {
  MutexLock lock(mutex_);
  std::shared_ptr<ProfilerPlugin> plugin = plugin_.lock();
  if (plugin != nullptr || plugin_failed_) return plugin;
  std::string why;
  plugin = ProfilerPlugin::Load(fabric_->options().profiler_plugin, &why);
  plugin_failed_ = plugin == nullptr;
  plugin_ = plugin;
  if (!why.empty()) std::fprintf(stderr, "collectives: no profiler plugin: %s\n", why.c_str());
  return plugin;
}

absl::StatusOr<std::unique_ptr<Communicator>> Context::CreateCommunicator(
    const std::string& name, const std::vector<uint32_t>& ranks,
    std::vector<std::vector<uint32_t>> rings) {
  if (rings.empty() || rings.size() > kRingsMax) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "communicator '%s': expected 1 to %d rings, found %d", name, kRingsMax, rings.size()));
  }
  ASSIGN_OR_RETURN(std::unique_ptr<Proxy> proxy,
                   Proxy::Create(*fabric_, *device_, Plugin(), name, ranks, std::move(rings)));
  return std::make_unique<Communicator>(std::move(proxy));
}

absl::StatusOr<std::unique_ptr<Communicator>> Context::CreateCommunicator(
    const std::string& name, const std::vector<uint32_t>& ranks) {
  std::vector<RingOrder> rings;
  for (uint32_t ring = 0; ring < fabric_->options().ring_count; ++ring) {
    rings.push_back(StridedRing(static_cast<uint32_t>(ranks.size()), ring));
  }
  return CreateCommunicator(name, ranks, std::move(rings));
}

absl::StatusOr<std::unique_ptr<Communicator>> Context::CreateCommunicator(const std::string& name) {
  std::vector<uint32_t> ranks(fabric_->options().world_size);
  std::iota(ranks.begin(), ranks.end(), 0U);
  return CreateCommunicator(name, ranks);
}

}  // namespace collectives
