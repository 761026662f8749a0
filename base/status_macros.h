// RETURN_IF_ERROR and ASSIGN_OR_RETURN, in the form every Abseil code base has them.
#ifndef HOLDFAST_BASE_STATUS_MACROS_H_
#define HOLDFAST_BASE_STATUS_MACROS_H_

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#define HOLDFAST_CONCAT_INNER_(a, b) a##b
#define HOLDFAST_CONCAT_(a, b) HOLDFAST_CONCAT_INNER_(a, b)

// Returns from the enclosing function if `expr` (an absl::Status) is not OK.
#define RETURN_IF_ERROR(expr)                                           \
  do {                                                                  \
    if (absl::Status holdfast_status = (expr); !holdfast_status.ok()) { \
      return holdfast_status;                                           \
    }                                                                   \
  } while (false)

// Moves the value of `expr` (an absl::StatusOr) into `lhs`, or returns its error.
#define ASSIGN_OR_RETURN(lhs, expr) \
  HOLDFAST_ASSIGN_OR_RETURN_(HOLDFAST_CONCAT_(holdfast_statusor_, __LINE__), lhs, expr)
#define HOLDFAST_ASSIGN_OR_RETURN_(statusor, lhs, expr)    \
  auto statusor = (expr);                                  \
  if (!statusor.ok()) return std::move(statusor).status(); \
  lhs = std::move(statusor).value()

#endif  // HOLDFAST_BASE_STATUS_MACROS_H_
