#!/usr/bin/env python3
"""Reads every #include of src/ and apps/ and holds them to the layers of ARCHITECTURE.md.

base < backend < kv < {compress, model} < speculate < engine < server < apps; text includes base only and is used by server
and apps. The folders of the devices (backend/cpu, backend/cuda) are named by themselves and by backend/factory.cc alone.
Each violation is printed as file:line. Before it reads the tree, the test proves on small bad trees that it can fail.
"""

import os
import re
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# What each room may include besides itself.
_LOW = {"base", "backend", "kv"}
_MODEL_AND_COMPRESS = _LOW | {"compress", "model"}
ALLOWED = {
    "base": set(),
    "backend": {"base"},
    "kv": {"base", "backend"},
    "compress": _LOW,
    "model": _LOW,
    "speculate": _MODEL_AND_COMPRESS,
    "engine": _MODEL_AND_COMPRESS | {"speculate"},
    "text": {"base"},
    "server": _MODEL_AND_COMPRESS | {"speculate", "engine", "text"},
    "apps": _MODEL_AND_COMPRESS | {"speculate", "engine", "text", "server"},
}
DEVICES = ("backend/cpu", "backend/cuda")
FACTORY = "src/backend/factory.cc"

INCLUDE = re.compile(r'^\s*#\s*include\s*(?:"([^"]+)"|<([^>]+)>)')
SOURCE = (".h", ".cc", ".cu", ".cuh")


def read_tree(root):
    """{path relative to root: text} of the sources in src/ and apps/."""
    tree = {}
    for top in ("src", "apps"):
        for folder, _, names in os.walk(os.path.join(root, top)):
            for name in names:
                if name.endswith(SOURCE):
                    path = os.path.join(folder, name)
                    with open(path, encoding="utf-8") as f:
                        tree[os.path.relpath(path, root).replace(os.sep, "/")] = f.read()
    return tree


def room_of(path):
    """src/<room>/... -> room, apps/... -> apps, anything else -> None."""
    parts = path.split("/")
    if parts[0] == "apps":
        return "apps"
    return parts[1] if len(parts) > 2 else None


def resolve(tree, path, target):
    """The file of the tree that `#include "target"` in `path` names, as the compiler looks it up, or None."""
    beside = os.path.normpath(os.path.join(os.path.dirname(path), target))
    for candidate in (beside, os.path.normpath("src/" + target)):
        if candidate in tree:
            return candidate
    return None


def include_error(path, target):
    """Why the file `path` may not include the file `target`, or None."""
    room, target_room = room_of(path), room_of(target)
    if target_room != room and target_room not in ALLOWED[room]:
        return f"{room} may not include {target_room}"
    for device in DEVICES:
        inside = f"src/{device}/"
        if target.startswith(inside) and not path.startswith(inside) and path != FACTORY:
            return f"{device} is named by its own folder and {FACTORY} alone"
    return None


def cycles(graph):
    """One list of files per cycle found, from its first file by name round to it again. graph: {file: [(line, file)]}."""
    found, done = [], set()
    for start in sorted(graph):
        stack, trail = [(start, iter(graph[start]))], [start]
        while stack:
            node, edges = stack[-1]
            step = next((target for _, target in edges if target not in done), None)
            if step is None:
                done.add(node)
                stack.pop()
                trail.pop()
            elif step in trail:
                cycle = trail[trail.index(step):]
                first = cycle.index(min(cycle))
                found.append(cycle[first:] + cycle[: first + 1])
            else:
                stack.append((step, iter(graph[step])))
                trail.append(step)
    return found


def violations(tree):
    problems, graph = [], {path: [] for path in tree}
    for path, text in sorted(tree.items()):
        if room_of(path) not in ALLOWED:
            problems.append(f"{path}:1: lies in no room of the design ({', '.join(ALLOWED)})")
            continue
        for number, line in enumerate(text.splitlines(), 1):
            match = INCLUDE.match(line)
            if not match:
                continue
            quoted, angled = match.groups()
            target = resolve(tree, path, quoted or angled)
            where = f"{path}:{number}: {line.strip()}"
            if quoted and not target:
                problems.append(f"{where}: no such file in src/; a library's header is written <...>")
            elif angled and target:
                problems.append(f'{where}: a header of ours is written "..."')
            if target and room_of(target) in ALLOWED:
                graph[path].append((number, target))
                error = include_error(path, target)
                if error:
                    problems.append(f"{where}: {error}")
    for cycle in cycles(graph):
        line = next(number for number, target in graph[cycle[0]] if target == cycle[1])
        problems.append(f"{cycle[0]}:{line}: include cycle: {' -> '.join(cycle)}")
    return problems


GOOD = {
    "src/base/a.h": "",
    "src/base/b.h": '#include "base/a.h"\n#include <vector>\n',
    "src/backend/kernels.h": '#include "base/b.h"\n',
    "src/backend/cpu/gemm.h": '#include "backend/kernels.h"\n',
    "src/backend/cpu/gemm.cc": '#include "backend/cpu/gemm.h"\n',
    "src/backend/factory.cc": '#include "backend/cpu/gemm.h"\n',
    "src/kv/page.h": '#include "backend/kernels.h"\n',
    "src/compress/kivi.h": '#include "kv/page.h"\n',
    "src/model/forward.h": '#include "kv/page.h"\n',
    "src/text/bpe.h": '#include "base/a.h"\n',
    "src/engine/loop.h": '#include "model/forward.h"\n#include "compress/kivi.h"\n',
    "apps/run.h": "",
    "apps/main.cc": '#include "run.h"\n#include "engine/loop.h"\n#include "text/bpe.h"\n',
}

# (file, its text, line of the violation, a word of the message); each is laid over GOOD.
BAD = [
    ("src/base/c.h", '#include "base/a.h"\n#include "kv/page.h"\n', 2, "base may not include kv"),
    ("src/compress/x.h", '#include "model/forward.h"\n', 1, "compress may not include model"),
    ("src/model/x.h", '// a\n\n  #  include "compress/kivi.h"\n', 3, "model may not include compress"),
    ("src/engine/x.cc", '#include "text/bpe.h"\n', 1, "engine may not include text"),
    ("src/text/x.cc", '#include "backend/kernels.h"\n', 1, "text may not include backend"),
    ("src/kv/x.cc", '#include "../engine/loop.h"\n', 1, "kv may not include engine"),
    ("src/kv/y.cc", "#include <engine/loop.h>\n", 1, 'is written "..."'),
    ("src/kv/z.cc", '#include "backend/cpu/gemm.h"\n', 1, "backend/cpu is named by"),
    ("src/backend/other.cc", '#include "cpu/gemm.h"\n', 1, "backend/cpu is named by"),
    ("src/base/d.h", '#include "base/nowhere.h"\n', 1, "no such file"),
    ("src/misc/a.h", "", 1, "no room"),
    ("src/stray.h", "", 1, "no room"),
    ("src/base/a.h", '#include "base/b.h"\n', 1, "include cycle"),
]


def self_check():
    assert violations(GOOD) == [], violations(GOOD)
    for path, text, line, message in BAD:
        found = violations({**GOOD, path: text})
        assert any(problem.startswith(f"{path}:{line}:") and message in problem for problem in found), (path, message, found)


def main():
    self_check()
    tree = read_tree(ROOT)
    assert tree, "no sources found: the test looks in the wrong place"
    problems = violations(tree)
    for problem in problems:
        print(problem)
    includes = sum(len(INCLUDE.findall(line)) for text in tree.values() for line in text.splitlines())
    print(f"layers: {len(tree)} files, {includes} includes, {len(problems)} violations")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
