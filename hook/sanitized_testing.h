// HOLDFAST_TEST_SANITIZED is defined in a build whose sanitizer replaces malloc and makes system
// calls of its own.
#ifndef HOLDFAST_HOOK_SANITIZED_TESTING_H_
#define HOLDFAST_HOOK_SANITIZED_TESTING_H_

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define HOLDFAST_TEST_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define HOLDFAST_TEST_SANITIZED 1
#endif
#endif

#endif  // HOLDFAST_HOOK_SANITIZED_TESTING_H_
