// CHECK: for our own bugs, never for the world's errors. Always compiled, in every build mode: it
// prints file, line and expression to standard error and aborts. Not for code under hook/, which
// runs inside somebody's training process and must never abort.
#ifndef HOLDFAST_BASE_CHECK_H_
#define HOLDFAST_BASE_CHECK_H_

namespace holdfast {
// Prints and aborts. `detail` may be empty, never null.
[[noreturn]] void CheckFailed(const char* file, int line, const char* expression,
                              const char* detail);
}  // namespace holdfast

#define CHECK(expr)                               \
  (static_cast<bool>(expr) ? static_cast<void>(0) \
                           : ::holdfast::CheckFailed(__FILE__, __LINE__, #expr, ""))

// For an absl::Status that can only fail through a bug of ours.
#define CHECK_OK(expr)                                                             \
  do {                                                                             \
    if (const auto& holdfast_check_status = (expr); !holdfast_check_status.ok()) { \
      ::holdfast::CheckFailed(__FILE__, __LINE__, #expr,                           \
                              holdfast_check_status.ToString().c_str());           \
    }                                                                              \
  } while (false)

#endif  // HOLDFAST_BASE_CHECK_H_
