// GoogleTest matchers for absl::Status and absl::StatusOr, which Debian's Abseil does not have:
//   EXPECT_THAT(Open(path), IsOk());
//   EXPECT_THAT(Read(path), IsOkAndHolds(ElementsAre(1, 2)));
//   EXPECT_THAT(Open(path), StatusIs(absl::StatusCode::kNotFound, HasSubstr("rank-00001")));
//   ASSERT_OK_AND_ASSIGN(const std::string text, Read(path));
#ifndef HOLDFAST_TESTS_SUPPORT_STATUS_MATCHERS_H_
#define HOLDFAST_TESTS_SUPPORT_STATUS_MATCHERS_H_

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <ostream>
#include <string>
#include <type_traits>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace holdfast {
namespace matchers_internal {

inline const absl::Status& StatusOf(const absl::Status& status) { return status; }
template <typename T>
const absl::Status& StatusOf(const absl::StatusOr<T>& status_or) {
  return status_or.status();
}

template <typename Inner>
class IsOkAndHoldsMatcher {
 public:
  explicit IsOkAndHoldsMatcher(Inner inner) : inner_(std::move(inner)) {}

  template <typename StatusOrType>
  operator testing::Matcher<StatusOrType>() const {  // NOLINT: matchers convert implicitly
    return testing::Matcher<StatusOrType>(new Impl<StatusOrType>(inner_));
  }

 private:
  template <typename StatusOrType>
  class Impl : public testing::MatcherInterface<StatusOrType> {
   public:
    using Value = typename std::decay_t<StatusOrType>::value_type;
    explicit Impl(const Inner& inner) : inner_(testing::SafeMatcherCast<const Value&>(inner)) {}
    void DescribeTo(std::ostream* os) const override {
      *os << "is OK and holds a value that ";
      inner_.DescribeTo(os);
    }
    void DescribeNegationTo(std::ostream* os) const override {
      *os << "is not OK or holds a value that ";
      inner_.DescribeNegationTo(os);
    }
    bool MatchAndExplain(StatusOrType actual,
                         testing::MatchResultListener* listener) const override {
      if (!actual.ok()) {
        *listener << "which is " << actual.status().ToString();
        return false;
      }
      return inner_.MatchAndExplain(*actual, listener);
    }

   private:
    testing::Matcher<const Value&> inner_;
  };

  Inner inner_;
};

}  // namespace matchers_internal

MATCHER(IsOk, negation ? "is not OK" : "is OK") {
  const absl::Status& status = matchers_internal::StatusOf(arg);
  if (!status.ok()) *result_listener << "which is " << status.ToString();
  return status.ok();
}

MATCHER_P2(StatusIs, code, message_matcher,
           std::string("has the code ") + absl::StatusCodeToString(code) + " and a message that " +
               testing::DescribeMatcher<std::string>(message_matcher, negation)) {
  const absl::Status& status = matchers_internal::StatusOf(arg);
  *result_listener << "which is " << status.ToString();
  return status.code() == code &&
         testing::ExplainMatchResult(message_matcher, std::string(status.message()),
                                     result_listener);
}
inline auto StatusIs(absl::StatusCode code) { return StatusIs(code, testing::_); }
inline auto IsNotFound() { return StatusIs(absl::StatusCode::kNotFound); }

template <typename Inner>
matchers_internal::IsOkAndHoldsMatcher<std::decay_t<Inner>> IsOkAndHolds(Inner&& inner) {
  return matchers_internal::IsOkAndHoldsMatcher<std::decay_t<Inner>>(std::forward<Inner>(inner));
}

}  // namespace holdfast

#define EXPECT_OK(expr) EXPECT_THAT(expr, ::holdfast::IsOk())
#define ASSERT_OK(expr) ASSERT_THAT(expr, ::holdfast::IsOk())

// Moves the value of `expr` into `lhs`, or fails the test and returns from the function.
#define ASSERT_OK_AND_ASSIGN(lhs, expr)                                                         \
  HOLDFAST_ASSERT_OK_AND_ASSIGN_(HOLDFAST_TEST_CONCAT_(holdfast_test_statusor_, __LINE__), lhs, \
                                 expr)
#define HOLDFAST_TEST_CONCAT_INNER_(a, b) a##b
#define HOLDFAST_TEST_CONCAT_(a, b) HOLDFAST_TEST_CONCAT_INNER_(a, b)
#define HOLDFAST_ASSERT_OK_AND_ASSIGN_(statusor, lhs, expr) \
  auto statusor = (expr);                                   \
  ASSERT_TRUE(statusor.ok()) << statusor.status();          \
  lhs = std::move(statusor).value()

#endif  // HOLDFAST_TESTS_SUPPORT_STATUS_MATCHERS_H_
