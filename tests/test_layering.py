"""The house rules that a machine can check: floors, owners of heavy dependencies, waits, sizes."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A module imports only from lower floors. Every module of dapo_async is listed.
FLOORS = [
    "addresses curve errors gpu_copy heap hub_access lending math_answer prompt_sharing verifier_child",
    "hub_data keys math_equivalence verifier_pool",
    "background buffer cluster config fused_ops kv_cache metric_list muon prompt_files protocol ratios "
    "records shared_attention varlen vllm_release workload",
    "advantages batching channels checkpoint_folder config_docs config_file cores deadlines logprobs loss memory "
    "metrics mismatch out_of_memory placement prompts readout rewards scores supervisor verifier virtual_worker "
    "waiting warm_start",
    "answers checkpoint fused_forward intake model model_details peers schedule weights",
    "delta forward_choice shared_memory",
    "snapshot",
    "offer",
    "check evaluation publisher run_folder simulate subscriber sums update",
    "reception",
    "console demo hub",
    "liveness memory_check readings run_facts samples",
    "learner",
    "launch",
    "gather plan",
    "evaluate parity",
    "cli",
]
FLOOR = {module: floor for floor, modules in enumerate(FLOORS) for module in modules.split()}

# What workers may know of the learner's package: the contract, and both ends of the wire.
WORKERS_MAY_IMPORT = {
    "addresses",
    "background",
    "channels",
    "config",
    "config_file",
    "curve",
    "errors",
    "keys",
    "kv_cache",
    "metrics",
    "protocol",
    "subscriber",
    "verifier",
    "vllm_release",
    "weights",
}

# A heavy dependency is imported by its owner only, so that replacing it touches one file.
OWNERS = {
    "accelerate": "dapo_async/model.py",
    "datasets": "dapo_async/hub_data.py",
    "flash_attn": "dapo_async/model.py",
    "math_verify": "dapo_async/math_equivalence.py",  # in a child process
    "tensorboard": "dapo_async/metrics.py",
    # outside and inside of vLLM's own processes
    "vllm": "workers/vllm_engine.py workers/vllm_shards.py workers/vllm_weights.py",
    "xxhash": "dapo_async/weights.py",
    "zmq": "dapo_async/channels.py dapo_async/curve.py",
}
# Help and signals come before torch is loaded, vLLM after its environment is set, datasets only where asked for.
LATE_IMPORTS = {"dapo_async/cli.py", "dapo_async/hub_data.py", "workers/start.py", "workers/vllm_engine.py"}
UNSAFE = {"cloudpickle", "dill", "marshal", "pickle", "shelve"}
WITHOUT_TORCH = [
    "background",
    "buffer",
    "channels",
    "checkpoint_folder",
    "config",
    "config_file",
    "curve",
    "errors",
    "keys",
    "protocol",
    "schedule",
    "supervisor",
    "verifier",
    "verifier_pool",
]

MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60
MAX_NESTING = 4
# Tables of declarations, read field by field: splitting them would only scatter what belongs side by side.
LONG_TABLES = {"dapo_async/config.py", "dapo_async/metric_list.py", "dapo_async/protocol.py"}
MAX_TABLE_LINES = 520

SOURCES = sorted([*(ROOT / "dapo_async").rglob("*.py"), *(ROOT / "workers").rglob("*.py")])
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
BLOCK = ast.If | ast.For | ast.AsyncFor | ast.While | ast.With | ast.AsyncWith | ast.Try | ast.Match


def imports(tree: ast.AST) -> set[str]:
    """Full names of imported modules; of ``from package import name`` for our packages, ``package.name``."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            ours = node.module in ("dapo_async", "workers")
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if ours else {str(node.module)}
    return found


def our_imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Package and module of every import of our own."""
    for name in sorted(imports(tree)):
        package, _, rest = name.partition(".")
        if package in ("dapo_async", "workers"):
            yield package, rest.partition(".")[0]


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


@pytest.mark.parametrize("path", [path for path in TREES if path.startswith("dapo_async/")])
def test_a_module_imports_only_lower_floors(path: str) -> None:
    module = path.removeprefix("dapo_async/").removesuffix(".py")
    if module == "__init__":
        assert not list(our_imports(TREES[path])), "dapo_async/__init__.py must import nothing of ours"
        return
    assert module in FLOOR, f"{path} has no floor: add it to FLOORS in tests/test_layering.py"
    for package, name in our_imports(TREES[path]):
        assert package == "dapo_async", f"{path} imports workers.{name}: workers are started by command line"
        if name == "__version__":
            continue
        assert FLOOR.get(name, 99) < FLOOR[module], (
            f"{path} (floor {FLOOR[module]}) imports {name} (floor {FLOOR.get(name, 'unknown')}): not a lower floor"
        )


@pytest.mark.parametrize("path", [path for path in TREES if path.startswith("workers/")])
def test_workers_import_only_the_contract(path: str) -> None:
    for package, name in our_imports(TREES[path]):
        if package == "dapo_async":
            assert name in WORKERS_MAY_IMPORT, f"{path} imports dapo_async.{name}: workers know the contract only"


def test_every_listed_module_exists() -> None:
    listed = {f"dapo_async/{module}.py" for module in FLOOR}
    assert listed <= set(TREES), f"listed in FLOORS but absent: {sorted(listed - set(TREES))}"


@pytest.mark.parametrize(("dependency", "owner"), OWNERS.items())
def test_a_heavy_dependency_has_one_owner(dependency: str, owner: str) -> None:
    users = {path for path, tree in TREES.items() if dependency in {name.split(".")[0] for name in imports(tree)}}
    owners = set(owner.split())
    assert users <= owners, f"{dependency} belongs to {owner}, but is imported by {sorted(users - owners)}"
    assert not any("torch.utils.tensorboard" in imports(tree) for tree in TREES.values()), "it has an owner too"


def test_the_contract_imports_without_torch() -> None:
    names = ", ".join(f"dapo_async.{module}" for module in WITHOUT_TORCH)
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
    assert places[0].startswith("dapo_async/channels.py")


@pytest.mark.parametrize("path", TREES)
def test_files_and_functions_stay_small(path: str) -> None:
    num_lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    limit = MAX_TABLE_LINES if path in LONG_TABLES else MAX_FILE_LINES
    assert num_lines <= limit, f"{path} has {num_lines} lines, allowed are {limit}"
    for function in functions(TREES[path]):
        assert function.end_lineno is not None
        num_lines = function.end_lineno - function.lineno + 1
        assert num_lines <= MAX_FUNCTION_LINES, f"{path}: {function.name} has {num_lines} lines"
        assert nesting(function) <= MAX_NESTING, f"{path}: {function.name} nests {nesting(function)} deep"


@pytest.mark.parametrize("path", TREES)
def test_every_module_says_what_it_owns(path: str) -> None:
    assert ast.get_docstring(TREES[path]), f"{path} has no docstring"
