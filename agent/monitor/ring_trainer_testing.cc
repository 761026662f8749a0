// A rank of a job that does nothing but all-reduces around a ring of unix sockets, and tells them
// to the hook API as they happen. It ends never by itself; without a neighbour it waits for ever,
// as NCCL does.
//
// Usage: ring_trainer DIRECTORY, with RANK and WORLD_SIZE; the sockets lie in DIRECTORY.
#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "hook/holdfast.hpp"

namespace {

constexpr size_t kStepBytes = 4096;
constexpr int kComputeMs = 10;

[[noreturn]] void WaitForEver() {
  for (;;) pause();
}

int MakeSocket() { return socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0); }

sockaddr_un AddressOf(uint32_t rank) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::snprintf(address.sun_path, sizeof(address.sun_path), "rank-%u", rank);
  return address;
}

int Listen(uint32_t rank) {
  const int listener = MakeSocket();
  const sockaddr_un address = AddressOf(rank);
  unlink(address.sun_path);
  if (bind(listener, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0 ||
      listen(listener, 1) != 0) {
    std::perror("listen");
    std::exit(1);
  }
  return listener;
}

int Connect(uint32_t rank) {
  const sockaddr_un address = AddressOf(rank);
  for (;;) {
    const int connection = MakeSocket();
    if (connect(connection, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0) {
      return connection;
    }
    close(connection);
    poll(nullptr, 0, 5);  // it has not begun to listen
  }
}

void SendAll(int to, const std::vector<char>& bytes) {
  size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t sent = send(to, bytes.data() + done, bytes.size() - done, MSG_NOSIGNAL);
    if (sent <= 0) WaitForEver();
    done += static_cast<size_t>(sent);
  }
}

void ReceiveAll(int from, std::vector<char>& bytes) {
  size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t got = recv(from, bytes.data() + done, bytes.size() - done, 0);
    if (got <= 0) WaitForEver();
    done += static_cast<size_t>(got);
  }
}

void AllReduce(const holdfast::Communicator& group, uint32_t rank, uint32_t ranks, int to,
               int from) {
  const uint32_t steps = 2 * (ranks - 1);
  std::vector<char> bytes(kStepBytes);
  holdfast::Operation operation(group, HF_ALL_REDUCE, kStepBytes * ranks);
  operation.Start();
  holdfast::Transfer sends(group, operation, 0, (rank + 1) % ranks,
                           holdfast::Transfer::Direction::kSend, steps);
  holdfast::Transfer receives(group, operation, 0, (rank + ranks - 1) % ranks,
                              holdfast::Transfer::Direction::kReceive, steps);
  for (uint32_t step = 0; step < steps; ++step) {
    const uint64_t sent = sends.BeginStep(step);
    hf_step_wait(sent, HF_WAIT_SEND_WIRE, kStepBytes);
    SendAll(to, bytes);
    hf_step_end(sent);
    const uint64_t received = receives.BeginStep(step);
    ReceiveAll(from, bytes);
    hf_step_wait(received, HF_WAIT_RECEIVE_LOCAL, kStepBytes);
    hf_step_end(received);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const char* const rank_text = std::getenv("RANK");
  const char* const ranks_text = std::getenv("WORLD_SIZE");
  if (argc != 2 || rank_text == nullptr || ranks_text == nullptr || chdir(argv[1]) != 0) {
    std::fprintf(stderr, "usage: RANK=r WORLD_SIZE=n ring_trainer DIRECTORY\n");
    return 2;
  }
  const auto rank = static_cast<uint32_t>(std::atoi(rank_text));
  const auto ranks = static_cast<uint32_t>(std::atoi(ranks_text));
  const int listener = Listen(rank);
  const int to = Connect((rank + 1) % ranks);
  const int from = accept(listener, nullptr, nullptr);
  const holdfast::Communicator group(0x51, "ring", ranks, rank, ranks);
  group.MovedByThisThread();
  for (;;) {
    hf_section_begin(nullptr, "forward");
    poll(nullptr, 0, kComputeMs);
    hf_section_end(nullptr);
    AllReduce(group, rank, ranks, to, from);
  }
}
