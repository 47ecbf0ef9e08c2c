"""``dapo-async bench``: lists the benchmarks, or becomes one of them.

A benchmark is a module of this package with a ``main``; the first sentence of its docstring says what it asks.
"""

import ast
import os
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
HIDDEN = {"trl_run"}  # started by another benchmark


def benchmarks() -> dict[str, str]:
    """Name and question of every module that can be run."""
    found = {}
    for path in sorted(HERE.glob("[a-z]*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        runs = any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
        if runs and path.stem not in HIDDEN:
            found[path.stem] = " ".join((ast.get_docstring(tree) or "").split("\n\n")[0].split())
    return found


def main(argv: Sequence[str]) -> int:
    """Returns 0 after the list, 2 for a name that is none; does not return from a benchmark."""
    found = benchmarks()
    if not argv:
        width = max(map(len, found))
        print("dapo-async bench NAME [arguments]; NAME --help says more.\n")
        for name, question in found.items():
            print(f"{name:<{width}}  {question}")
        return 0
    name = argv[0].replace("-", "_")
    if name not in found:
        print(f"dapo-async: there is no benchmark {argv[0]!r}; there are {', '.join(found)}", file=sys.stderr)
        return 2
    os.execv(sys.executable, [sys.executable, "-P", "-m", f"benchmarks.{name}", *argv[1:]])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
