#!/usr/bin/python3
"""Holds the architecture: which room may include which, and where each third-party library may stand.

The table is DESIGN section 2's. A rule here is a regular expression over the lines of a file without
comments and string literals; the test first proves on planted violations that every rule can fire.
"""

import re
import sys

from tree import ROOT, files

# Room -> rooms whose headers it may include. The longest matching room of a path counts.
ROOMS = {
    "base": {"base"},
    "io": {"base", "io"},
    "format": {"base", "format"},
    "hook/abi": {"hook/abi"},
    "hook": {"hook", "hook/abi"},
    "checkpoint": {"base", "io", "format", "hook/abi", "checkpoint"},
    "monitor": {"base", "hook/abi", "monitor"},
    "preflight": {"base", "io", "preflight"},
    "agent": {"base", "io", "format", "hook/abi", "checkpoint", "monitor", "agent"},
    "converter": {"base", "io", "format", "converter"},
    "cli": {"base", "io", "format", "hook/abi", "checkpoint", "monitor", "agent", "converter", "preflight",
            "cli"},
    # The examples are users: the public hook API and their own folders.
    "examples": {"examples"},
}
PUBLIC_HOOK_HEADERS = {"hook/holdfast.h", "hook/holdfast.hpp", "holdfast.h", "holdfast.hpp"}

# (what, include pattern, where it may stand). Tests may use anything.
CONFINED = [
    ("liburing", r"liburing\.h", r"^io/"),
    ("HDF5", r"hdf5(_hl)?\.h|H5[A-Z]+public\.h", r"^format/hdf5_"),
    ("zstd", r"zstd\.h", r"^base/zstd_codec\.cc$"),
    ("libcrypto", r"openssl/.*", r"^base/sha256\.cc$"),
    ("ISA-L", r"isa-l\.h|isa-l/.*|crc\.h", r"^(base/(crc32c|inflate|zip_crc32)\.cc|checkpoint/redundancy/)"),
    ("CUDA", r"cuda\.h|cuda_runtime.*\.h", r"^hook/device_"),
    ("NCCL", r"nccl.*\.h", r"^hook/"),
    ("RE2", r"re2/.*", r"^converter/(parallel|rename)_rules\.cc$"),
    ("gRPC", r"grpc.*/.*", r"^agent/"),
    ("protobuf", r"google/protobuf/.*", r"^agent/"),
    ("libmicrohttpd", r"microhttpd\.h", r"^agent/http_server\.cc$"),
    ("toml++", r"toml\+\+/.*", r"^agent/"),
    ("spdlog", r"spdlog/.*", r"^(agent|cli)/"),
    ("CLI11", r"CLI/.*", r"^(agent|cli)/"),
    ("nlohmann-json", r"nlohmann/.*", r"^((format|checkpoint|agent|cli|converter)/|monitor/finding(_record)?\.(cc|h)$)"),
    ("Abseil in the trainer's process", r"absl/.*", r"^(?!hook/)"),
]

# (what, code pattern, files it holds for, files excepted)
FORBIDDEN = [
    ("assert(): CHECK is always on", r"(?<![\w.])assert\s*\(", r".", None),
    ("code that one build mode skips", r"^\s*#\s*if\s+0\b", r".", None),
    ("a thread that nobody joins", r"\.detach\s*\(", r".", None),
    # Excepted: programs that train (their device's time), and the wait, with a deadline, for another
    # process's file lock, which has no event.
    ("a sleep: wait for an event instead", r"\b(usleep|nanosleep|sleep_for|sleep_until|sleep)\s*\(",
     r"^(?!examples/|tests/kill/drill_trainer\.cc$|agent/main\.cc$)", None),
    ("std::mutex outside the annotated one", r"(?<!base_sink<)std::(recursive_)?(timed_)?mutex\b",
     r"^(?!examples/)", r"^(base/mutex\.h|hook/annotations\.h)$"),
    ("absl::Mutex: TSan misjudges Debian's", r"absl::Mutex", r".", None),
    ("published bytes not through io/",
     r"(std::(o|f)fstream|std::ofstream|\bfopen\s*\(|::open\s*\(|\bpwritev?2?\s*\(|::write\s*\(|"
     r"::rename\s*\(|std::filesystem::(rename|remove|create))",
     r"^(format|checkpoint|converter)/", r"^format/hdf5_"),
    ("abort in the trainer's process", r"\b(abort|_exit|exit|terminate)\s*\(", r"^hook/(?!abi/)", None),
]

SOURCES = (".cc", ".h", ".hpp", ".cu")
LINES_MAX = 700


def is_test(path):
    return bool(re.search(r"(_test\.cc$|^tests/|^bench/|/test_[a-z_]+\.(h|cc)$|_testing\.(h|cc)$)", path))


def room_of(path):
    best = None
    for room in ROOMS:
        if path.startswith(room + "/") and (best is None or len(room) > len(best)):
            best = room
    return best


