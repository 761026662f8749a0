#!/usr/bin/python3
"""Keeps the documents true where a machine can: every link leads somewhere, every test that
docs/PROMISES.md names exists, every promise P1 to P10 has a line, every script named is there."""

import re
import sys

from tree import ROOT, files


def tests_of_the_tree():
    """Suite.Name of every GoogleTest test, and the names given to add_test."""
    names = set()
    for path in files():
        if path.name.endswith("_test.cc"):
            for suite, name in re.findall(r"^TEST(?:_F|_P)?\((\w+),\s*(\w+)\)",
                                          path.read_text(encoding="utf-8"), re.M):
                names.add(f"{suite}.{name}")
        elif path.name == "CMakeLists.txt":
            text = path.read_text(encoding="utf-8")
            names.update(re.findall(r"add_test\(NAME (\w+)", text))
            names.update(re.findall(r"holdfast_(?:python_)?test\((\w+)", text))
    return names


def documents():
    return [path for path in files() if path.suffix == ".md"]


def broken_links(path, text):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not re.match(r"[a-z]+:", target) and not (path.parent / target).exists():
            yield f"{path.relative_to(ROOT)}: link to {target} leads nowhere"


def missing_scripts(path, text):
    for script in sorted(set(re.findall(r"(?<![\w./])((?:scripts/[a-z_-]+|examples/[a-z_]+)(?:\.py)?)\b", text))):
        if not (ROOT / script).exists():
            yield f"{path.relative_to(ROOT)}: {script} does not exist"


def wrong_promises(text, tests):
    for number in range(1, 11):
        if not re.search(rf"^\| P{number} \|", text, re.M):
            yield f"docs/PROMISES.md: no line for P{number}"
    named = re.findall(r"`(\w+(?:\.\w+)?)`", "\n".join(
        line for line in text.splitlines() if re.match(r"\| P\d+ \|", line)))
    for name in named:
        if name not in tests:
            yield f"docs/PROMISES.md: there is no test {name}"
    for line in text.splitlines():
        if re.match(r"\| P\d+ \|", line) and "not offered yet" not in line and "`" not in line:
            yield f"docs/PROMISES.md: neither a test nor 'not offered yet': {line}"


def main():
    tests = tests_of_the_tree()
    failures = []
    # A check that cannot fail is none.
    planted = (list(broken_links(ROOT / "README.md", "[x](docs/nothing.md)")) and
               list(missing_scripts(ROOT / "README.md", "run scripts/nothing")) and
               list(wrong_promises("| P1 | x | `No.SuchTest` |", tests)))
    if not planted:
        failures.append("the checks do not find what was planted")
    count = 0
    for path in documents():
        count += 1
        text = path.read_text(encoding="utf-8")
        failures += broken_links(path, text)
        failures += missing_scripts(path, text)
    failures += wrong_promises((ROOT / "docs" / "PROMISES.md").read_text(encoding="utf-8"), tests)
    for failure in failures:
        print(failure)
    print(f"{count} documents, {len(tests)} tests known, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
