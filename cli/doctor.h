// What `holdfast doctor` looks at, one function per subject: each says what it found and, where
// something is missing, the one command or setting that would mend it. Looks only; changes nothing.
#ifndef HOLDFAST_CLI_DOCTOR_H_
#define HOLDFAST_CLI_DOCTOR_H_

#include <functional>
#include <map>
#include <string>
#include <vector>

namespace holdfast::cli {

enum class Health {
  kGood,     // as it should be
  kAbsent,   // not there, and nothing is wrong with that (no GPU, no job)
  kLimited,  // works, with less than there could be
  kBad,      // does not work
};

struct Check {
  std::string name;  // of the subject, a word with underscores
  Health health{};
  std::string found;  // what is so
  std::string fix;    // a command or setting; empty: nothing is to be mended
};

// Where the machine is looked at; tests look elsewhere.
struct DoctorOptions {
  std::string socket;  // of the agent
  std::string proc = "/proc";
  std::string sys = "/sys";
  std::string kernel_log = "/dev/kmsg";
  std::string helper;  // path of holdfast-witness
  std::string ras;     // host:port
  // Environment variables; a function, so that tests need none.
  std::function<std::string(const char* name)> variable;
};

// In the order in which they are printed.
std::vector<Check> Examine(const DoctorOptions& options);

const char* Name(Health health);

}  // namespace holdfast::cli

#endif  // HOLDFAST_CLI_DOCTOR_H_
