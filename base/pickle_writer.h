// Writes a Python pickle of protocol 2, value by value: what torch's weights-only loader reads, and
// every other unpickler since Python 2.3. The same calls make the same bytes: nothing here depends
// on addresses, hashes or time.
//
// The caller drives the stack of the pickle machine in post-order: values first, then what is made
// of them. `[1, "a"]` is EmptyList, Mark, Int(1), String("a"), Appends; the call `f(x)` is
// Global("module", "f"), x, Tuple(1), Reduce. Strings and globals are written once and recalled
// from the memo afterwards, so that a million equal module names cost two bytes each. What is read
// back is for base/pickle_reader.h.
#ifndef HOLDFAST_BASE_PICKLE_WRITER_H_
#define HOLDFAST_BASE_PICKLE_WRITER_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace holdfast {

// CHECKs that there is on the stack what a call takes from it.
//
// Threads: one at a time. Lifetime: owns everything.
class PickleWriter {
 public:
  PickleWriter();

  void None();
  void Bool(bool value);
  void Int(int64_t value);
  // Of any size: two's complement, little-endian. CHECKs size < 2^31.
  void BigInteger(std::string_view bytes);
  void Float(double value);
  // Python text, UTF-8 (lone surrogates as their three bytes). CHECKs size < 2^32.
  void String(std::string_view text);
  // Python bytes: at this protocol, a call of _codecs.encode, as Python itself writes them.
  void Bytes(std::string_view bytes);
  // The symbol `module.name`. CHECKs that neither has a line break.
  void Global(std::string_view module, std::string_view name);

  void Mark();
  void Tuple();             // of the values since the last mark
  void Tuple(size_t size);  // of the `size` topmost values; CHECKs size <= 3
  void EmptyList();
  void Appends();  // the values since the last mark to the list before it
  void EmptyDict();
  void SetItems();      // keys and values since the last mark into the dict before it
  void Reduce();        // callable, arguments (a tuple) -> the call's result
  void NewObject();     // class, arguments (a tuple) -> the object
  void Build();         // object, state -> the object with that state
  void PersistentId();  // the topmost value becomes a persistent id

  // Remembers the topmost value under a number for Recall, which pushes it again (the same object,
  // as Python sees it).
  uint32_t Remember();
  void Recall(uint32_t number);

  // So far, for who bounds its memory.
  size_t size() const { return bytes_.size(); }

  // Ends the pickle; its value is the topmost one. CHECKs that it is the only one.
  std::string Finish() &&;

 private:
  void Push() { ++depth_; }
  void Pop(size_t count);
  size_t PopToMark();  // the number of values above it
  void Byte(char byte) { bytes_.push_back(byte); }
  void LittleEndian(uint64_t value, int bytes);

  std::string bytes_;
  size_t depth_ = 0;           // values on the stack above the last mark
  std::vector<size_t> marks_;  // depth_ below each mark
  uint32_t memo_count_ = 0;
  std::unordered_map<std::string, uint32_t> strings_;  // to their memo numbers
  std::unordered_map<std::string, uint32_t> globals_;  // "module\nname\n"
};

}  // namespace holdfast

#endif  // HOLDFAST_BASE_PICKLE_WRITER_H_
