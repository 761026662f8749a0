// Where the worker leaves every descriptor that must outlive it: the keeper process holds them and
// hands all of them to the next worker. The engine only names them.
#ifndef HOLDFAST_CHECKPOINT_DESCRIPTOR_KEEPER_H_
#define HOLDFAST_CHECKPOINT_DESCRIPTOR_KEEPER_H_

#include <string>

#include "io/unique_fd.h"

namespace holdfast {

// A descriptor that the last worker kept. Names are [a-z0-9./-]{1,64}; see checkpoint/session.h for
// those in use.
struct KeptDescriptor {
  std::string name;
  UniqueFd fd;
};

// Threads: the event loop's.
class DescriptorKeeper {
 public:
  virtual ~DescriptorKeeper() = default;
  // After this returns, a crash of the worker at any later instruction leaves `fd` (a duplicate of
  // it) in the keeper under `name`, which must be unused. The caller keeps its own.
  virtual void Keep(const std::string& name, int fd) = 0;
  // Forgets `name`; unknown names are ignored.
  virtual void Drop(const std::string& name) = 0;
};

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_DESCRIPTOR_KEEPER_H_
