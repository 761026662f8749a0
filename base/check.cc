#include "base/check.h"

#include <cstdio>
#include <cstdlib>

namespace holdfast {

void CheckFailed(const char* file, int line, const char* expression, const char* detail) {
  std::fprintf(stderr, "%s:%d: CHECK(%s) failed %s\n", file, line, expression, detail);
  std::abort();
}

}  // namespace holdfast
