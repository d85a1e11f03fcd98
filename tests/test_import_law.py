"""Arrows point down, licences are by file, and importing does nothing."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("charlstm", "data_pipeline", "launch", "benchmarks")
# Of a package, from the bottom up: a file imports from its own folder and from those before it, never in a circle.
FOLDERS = {
    "charlstm": [
        "types",
        "rng",
        "distributed",
        "config",
        "model",
        "training",
        "inference",
        "run",
        "report",
        "inspect",
        "interop",
        "serving",
        "api",
        "reference",
    ],
    "data_pipeline": ["", "build"],
    "launch": ["support", ""],
}
# What the model and its training may know of the pipeline: types, formulas and settings, no files.
MODEL_MAY_IMPORT = {
    *("data_pipeline.batch", "data_pipeline.settings", "data_pipeline.eval_chunks", "data_pipeline.vocabulary"),
}


@functools.cache
def files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = [module_name(path) for path in files()]
# What these import may not be installed.
OURS = [name for name in MODULES if not name.startswith(("benchmarks.peers.", "charlstm.interop.folder.load_torch"))]


@functools.cache
def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in it."""
    found: set[str] = set()
    tree = ast.parse(path.read_text("utf-8"))
    for_types = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in node.body
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module or "" for name in full}
    return found


