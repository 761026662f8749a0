// Asks the RAS port of NCCL (by default TCP localhost:28028; NCCL_RAS_ADDR in the job's processes)
// for its report. A text protocol of lines (reference in monitor/witness/ras.h): CLIENT PROTOCOL,
// TIMEOUT, SET FORMAT json (which NCCL before 2.28.7 refuses: then the report is text), VERBOSE
// STATUS; behind the report NCCL closes the connection.
#ifndef HOLDFAST_AGENT_WITNESS_RAS_CLIENT_H_
#define HOLDFAST_AGENT_WITNESS_RAS_CLIENT_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace holdfast {

struct RasAddress {
  std::string host = "127.0.0.1";  // IPv4, or IPv6 without brackets
  uint16_t port = 28028;
};

// "host:port" or "[::1]:port"; kInvalidArgument.
absl::StatusOr<RasAddress> ParseRasAddress(const std::string& text);

// The report, in whatever form. Blocks for `deadline` at most.
// Errors: kNotFound (nobody listens: no NCCL job, or RAS is off), kDeadlineExceeded, kUnavailable
// (the connection broke), kInvalidArgument (somebody else listens there), kResourceExhausted (the
// report is beyond kRasAnswerBytesMax).
absl::StatusOr<std::string> AskRas(const RasAddress& address, absl::Duration deadline);

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_WITNESS_RAS_CLIENT_H_
