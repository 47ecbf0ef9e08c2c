"""The house rules that a machine can check: rungs, owners of heavy dependencies, waits, sizes."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter

import pytest

from tests import ROOT

# A package imports only from lower rungs, never from another one on its own.
RUNGS = [
    "errors",
    "transport",
    "config",
    "schedule data verify system observe demo",
    "rl",  # maj@k counts answers as the verifier spells them
    "model weight_sync coordinator simulate",
    "learner",
    "run",
    "evaluate",
    "cli",
]
RUNG = {package: rung for rung, packages in enumerate(RUNGS) for package in packages.split()}

# What workers may know of dapo_async: whole packages, or single modules of one.
WORKERS_MAY_IMPORT = {
    "errors",
    "transport",
    "config",
    "verify",
    "system",
    "weight_sync.encoding",
    "weight_sync.subscriber",
    "model.family",
    "model.kv_cache",
    "model.tokenizer",
}
WITHOUT_TORCH = ["transport", "config", "schedule", "data", "verify", "system", "coordinator", "simulate"]

# A heavy dependency is imported by its owner only, so that replacing it touches one place.
OWNERS = {
    "accelerate": "dapo_async/model/policy.py",
    "datasets": "dapo_async/data/hub_data.py",
    "flash_attn": "dapo_async/model/forward_pass.py",
    "latex2sympy2_extended": "dapo_async/verify/values.py",  # in a child process
    "simpy": "dapo_async/simulate/simulate.py",
    "tensorboard": "dapo_async/observe/metric_writer.py",
    # outside and inside of vLLM's own processes
    "vllm": "workers/vllm/engine.py workers/vllm/extension.py workers/vllm/shards.py",
    "xxhash": "dapo_async/weight_sync/encoding.py",
    "zmq": "dapo_async/transport/curve.py dapo_async/transport/sockets.py",
}
# Help and signals come before torch is loaded, vLLM after its environment is set, datasets only where asked for.
LATE_IMPORTS = {"dapo_async/cli.py", "dapo_async/data/hub_data.py", "workers/start.py", "workers/vllm/engine.py"}
UNSAFE = {"cloudpickle", "dill", "marshal", "pickle", "shelve"}

MAX_FUNCTION_LINES = 60
MAX_NESTING = 4

SOURCES = sorted([*(ROOT / "dapo_async").rglob("*.py"), *(ROOT / "workers").rglob("*.py")])
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
BLOCK = ast.If | ast.For | ast.AsyncFor | ast.While | ast.With | ast.AsyncWith | ast.Try | ast.Match


def module_name(path: str) -> str:
    """``dapo_async/rl/loss.py`` is ``dapo_async.rl.loss``, and a package's ``__init__.py`` the package."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module_name(path): path for path in TREES}


def imports(tree: ast.AST) -> set[str]:
    """Full names of imported modules; of ``from package import module``, where both are ours, the module's."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
    return found


def our_imports(tree: ast.AST) -> list[str]:
    """Modules of our own that are imported, by full name."""
    return sorted(name for name in imports(tree) if name.partition(".")[0] in ("dapo_async", "workers"))


def package_of(module: str) -> str:
    """``dapo_async.rl.loss`` is of ``rl``, ``dapo_async.cli`` its own package; what is not of dapo_async has none."""
    return module.split(".")[1] if module.startswith("dapo_async.") else ""


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, ast.Attribute]]:
    """Every call of a method, and what is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield node, node.func


def functions(tree: ast.AST) -> Iterator[FUNCTION]:
    return (node for node in ast.walk(tree) if isinstance(node, FUNCTION))


def nesting(node: ast.AST) -> int:
    """Most blocks inside one another below ``node``; an ``elif`` nests no deeper than its ``if``."""
    depths = [0]
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        depths.append(nesting(child) + (isinstance(child, BLOCK) and not is_elif))
    return max(depths)


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("dapo_async")])
def test_a_package_imports_only_from_lower_rungs(module: str) -> None:
    package, imported = package_of(module), our_imports(TREES[MODULES[module]])
    if not package or MODULES[module].endswith("/__init__.py"):
        assert not imported, f"{MODULES[module]} must import nothing of ours: whoever wants a module names it"
        return
    assert package in RUNG, f"{package} has no rung: add it to RUNGS in tests/test_layering.py"
    for name in imported:
        assert name.startswith("dapo_async"), f"{module} imports {name}: workers are started by command line"
        other = package_of(name)
        assert other in ("", package) or RUNG[other] < RUNG[package], (
            f"{module} imports {name}: {other} (rung {RUNG[other]}) is not below {package} (rung {RUNG[package]})"
        )


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module: set(our_imports(TREES[path])) & set(MODULES) for module, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def test_every_rung_is_a_package_that_exists() -> None:
    assert set(RUNG) == {package_of(module) for module in MODULES if module.startswith("dapo_async.")}