@functools.cache
def attributes(path: Path) -> set[str]:
    """Dotted names that a file uses."""
    tree = ast.parse(path.read_text("utf-8"))
    return {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def folder(module: str) -> str:
    """The folder or the file of a package in which a module lies; "" where the package has no such folder."""
    package, _, rest = module.partition(".")
    name = rest.partition(".")[0]
    return name if name in FOLDERS[package] else ""


@pytest.mark.parametrize("path", files(), ids=module_name)
def test_a_file_imports_from_its_own_folder_and_those_below(path):
    module = module_name(path)
    package = module.partition(".")[0]
    for imported in imports(path):
        other = imported.partition(".")[0]
        users = {"launch": ("launch", "benchmarks"), "benchmarks": ("benchmarks",)}.get(other, PACKAGES)
        assert package in users, f"{module} imports {imported}: {other} is imported by nothing below it"
        if package == other and package in FOLDERS and module != package:
            order = FOLDERS[package]
            assert order.index(folder(imported)) <= order.index(folder(module)), f"{module} imports {imported} above it"
        if package == "data_pipeline":
            assert other not in ("charlstm", "jax", "jaxlib"), f"{module} imports {imported}: it knows no model"
        if (
            package == "charlstm"
            and other == "data_pipeline"
            and folder(module) not in ("run", "report", "inspect", "interop", "api")
        ):
            assert imported in MODEL_MAY_IMPORT, f"{module} imports {imported}"
        if folder(module) == "reference" if package in FOLDERS else False:
            assert other not in PACKAGES, f"{module} imports {imported}: the seed programs stand alone"
        if module.startswith("charlstm.interop.folder."):
            assert other not in (*PACKAGES, "jax"), f"{module} imports {imported}: it is copied to where these are not"


def test_no_imports_go_in_a_circle():
    graph = {module_name(path): imports(path) & set(MODULES) for path in files()}
    done: set[str] = set()
    while left := {module for module, below in graph.items() if module not in done and not below - done - {module}}:
        done |= left
    assert not set(graph) - done


def test_every_file_of_the_library_lies_in_a_folder_of_the_law():
    rest = {module.partition(".")[2].partition(".")[0] for module in MODULES if module.startswith("charlstm.")}
    assert rest - {""} == set(FOLDERS["charlstm"])


@pytest.mark.parametrize(
    ("library", "licensed"),
    [
        ("orbax", {"charlstm.run.array_files"}),
        ("tensorstore", {"charlstm.run.array_files"}),
        ("sklearn", {"charlstm.inspect.probe"}),
        ("grain", {"data_pipeline.loader", "benchmarks.sparse_corpus"}),
        ("obstore", {"data_pipeline.stores"}),
        ("pyarrow", {"data_pipeline.build.tables", "benchmarks.readers"}),
        ("distributed", {"data_pipeline.build.engines"}),
        ("optuna", {"launch.tune"}),
        ("tqdm", {"data_pipeline.progress"}),
        ("onnx", {"charlstm.interop.onnx_model"}),
        ("tensorboardX", {"launch.support.event_files"}),
        ("uniplot", {"charlstm.report.curves"}),
        ("matplotlib", {"charlstm.report.curves"}),
        ("prometheus_client", {"launch.support.prometheus"}),
        ("starlette", {"charlstm.serving.app"}),
        ("uvicorn", {"launch.serve"}),
        ("absl.flags", {"launch.support.flags"}),
        ("absl", {"launch.support.flags", "charlstm.run.checkpoint"}),
        ("flax", {"benchmarks.peers.autodiff"}),
        ("optax", {"benchmarks.peers.autodiff"}),
        (
            "torch",
            {
                *(f"benchmarks.peers.{name}" for name in ("equal_time", "pytorch", "pytorch_train")),
                "charlstm.interop.folder.load_torch",
                "charlstm.interop.torch_weights",
            },
        ),
        (
            "safetensors",
            {f"charlstm.interop.{name}" for name in ("model_folder", "folder.load_torch", "torch_weights")},
        ),
        ("haiku", {"benchmarks.peers.autodiff"}),
    ],
)
def test_a_library_is_imported_where_it_is_licensed_and_nowhere_else(library, licensed):
    users = {module_name(p) for p in files() if any(f"{i}.".startswith(f"{library}.") for i in imports(p))}
    assert users <= licensed
    if licensed and library != "absl.flags":
        assert users == licensed


def test_devices_and_processes_are_known_to_the_mesh_alone():
    words = {"NamedSharding", "jax.devices", "process_index", "process_count", "multihost_utils", "jax.distributed"}
    for path in files():
        if module_name(path) == "charlstm.distributed":
            continue
        used = attributes(path) | {i.rpartition(".")[2] for i in imports(path)} | imports(path)
        found = {w for w in words for u in used if u == w or u.endswith("." + w) or u.startswith(w + ".")}
        assert not found, f"{path} uses {found}"


def test_only_launch_writes_the_environment():
    for path in files():
        if module_name(path).startswith("launch"):
            continue
        writes = ("os.environ[", "os.putenv", "os.environ.update", "os.environ.setdefault")
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            written = ast.unparse(node) if isinstance(node, (ast.Assign, ast.Call)) else ""
            assert not written.startswith(writes), path


def test_every_program_of_the_library_is_compiled_with_its_options():
    # Sums of integers are the same however they are divided.
    integers = {"charlstm.run.array_files", "charlstm.run.digest", "charlstm.run.replicas"}
    within = {"charlstm.model.ops.lstm_pallas", "charlstm.model.ops.compiler"}
    for path in files():
        if not module_name(path).startswith("charlstm.") or module_name(path) in integers | within:
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            told = isinstance(node, ast.Call) and any(word.arg == "compiler_options" for word in node.keywords)
            named = [part for part in ast.iter_child_nodes(node) if ast.unparse(part) == "jax.jit"]
            assert told or not named, f"{path} compiles without compiler.options()"


def test_importing_starts_no_backend_parses_no_flag_and_changes_no_environment():
    program = (
        "import os, sys, importlib\n"
        "import absl.flags, jax, orbax.checkpoint, jax.experimental.pallas.mosaic_gpu  # these may do as they like\n"
        "before = dict(os.environ)\n"
        f"for name in {OURS!r}: importlib.import_module(name)\n"
        "assert dict(os.environ) == before, 'the environment changed'\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized(), 'a backend was started'\n"
        "from absl import flags\n"
        "known = set(flags.FLAGS)\n"
        "assert not {'num_steps', 'run_dir', 'cell'} & known, 'flags were defined'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_program_answers_ctrl_c_before_it_imports_anything():
    stems = (
        "launch/train",
        "launch/evaluate",
        "launch/sample",
        "launch/tune",
        "launch/local",
        "launch/prepare",
        "launch/compare",
        "launch/inspect",
        "launch/export",
        "launch/serve",
        "launch/import_model",
    )
    programs = [ROOT / f"{stem}.py" for stem in stems]
    run = [path for path in files() if "\n    cli.run(" in path.read_text("utf-8")]
    assert set(run) <= set(programs)
    for path in programs:
        first = ast.parse(path.read_text("utf-8")).body[1]  # after the docstring
        assert ast.unparse(first).startswith(
            "if __name__ == '__main__':\n    from data_pipeline import startup\n    startup.attach("
        ), path
    # Which takes no time itself: what is not part of the interpreter is imported when signals are held back.
    outside = [node for node in ast.parse((ROOT / "data_pipeline" / "startup.py").read_text("utf-8")).body[1:-1]]
    assert list(map(ast.unparse, outside)) == ["import _signal"]
    used = imports(ROOT / "data_pipeline" / "signals.py")
    assert {name.partition(".")[0] for name in used} <= sys.stdlib_module_names


def test_the_data_pipeline_imports_without_jax():
    names = [name for name in MODULES if name.startswith("data_pipeline")]
    program = (
        "import sys, importlib\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('jax', 'jaxlib', 'grain', 'orbax'): raise ImportError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", files(), ids=module_name)
def test_no_file_and_no_function_has_outgrown_itself(path):
    text = path.read_text("utf-8")
    assert text.count("\n") <= 320, "asks to be two files"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 75, f"{node.name} asks to be two functions"


def test_the_training_loop_is_under_40_lines_of_code():
    tree = ast.parse((ROOT / "charlstm" / "run" / "loop.py").read_text("utf-8"))
    loop = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "train_from")
    assert (loop.end_lineno or 0) - loop.body[1].lineno < 40


def test_nothing_of_ours_runs_in_a_fork():
    for path in files():
        called = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
        given = {keyword.arg for call in called for keyword in call.keywords}
        assert "preexec_fn" not in given and "os.fork" not in attributes(path), path
