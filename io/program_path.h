// Where programs of ours that start each other are found.
#ifndef HOLDFAST_IO_PROGRAM_PATH_H_
#define HOLDFAST_IO_PROGRAM_PATH_H_

#include <string>

namespace holdfast {

// `name` in the directory of this process's own program (/proc/self/exe, also if that file has been
// replaced since); else the name alone, to be found in PATH.
std::string ProgramBeside(const std::string& name);

}  // namespace holdfast

#endif  // HOLDFAST_IO_PROGRAM_PATH_H_
