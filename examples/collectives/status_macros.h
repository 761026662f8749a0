// RETURN_IF_ERROR and ASSIGN_OR_RETURN for absl::Status.
#ifndef HOLDFAST_EXAMPLES_COLLECTIVES_STATUS_MACROS_H_
#define HOLDFAST_EXAMPLES_COLLECTIVES_STATUS_MACROS_H_

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#define COLLECTIVES_CONCAT_INNER_(a, b) a##b
#define COLLECTIVES_CONCAT_(a, b) COLLECTIVES_CONCAT_INNER_(a, b)

// Returns from the enclosing function if `expr` (an absl::Status) is not OK.
#define RETURN_IF_ERROR(expr)                                                                 \
  do {                                                                                        \
    if (absl::Status returned_status = (expr); !returned_status.ok()) return returned_status; \
  } while (false)

// Moves the value of `expr` (an absl::StatusOr) into `lhs`, or returns its error.
#define ASSIGN_OR_RETURN(lhs, expr) \
  COLLECTIVES_ASSIGN_OR_RETURN_(COLLECTIVES_CONCAT_(statusor_, __LINE__), lhs, expr)
#define COLLECTIVES_ASSIGN_OR_RETURN_(statusor, lhs, expr) \
  auto statusor = (expr);                                  \
  if (!statusor.ok()) return std::move(statusor).status(); \
  lhs = std::move(statusor).value()

#endif  // HOLDFAST_EXAMPLES_COLLECTIVES_STATUS_MACROS_H_
