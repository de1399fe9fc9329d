"""The house in order: arrows down the floors, style, pinned versions, and tables that list what is there."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lora_edu import notebooks
from lora_edu.paths import REPOSITORY

FLOORS = {
    1: ["paths", "text", "lowrank", "counting", "data", "resampling", "seeds", "timing"],
    2: ["tinylm", "lora", "loss", "retrieval", "docstrings", "five_cases"],
    3: ["training", "plots", "tuning"],
    4: ["explore", "exercises", "recording"],
    5: ["cli", "commands", "lab", "doctor", "notebooks", "delta", "adapters", "site", "guard"],
}
# a reader's own model, and the course's two real ones, with transformers, when asked to
OPENS_MODELS = {"adapters.text_loss", "data.hub"}
CPU_BUILD = "https://download.pytorch.org/whl/cpu"
PACKAGE = REPOSITORY / "lora_edu"
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """lora_edu/recording/make.py → recording.make, lora_edu/data/__init__.py → data."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").strip(".")


def floor_of(module: str) -> int:
    """The floor of a module of ours (named without `lora_edu.`): that of the longest name that covers it."""
    covering = [
        (len(name), floor)
        for floor, names in FLOORS.items()
        for name in names
        if module == name or module.startswith(name + ".")
    ]
    assert covering, f"lora_edu.{module} stands on no floor: give it one here and in CONTRIBUTING.md"
    return max(covering)[1]


