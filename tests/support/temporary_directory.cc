#include "tests/support/temporary_directory.h"

#include <stdlib.h>

#include <filesystem>
#include <system_error>

#include "base/check.h"

namespace holdfast {

TemporaryDirectory::TemporaryDirectory(const std::string& parent)
    : path_(std::filesystem::absolute(parent).lexically_normal() / "test.XXXXXX") {
  CHECK(mkdtemp(path_.data()) != nullptr);
}

TemporaryDirectory::~TemporaryDirectory() {
  std::error_code ignored;  // what a test left unremovable stays in the build folder
  std::filesystem::remove_all(path_, ignored);
}

}  // namespace holdfast
