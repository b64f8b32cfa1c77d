#!/usr/bin/env python3
"""What every file of the tree respects: no paths of one machine, nothing left for later, headers that say what they own.

Each violation is printed as file:line. Before it reads the tree, the test proves on small bad files that it can fail.
"""

import os
import re
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

SKIPPED_FOLDERS = re.compile(r"^(\.git|\.cache|\.venv|__pycache__|build(-.*)?)$")
# Documents and vectors are data: they may say anything but where they were made.
DATA = ("tests/data/", "tests/fuzz/seeds/", "examples/")
HEADER = (".h", ".cuh")

# Written in halves, so that this file passes its own test.
MACHINE_PATH = re.compile("/(?:wo" + "rk|ho" + "me)/")
LEFT_FOR_LATER = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME)\b")


def header_problems(path, lines):
    opening = 0
    while opening < len(lines) and lines[opening].startswith("// "):
        opening += 1
    if opening < 2:
        yield f"{path}:1: a header opens with two comment lines: what it owns, which thread may call it"
    if path.endswith("-inl.h"):
        return  # Highway includes it once per target
    pragmas = [number for number, line in enumerate(lines) if line.rstrip() == "#pragma once"]
    if pragmas[:1] != [opening]:
        yield f"{path}:{opening + 1}: #pragma once stands right below the opening comment"


def problems_of(path, text):
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if MACHINE_PATH.search(line):
            yield f"{path}:{number}: a path of one machine"
        if LEFT_FOR_LATER.search(line) and not path.startswith(DATA):
            yield f"{path}:{number}: left for later; do it or drop it"
    if path.endswith(HEADER):
        yield from header_problems(path, lines)


def read_text(path):
    """The text of a file, or None for binary data."""
    with open(path, "rb") as f:
        if b"\0" in f.read(4096):
            return None
        f.seek(0)
        try:
            return f.read().decode("utf-8")
        except UnicodeDecodeError:
            return None


def read_tree(root):
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not SKIPPED_FOLDERS.match(name))
        for name in sorted(names):
            path = os.path.join(folder, name)
            if os.path.isfile(path) and not os.path.islink(path) and name != ".git":
                text = read_text(path)
                if text is not None:
                    yield os.path.relpath(path, root).replace(os.sep, "/"), text


def self_check():
    good = "// Owns x.\n// Any thread.\n#pragma once\n\nint framework;\n"
    later = "TO" + "DO"
    bad = [
        ("src/a.h", good + "// /ho" + "me/me/x\n", 6),
        ("docs/a.md", "see /wo" + "rk/x\n", 1),
        ("tests/data/a.json", '"/wo' + 'rk/x"\n', 1),
        ("src/a.cc", "\n// " + later + ": more\n", 2),
        ("tools/a.py", "# FIX" + "ME\n", 1),
        ("src/a.h", "// Owns x.\n#pragma once\n", 1),
        ("src/a.h", "#pragma once\n// Owns x.\n// Any thread.\n", 1),
        ("src/a.h", "// Owns x.\n// Any thread.\n#ifndef A\n#endif\n", 3),
    ]
    assert not list(problems_of("src/a.h", good))
    assert not list(problems_of("src/a-inl.h", "// Owns x.\n// Any thread.\n#if defined(A) == defined(B)\n#endif\n"))
    assert not list(problems_of("examples/a.txt", later + "\n"))
    for path, text, line in bad:
        found = list(problems_of(path, text))
        assert any(problem.startswith(f"{path}:{line}:") for problem in found), (path, text, found)


def main():
    self_check()
    files = 0
    problems = []
    for path, text in read_tree(ROOT):
        files += 1
        problems += problems_of(path, text)
    assert files, "no files found: the test looks in the wrong place"
    for problem in problems:
        print(problem)
    print(f"tree: {files} text files, {len(problems)} violations")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
