// A directory of its own for a test, removed with all its contents at the end.
#ifndef HOLDFAST_TESTS_SUPPORT_TEMPORARY_DIRECTORY_H_
#define HOLDFAST_TESTS_SUPPORT_TEMPORARY_DIRECTORY_H_

#include <string>

namespace holdfast {

class TemporaryDirectory {
 public:
  // In `parent`, which exists. The default is the working directory: under ctest the build folder,
  // so a real disk and not a tmpfs.
  explicit TemporaryDirectory(const std::string& parent = ".");
  ~TemporaryDirectory();
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;

  const std::string& path() const { return path_; }  // absolute
  std::string Join(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

}  // namespace holdfast

#endif  // HOLDFAST_TESTS_SUPPORT_TEMPORARY_DIRECTORY_H_
