"""What the documents name is there: paths, modules, flags and targets of make."""

import contextlib
import functools
import importlib
import io
import pkgutil
import re
import runpy
import sys
from pathlib import Path

import pytest

from charlstm import api
from data_pipeline.build.datasets import NAMES
from data_pipeline.settings import CorpusSettings
from launch.support.flags import Help
from tests.jobs import ROOT

DOCUMENTS = [*(ROOT / name for name in ("README.md", "WORKSPACE.md", "CONTRIBUTING.md")), *(ROOT / "docs").glob("*.md")]
CONFIGS = [path for path in (ROOT / "configs").iterdir() if path.is_file()]
TOP = ("charlstm", "data_pipeline", "launch", "configs", "tests", "benchmarks", "notebooks", "docs")
FILES = [path.relative_to(ROOT) for top in TOP for path in (ROOT / top).rglob("*") if "__pycache__" not in path.parts]
FILES += [path.relative_to(ROOT) for path in ROOT.iterdir()]

# Flags of other programs that the documents name: XLA's, git's, Slurm's and Dask's.
OTHERS = re.compile("xla_|always|dirty|array$|nthreads$")
# Programs that are started with `python -m`, and are not of this project.
TOOLS = {"pip", "pytest", "venv"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code(text: str) -> list[str]:
    """What stands in backticks, in indented blocks and in fenced ones, a line each; continued lines are joined."""
    text = re.sub(r"\\\n\s*", " ", text)
    fenced = re.findall(r"^```.*?\n(.*?)^```", text, flags=re.M | re.S)
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return [
        *(line for block in fenced for line in block.splitlines()),
        *re.findall(r"^    +(\S.*)$", text, flags=re.M),
        *(" ".join(word.split()) for word in re.findall(r"(?<!`)`([^`]+)`", text)),
    ]


def words(document: Path) -> list[str]:
    """What stands in code, cut at spaces and without punctuation."""
    return [word.strip(",;:()") for line in code(document.read_text("utf-8")) for word in line.split()]


def is_there(path: str) -> bool:
    """Whether some file or folder of the project has this path, or ends with it; a star stands for anything."""
    pattern = path.rstrip("/")
    return any(file.match(pattern) for file in FILES)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_path_in_a_document_exists(document):
    ours = re.compile(rf"(?:{'|'.join(TOP)})/[\w./*-]*|[\w./*-]+\.(?:py|md|flags|ipynb|lock|sbatch)")
    missing = {word for word in words(document) if ours.fullmatch(word) and not is_there(word)}
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_link_in_a_document_leads_somewhere(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text("utf-8")):
        path, _, heading = link.partition("#")
        if not path.startswith("https://"):
            target = document.parent / path if path else document
            assert target.exists(), link
            headings = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), flags=re.M) if heading else []
            assert not heading or heading in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_dotted_name_of_the_project_in_a_document_can_be_imported(document):
    for word in words(document):
        if re.fullmatch(r"(charlstm|data_pipeline|launch|benchmarks)(\.\w+)+", word) and not word.endswith(".yml"):
            pkgutil.resolve_name(word)


@functools.cache
def flags_of(module: str) -> set[str]:
    """The flags of a program that is started with `python -m`."""
    if module.startswith("launch."):
        with pytest.raises(Help) as shown:
            importlib.import_module(module).main([module, "--help"])
        names = set(re.findall(r"^  --(\w+)=", str(shown.value), flags=re.M))
        return names | {"flagfile", "help", "helpshort"} | {f"no{name}" for name in names}
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        patch.setattr(sys, "argv", [module, "--help"])
        patch.delitem(sys.modules, module, raising=False)  # runpy warns of one that was imported before
        runpy.run_module(module, run_name="__main__")
    return set(re.findall(r"--(\w+)", shown.getvalue()))


LAUNCHED = ("train", "evaluate", "sample", "serve", "prepare", "tune", "local", "compare", "inspect")
LAUNCHED += ("export", "import_model")
PROGRAMS = [f"launch.{name}" for name in LAUNCHED]
PROGRAMS += ["tests.faults.chaos", "tests.faults.soak", "benchmarks.cost_model"]
PROGRAMS += [
    f"benchmarks.{name}"
    for name in (
        "train_step",
        "sampling",
        "end_to_end",
        "input",
        "scaling",
        "agreement",
        "restore",
        "gpu",
        "equal_time",
        "parts",
        "remote",
        "readers",
        "capping",
        "seeds",
        "inside",
    )
]


@pytest.mark.parametrize("document", [*DOCUMENTS, *CONFIGS], ids=name_of)
def test_every_flag_in_a_document_is_one_of_a_program(document):
    known = set().union(*map(flags_of, PROGRAMS))
    named = set(re.findall(r"(?<![\w-])--(\w+)(?![\w-])", document.read_text("utf-8")))
    assert not {name for name in named - known if not OTHERS.match(name)}


@pytest.mark.parametrize("document", [*DOCUMENTS, *CONFIGS], ids=name_of)
def test_every_command_in_a_document_is_of_a_program_that_has_its_flags(document):
    lines = document.read_text("utf-8").replace("\\\n", " ").replace("\n#", "\n").splitlines()
    for module, rest in re.findall(r"python -m ([\w.]+)([^`\n]*)", "\n".join(lines)):
        if module in TOOLS:
            continue
        assert module in PROGRAMS or module == "notebooks.execute", module
        own, _, of_train = rest.partition("#")[0].partition(" -- ")
        for program, flags in ((module, own), ("launch.train", of_train)):
            named = set(re.findall(r"(?<=\s)--(\w+)", flags))
            assert named <= flags_of(program), f"{program} {named - flags_of(program)}"


def test_the_readme_names_fewer_than_20_different_flags():
    named = set(re.findall(r"(?<![\w-])--(\w+)", (ROOT / "README.md").read_text("utf-8")))
    assert len(named) < 20, sorted(named)


@pytest.mark.parametrize(
    "path", [*DOCUMENTS, ROOT / ".ci" / "run", ROOT / ".github" / "workflows" / "ci.yml"], ids=name_of
)
def test_every_target_of_make_that_is_named_is_one(path):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.M))
    before = r"^make |^ +make |`make |run: make |=1 make "
    assert set(re.findall(rf"(?:{before})([a-z]+)", path.read_text("utf-8"), flags=re.M)) <= targets


def test_every_corpus_with_a_name_is_told_of_where_corpora_are_explained():
    help_text = CorpusSettings.__dataclass_fields__["corpus"].metadata["help"]
    places = {"settings.py": help_text, "api.load_corpus": api.load_corpus.__doc__}
    places["docs/training.md"] = (ROOT / "docs" / "training.md").read_text("utf-8")
    assert not {place: missing for place, text in places.items() if (missing := [n for n in NAMES if n not in text])}


def test_the_tables_of_settings_are_those_of_the_code():
    page = ROOT / "docs" / "settings.md"
    written = runpy.run_path(str(ROOT / "docs" / "settings.py"))["written"]
    assert written(page.read_text("utf-8")) == page.read_text("utf-8"), "run: python docs/settings.py"
