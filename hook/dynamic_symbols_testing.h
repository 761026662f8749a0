// What a shared library exports and needs, read from its file: what is not there cannot be looked
// up by mistake.
#ifndef HOLDFAST_HOOK_DYNAMIC_SYMBOLS_TESTING_H_
#define HOLDFAST_HOOK_DYNAMIC_SYMBOLS_TESTING_H_

#include <elf.h>

#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace holdfast::hook {

// What of an ELF file's dynamic section matters here.
struct DynamicSymbols {
  std::set<std::string> defined;
  std::set<std::string> undefined;  // not weak, without a version of glibc's
  std::set<std::string> needed;
};

inline DynamicSymbols ReadDynamicSymbols(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const auto at = [&](uint64_t offset) { return bytes.data() + offset; };
  Elf64_Ehdr header;
  std::memcpy(&header, at(0), sizeof(header));
  std::vector<Elf64_Shdr> sections(header.e_shnum);
  std::memcpy(sections.data(), at(header.e_shoff), sections.size() * sizeof(Elf64_Shdr));
  DynamicSymbols result;
  std::vector<uint16_t> versions;
  std::map<uint16_t, std::string> version_names;
  for (const Elf64_Shdr& section : sections) {
    const uint64_t strings =
        section.sh_link < sections.size() ? sections[section.sh_link].sh_offset : 0;
    if (section.sh_type == SHT_GNU_versym) {
      versions.resize(section.sh_size / sizeof(uint16_t));
      std::memcpy(versions.data(), at(section.sh_offset), section.sh_size);
    }
    if (section.sh_type == SHT_GNU_verneed) {
      uint64_t need_at = section.sh_offset;
      for (uint32_t i = 0; i < section.sh_info; ++i) {
        Elf64_Verneed need;
        std::memcpy(&need, at(need_at), sizeof(need));
        uint64_t aux_at = need_at + need.vn_aux;
        for (uint16_t k = 0; k < need.vn_cnt; ++k) {
          Elf64_Vernaux aux;
          std::memcpy(&aux, at(aux_at), sizeof(aux));
          version_names[aux.vna_other] = at(strings + aux.vna_name);
          aux_at += aux.vna_next;
        }
        need_at += need.vn_next;
      }
    }
    if (section.sh_type == SHT_DYNAMIC) {
      for (uint64_t offset = 0; offset < section.sh_size; offset += sizeof(Elf64_Dyn)) {
        Elf64_Dyn entry;
        std::memcpy(&entry, at(section.sh_offset + offset), sizeof(entry));
        if (entry.d_tag == DT_NEEDED) result.needed.insert(at(strings + entry.d_un.d_val));
      }
    }
  }
  for (const Elf64_Shdr& section : sections) {
    if (section.sh_type != SHT_DYNSYM) continue;
    const uint64_t strings = sections[section.sh_link].sh_offset;
    for (uint64_t i = 1; i < section.sh_size / sizeof(Elf64_Sym); ++i) {
      Elf64_Sym symbol;
      std::memcpy(&symbol, at(section.sh_offset + i * sizeof(symbol)), sizeof(symbol));
      const std::string name = at(strings + symbol.st_name);
      if (symbol.st_shndx != SHN_UNDEF) {
        result.defined.insert(name);
      } else if (ELF64_ST_BIND(symbol.st_info) != STB_WEAK) {
        const std::string version = version_names[versions[i] & 0x7fff];
        if (version.rfind("GLIBC_", 0) != 0) result.undefined.insert(name + "@" + version);
      }
    }
  }
  return result;
}

}  // namespace holdfast::hook

#endif  // HOLDFAST_HOOK_DYNAMIC_SYMBOLS_TESTING_H_