@pytest.mark.parametrize("path", [path for path in TREES if path.startswith("workers/")])
def test_workers_import_only_the_contract(path: str) -> None:
    for name in our_imports(TREES[path]):
        if name.startswith("dapo_async."):
            known = {package_of(name), name.removeprefix("dapo_async.")}
            assert known & WORKERS_MAY_IMPORT, f"{path} imports {name}: workers know the contract only"


@pytest.mark.parametrize(("dependency", "owner"), OWNERS.items())
def test_a_heavy_dependency_has_one_owner(dependency: str, owner: str) -> None:
    users = {path for path, tree in TREES.items() if dependency in {name.split(".")[0] for name in imports(tree)}}
    owners = set(owner.split())
    assert users <= owners, f"{dependency} belongs to {owner}, but is imported by {sorted(users - owners)}"
    assert not any("torch.utils.tensorboard" in imports(tree) for tree in TREES.values()), "it has an owner too"


def test_some_packages_import_without_torch() -> None:
    # They run in child processes, beside a package that need not be there.
    heavy = {f"dapo_async.verify.{name}" for name in ("grammar", "math_equivalence", "values")}
    names = ", ".join(name for name in MODULES if package_of(name) in WITHOUT_TORCH and name not in heavy)
    code = f"import sys; import {names}; assert 'torch' not in sys.modules, 'torch was imported'"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", TREES)
def test_imports_are_absolute_and_at_the_top(path: str) -> None:
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
    for function in functions(TREES[path]) if path not in LATE_IMPORTS else ():
        for node in ast.walk(function):
            assert not isinstance(node, ast.Import | ast.ImportFrom), f"{path}:{node.lineno}: import in a function"


@pytest.mark.parametrize("path", TREES)
def test_nothing_is_ever_unpickled(path: str) -> None:
    used = UNSAFE & {name.split(".")[0] for name in imports(TREES[path])}
    assert not used, f"{path} imports {', '.join(sorted(used))}"
    for call, called in calls(TREES[path]):
        target = ast.unparse(called)
        assert target not in ("torch.load", "torch.save"), f"{path}:{call.lineno}: {target} pickles"
        assert all(keyword.arg != "allow_pickle" for keyword in call.keywords), f"{path}:{call.lineno}: allow_pickle"


@pytest.mark.parametrize("path", TREES)
def test_every_wait_has_a_deadline(path: str) -> None:
    for call, called in calls(TREES[path]):
        if call.args or call.keywords or called.attr not in ("get", "recv", "join", "wait", "poll"):
            continue
        target = ast.unparse(called)
        # Asking whether a process has ended does not wait.
        asks = called.attr == "poll" and target.split(".")[-2].endswith(("process", "supervisor"))
        assert asks, f"{path}:{call.lineno}: {target}() waits without a deadline"


def test_one_place_makes_zeromq_sockets() -> None:
    places = [
        f"{path}:{call.lineno}"
        for path, tree in TREES.items()
        for call, called in calls(tree)
        if called.attr == "socket" and ast.unparse(called.value) != "socket"
    ]
    assert len(places) == 1, f"one function makes every socket, so that all have limits and deadlines: {places}"
    assert places[0].startswith("dapo_async/transport/sockets.py")


@pytest.mark.parametrize("path", TREES)
def test_functions_stay_small(path: str) -> None:
    for function in functions(TREES[path]):
        assert function.end_lineno is not None
        num_lines = function.end_lineno - function.lineno + 1
        assert num_lines <= MAX_FUNCTION_LINES, f"{path}: {function.name} has {num_lines} lines"
        assert nesting(function) <= MAX_NESTING, f"{path}: {function.name} nests {nesting(function)} deep"


@pytest.mark.parametrize("path", TREES)
def test_every_module_says_what_it_owns(path: str) -> None:
    assert ast.get_docstring(TREES[path]), f"{path} has no docstring"
