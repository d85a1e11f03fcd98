"""What pyproject.toml allows is what requirements.lock has, and so what is tested."""

import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.jobs import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
USED = ("cuda12", "cuda13", "tune", "monitor", "serve")  # by the programs
NEEDED = [Requirement(line) for lines in (PROJECT["dependencies"], *map(EXTRAS.get, USED)) for line in lines]
ALL = NEEDED + [Requirement(line) for name in ("dev", "notebooks") for line in EXTRAS[name]]


def locked() -> dict[str, list[Version]]:
    """The versions of each package in the lock, which may be others for other Pythons."""
    found: dict[str, list[Version]] = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        name, _, version = line.partition(";")[0].strip().partition("==")
        found.setdefault(name, []).append(Version(version))
    return found


@pytest.mark.parametrize("requirement", ALL, ids=str)
def test_the_lock_has_what_is_allowed(requirement):
    if requirement.name != "charlstm":  # its own extras
        assert all(version in requirement.specifier for version in locked()[requirement.name])


@pytest.mark.parametrize("requirement", NEEDED, ids=str)
def test_what_is_older_or_newer_than_what_is_tested_is_not_allowed(requirement):
    versions, allowed = sorted(locked()[requirement.name]), requirement.specifier
    series = 2 if versions[-1].major == 0 else 1  # of 0.x, each minor version may change all
    next_series = [*versions[-1].release[: series - 1], versions[-1].release[series - 1] + 1]
    assert Version(".".join(map(str, next_series))) not in allowed, "has no upper bound"
    least = next(Version(part.version) for part in allowed if part.operator == ">=")
    assert least.release[0] == versions[0].release[0] and least <= versions[0]
    assert len(least.release) < 2 or least.release[:2] == versions[0].release[:2]


def test_a_commit_is_looked_at_by_the_linter_of_the_lock():
    assert f"rev: v{locked()['ruff'][0]}\n" in (ROOT / ".pre-commit-config.yaml").read_text()


def test_the_citation_is_of_this_version_and_licence():
    lines = (ROOT / "CITATION.cff").read_text().splitlines()
    assert {f"version: {PROJECT['version']}", f"license: {PROJECT['license']}"} <= set(lines)