def strip(text):
    """Comments and literals become blanks; line numbers stay."""
    pattern = r'//[^\n]*|/\*.*?\*/|R"(\w*)\(.*?\)\1"|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\''

    def blank(match):
        found = match.group(0)
        return "\n" * found.count("\n") if found.startswith("/") else '""' + "\n" * found.count("\n")

    return re.sub(pattern, blank, text, flags=re.S)


def check_file(path, text):
    """Yields a sentence per violation in `text`, which stands (or would stand) at `path`."""
    room = room_of(path)
    test = is_test(path)
    for number, line in enumerate(text.split("\n"), 1):
        include = re.match(r'\s*#\s*include\s+["<]([^">]+)[">]', line)
        if not include:
            continue
        header = include.group(1)
        target = room_of(header)
        if not test and room and target and target not in ROOMS[room]:
            if not (room == "examples" and header in PUBLIC_HOOK_HEADERS):
                yield f"{path}:{number}: {room}/ must not include {header}"
        for what, pattern, where in CONFINED:
            if not test and re.fullmatch(pattern, header) and not re.search(where, path):
                yield f"{path}:{number}: {what} is confined to {where}: {header}"
    code = strip(text)
    for what, pattern, where, excepted in FORBIDDEN:
        if not re.search(where, path) or (excepted and re.search(excepted, path)):
            continue
        if test and what.startswith(("published", "abort", "std::mutex")):
            continue
        for match in re.finditer(pattern, code, flags=re.M):
            number = code.count("\n", 0, match.start()) + 1
            yield f"{path}:{number}: {what}: {match.group(0).strip()}"
    if re.search(r"\b(TODO|FIXME|XXX|HACK)\b", text):
        yield f"{path}: a note for later: finish it or leave the part out whole"
    lines = text.count("\n")
    if lines > LINES_MAX:
        yield f"{path}: {lines} lines; one idea a file, at most {LINES_MAX}"
    if path.endswith(".h") and not path.startswith("examples/"):
        guard = "HOLDFAST_" + re.sub(r"[/.]", "_", path.upper()) + "_"
        if path == "hook/holdfast.h":
            guard = "HOLDFAST_H_"
        if f"#ifndef {guard}\n#define {guard}\n" not in text:
            yield f"{path}: no include guard {guard}"


def sources():
    for path in files():
        if path.suffix in SOURCES:
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


# Every rule must fire on its planted violation: a check that cannot fail is none.
PLANTED = [
    ("base/x.cc", '#include "io/file_system.h"\n', "must not include"),
    ("io/x.cc", '#include "format/layout.h"\n', "must not include"),
    ("preflight/x.cc", '#include "monitor/finding.h"\n', "must not include"),
    ("hook/x.cc", '#include "base/ids.h"\n', "must not include"),
    ("hook/abi/x.cc", '#include "hook/holdfast.h"\n', "must not include"),
    ("examples/x.cc", '#include "hook/link.h"\n', "must not include"),
    ("checkpoint/x.cc", "#include <liburing.h>\n", "liburing"),
    ("format/image.cc", "#include <hdf5.h>\n", "HDF5"),
    ("hook/x.cc", '#include "absl/status/status.h"\n', "Abseil"),
    ("hook/x.cc", "#include <cuda.h>\n", "CUDA"),
    ("checkpoint/x.cc", "#include <grpcpp/grpcpp.h>\n", "gRPC"),
    ("base/x.cc", "#include <openssl/sha.h>\n", "libcrypto"),
    ("agent/x.cc", "#include <microhttpd.h>\n", "libmicrohttpd"),
    ("io/x.cc", "#include <isa-l.h>\n", "ISA-L"),
    ("monitor/x.cc", "#include <zstd.h>\n", "zstd"),
    ("io/x.cc", "void F() { assert(1); }\n", "assert"),
    ("io/x.cc", "#if 0\n#endif\n", "build mode"),
    ("io/x.cc", "void F() { t.detach(); }\n", "joins"),
    ("io/x_test.cc", "void F() { usleep(1); }\n", "sleep"),
    ("io/x.cc", "std::mutex m;\n", "mutex"),
    ("io/x.cc", "absl::Mutex m;\n", "absl::Mutex"),
    ("checkpoint/x.cc", "void F() { ::rename(a, b); }\n", "published"),
    ("hook/x.cc", "void F() { abort(); }\n", "abort"),
    ("io/x.cc", "// TODO later\n", "later"),
    ("io/x.cc", "\n" * (LINES_MAX + 1), "lines"),
    ("io/x.h", "\n", "guard"),
]


def main():
    failures = []
    for path, text, expected in PLANTED:
        found = list(check_file(path, text))
        if not any(expected in sentence for sentence in found):
            failures.append(f"the rule '{expected}' did not fire on its planted violation in {path}")
    checked = 0
    for path, text in sources():
        checked += 1
        failures.extend(check_file(path, text))
    for sentence in failures:
        print(sentence)
    print(f"{checked} files, {len(PLANTED)} planted violations, {len(failures)} failures")
    if checked < 20:
        print("expected at least 20 source files: is this the repository's root?")
        return 1
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