def imports(path: Path, text: str | None = None) -> set[str]:
    """Every module that a file imports, wherever in it, by full name. text: instead of what is in the file."""
    found = set()
    package = ("lora_edu", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8") if text is None else text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            found.add(base)
            for alias in node.names:
                whole = f"{base}.{alias.name}".split(".")
                file = REPOSITORY.joinpath(*whole)
                if whole[0] == "lora_edu" and (file.is_dir() or file.with_suffix(".py").is_file()):
                    found.add(".".join(whole))
    return found


def against_the_arrows(path: Path, text: str | None = None) -> list[str]:
    """What a module imports of ours from a floor that it may not import from."""
    module = name_of(path)
    ours = {name.removeprefix("lora_edu.") for name in imports(path, text) if name.startswith("lora_edu.")}
    if not module:
        return sorted(ours)  # importing the package itself imports nothing
    floor = floor_of(module)
    room = module.split(".")[0]

    def allowed(other: str) -> bool:
        inside = other.split(".")[0] == room and floor_of(other) <= floor
        return inside or floor == 5 or other in ("paths", "text") or floor_of(other) < floor

    return sorted(other for other in ours if not allowed(other))


def forbidden_libraries(path: Path, text: str | None = None) -> set[str]:
    """What a module imports of others though no module, or none of its floor, may."""
    module = name_of(path)
    roots = {name.split(".")[0] for name in imports(path, text)}
    forbidden = {"peft", "loralib", "transformers"}  # references, to compare with
    if module in OPENS_MODELS:
        forbidden -= {"transformers"}
    if module and floor_of(module) < 4:
        forbidden |= {"ipywidgets"}
    if module.split(".")[0] in ("", "counting", "paths", "text", "cli"):
        forbidden |= {"torch", "numpy"}
    return roots & forbidden


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_run_down_the_floors(path):
    assert not against_the_arrows(path)
    assert not forbidden_libraries(path)


@pytest.mark.parametrize(
    ("file", "line", "found"),
    [
        ("lowrank.py", "from lora_edu.tinylm import TinyLM", ["tinylm"]),
        ("lowrank.py", "from . import plots", ["plots"]),
        ("lowrank.py", "def later():\n    import lora_edu.training", ["training"]),
        ("plots.py", "from lora_edu import training", ["training"]),  # of the same floor, another room
        ("lora/layers.py", "from ..training import fit", ["training"]),
        ("tuning/variants/dora.py", "from ...training import fit", ["training"]),
        ("tuning/variants/dora.py", "from ..applied import mark\nfrom lora_edu.lora import add_lora", []),
        ("data/corpus.py", "from lora_edu import explore", ["explore"]),
        ("explore/deltas.py", "from lora_edu.site import book", ["site", "site.book"]),
        ("__init__.py", "from lora_edu.paths import REPOSITORY", ["paths"]),
        ("lora/layers.py", "from lora_edu.lora.functional import lora_embedding", []),
        ("training.py", "from lora_edu import tinylm\nfrom lora_edu.paths import write_json", []),
    ],
)
def test_an_import_against_the_arrows_is_found(file, line, found):
    assert against_the_arrows(PACKAGE / file, line) == found


@pytest.mark.parametrize(
    ("file", "line", "found"),
    [
        ("lora/peft_format.py", "import peft.tuners", {"peft"}),
        ("exercises/answers.py", "from transformers import AutoModel", {"transformers"}),
        ("plots.py", "import ipywidgets as widgets", {"ipywidgets"}),
        ("explore/deltas.py", "import ipywidgets as widgets", set()),
        ("adapters/text_loss.py", "import transformers, peft", {"peft"}),
        ("data/hub.py", "import transformers, peft", {"peft"}),
        ("data/published.py", "import transformers", {"transformers"}),
        ("cli.py", "def later():\n    import torch", {"torch"}),
        ("training.py", "import torch, numpy", set()),
    ],
)
def test_a_library_where_it_may_not_be_is_found(file, line, found):
    assert forbidden_libraries(PACKAGE / file, line) == found


def imported_at_once(path: Path) -> set[str]:
    """The libraries that importing a module imports: those outside of its functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.body = []
    return {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0)
        for name in (
            [node.module] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
        )
    }


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_what_opens_real_models_is_imported_only_when_one_is_opened(path):
    assert not imported_at_once(path) & {"transformers", "huggingface_hub", "gguf", "bitsandbytes"}


def test_a_module_without_a_floor_is_found():
    with pytest.raises(AssertionError, match="stands on no floor"):
        floor_of("attic")


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["check", "format"])
def test_style(command):
    ruff = [sys.executable, "-m", "ruff", *command, "."]
    done = subprocess.run(ruff, cwd=REPOSITORY, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr


def project() -> dict:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pinned() -> dict[str, Requirement]:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def test_constraints_are_exact_versions_without_addresses():
    text = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
    assert "://" not in text and " @ " not in text and "+" not in text
    for name, requirement in pinned().items():
        assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), requirement
        assert not name.startswith("nvidia"), "torch names those itself, where there is a GPU"


def test_constraints_pin_every_requirement_within_its_range():
    extras = project()["optional-dependencies"]
    wanted = [*project()["dependencies"], *(part for extra in extras.values() for part in extra)]
    for requirement in map(Requirement, wanted):
        pin = pinned()[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(str(pin.specifier).removeprefix("=="), prereleases=True)


def test_the_environment_file_is_condas_python_then_pip_with_the_constraints():
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text(encoding="utf-8"))
    (pip,) = [part["pip"] for part in environment["dependencies"] if isinstance(part, dict)]
    assert "-c constraints.txt" in pip and "-e .[course]" in pip
    assert any(str(part).startswith("python=3") for part in environment["dependencies"])


def test_the_only_address_to_fetch_packages_from_is_pytorchs_own():
    """Neither a registry's address nor a machine's own folder stands in what a reader gets."""
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        path = REPOSITORY / name
        if path.suffix in (".safetensors", ".png", ".gif", ".npz") or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8").replace(CPU_BUILD, "")
        for address in ("pypi." + "org", "files.python" + "hosted", "download.py" + "torch", "/simple" + "/"):
            assert address not in text, f"{name} has {address}"


def test_the_citation_and_the_licences_are_there():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == project()["version"] == version("lora-edu")
    assert "MIT License" in (REPOSITORY / "LICENSE").read_text(encoding="utf-8")
    assert "CC BY 4.0" in (REPOSITORY / "LICENSE-text").read_text(encoding="utf-8")


def rows(text: str) -> dict[str, str]:
    """Chapter → its row of the table, links left out."""
    found = {}
    for line in text.splitlines():
        line = line.removeprefix("# ")
        if match := re.match(r"\| \[[^]]*\]\((?:notebooks/)?(\d\d_\w+)\.ipynb\)", line):
            found[match[1]] = re.sub(r"\]\([^)]*\)", "]", line)
    return found


def test_readme_and_index_list_the_chapters_that_are_there():
    there = [name for name in notebooks.names() if name != "index"]
    readme = rows((REPOSITORY / "README.md").read_text(encoding="utf-8"))
    index = rows((notebooks.FOLDER / "source" / "index.py").read_text(encoding="utf-8"))
    assert list(readme) == there, "README.md"
    assert list(index) == there, "notebooks/source/index.py"
    assert readme == index


def test_the_minutes_in_the_table_are_those_the_chapters_say():
    for name, row in rows((REPOSITORY / "README.md").read_text(encoding="utf-8")).items():
        source = (notebooks.FOLDER / "source" / f"{name}.py").read_text(encoding="utf-8")
        said = re.search(r"(\d+) minutes to read", source)
        assert said and row.split(" | ")[2] == said[1], f"{name}: {row}"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "notebooks/index.ipynb"])
def test_links_lead_somewhere(name):
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)\)", text):
        if "://" not in target:
            assert ((REPOSITORY / name).parent / target).exists(), f"{name} links to {target}"


def test_the_makefile_only_calls_commands_that_there_are():
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    course = (REPOSITORY / "tools" / "course.py").read_text(encoding="utf-8")
    for target, command in re.findall(r"^(\w+): .*tools/course\.py (\w+)", makefile, re.MULTILINE):
        assert target == command and f'"{command}": ' in course
    for module in re.findall(r'\["-m", "([\w.]+)"', course):
        place = REPOSITORY.joinpath(*module.split("."))
        assert module == "pytest" or place.with_suffix(".py").is_file() or (place / "__main__.py").is_file()
