"""What keeps the project in order from outside: workflows, changelog, hooks, and what the package says of itself."""

import re
import tomllib

import hypothesis
import pytest
import yaml

from lora_edu.paths import REPOSITORY

WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))


def project() -> dict:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_by_hash_and_say_their_version(path):
    """A tag can be moved to other code; a hash can't. One action has one hash in all workflows."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if "uses:" in line]
    assert lines
    for line in lines:
        assert re.fullmatch(r"\s*(- )?uses: [\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line


def test_an_action_has_one_hash_in_all_workflows():
    used = {}
    for path in WORKFLOWS:
        for name, version in re.findall(r"uses: (\S+)@(.+)", path.read_text(encoding="utf-8")):
            used.setdefault(name, set()).add(version)
    assert all(len(versions) == 1 for versions in used.values()), used


def test_the_nightly_run_looks_for_new_examples():
    """By a profile that conftest.py registers."""
    nightly = (REPOSITORY / ".github/workflows/nightly.yml").read_text(encoding="utf-8")
    names = set(re.findall(r"HYPOTHESIS_PROFILE: (\S+)", nightly))
    assert names and not any(hypothesis.settings.get_profile(name).derandomize for name in names)


def test_pythons_that_are_promised_are_tested():
    matrix = yaml.safe_load((REPOSITORY / ".github/workflows/test.yml").read_text(encoding="utf-8"))
    tested = matrix["jobs"]["test"]["strategy"]["matrix"]["python"]
    said = [name.rpartition(" ")[2] for name in project()["classifiers"] if re.search(r"3\.\d+$", name)]
    assert said[0] == tested[0] == project()["requires-python"].removeprefix(">=")
    assert said[-1] == tested[-1]


def test_the_changelog_has_the_version_that_the_package_has():
    headings = re.findall(
        r"^## (.+)$", (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert headings[0] == "Unreleased"
    assert headings[1] == f"{project()['version']} · {citation['date-released']}"


def test_hooks_call_modules_that_there_are():
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]
    for hook in hooks["hooks"]:
        module = hook["entry"].split()[2]
        place = REPOSITORY.joinpath(*module.split("."))
        assert module == "ruff" or place.with_suffix(".py").is_file()


@pytest.mark.parametrize("path", sorted((REPOSITORY / ".github" / "ISSUE_TEMPLATE").glob("[0-9]*.yml")))
def test_issue_templates_ask_something(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= set(form)
    assert any(part.get("validations", {}).get("required") for part in form["body"])
