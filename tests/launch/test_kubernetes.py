"""The recipes for Kubernetes, checked against its published schemas and JobSet's, unknown fields refused."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed (extra dev)")

Object = dict[str, Any]
RECIPES = sorted((Path(__file__).resolve().parents[2] / "launch/kubernetes").glob("*.yaml"))


def objects(path: Path) -> list[Object]:
    """The objects of a recipe as it has them."""
    return list(yaml.safe_load_all(path.read_text("utf-8")))


def expanded(path: Path) -> list[Object]:
    """The objects of a recipe, with each JobSet, which is not of Kubernetes itself, as the Jobs that it makes."""
    found = []
    for read in objects(path):
        if read["kind"] == "JobSet":
            templates = [job["template"] for job in read["spec"]["replicatedJobs"]]
            found += [{"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "one"}} | t for t in templates]
        else:
            found.append(read)
    return found


@pytest.fixture
def validation() -> Any:
    return pytest.importorskip("kubernetes_validate", reason="Kubernetes' schemas are not installed (extra dev)")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_what_kubernetes_reads(path, validation):
    for each in expanded(path):
        validation.validate(each, validation.latest_version(), strict=True)


def test_a_field_that_kubernetes_does_not_know_is_found(validation):
    job = next(each for each in expanded(RECIPES[0]) if each["kind"] == "Job")
    job["spec"]["template"]["spec"]["containers"][0]["resource"] = {}
    with pytest.raises(validation.ValidationError):
        validation.validate(job, validation.latest_version(), strict=True)


@pytest.fixture
def as_read() -> Callable[[Object], Object]:
    """Returns a JobSet as its schema reads it, without the fields that it does not know; raises where one is wrong."""
    name = "kubeflow_trainer_api.models.jobset_v1alpha2_job_set"
    module = pytest.importorskip(name, reason="JobSet's schema is not installed (extra dev: kubeflow-trainer-api)")
    return lambda given: module.JobsetV1alpha2JobSet.from_dict(given).to_dict()


def job_set() -> Object:
    [found] = [each for path in RECIPES for each in objects(path) if each["kind"] == "JobSet"]
    assert found["apiVersion"] == "jobset.x-k8s.io/v1alpha2"  # the version of the schema
    return found


def test_the_job_set_has_only_fields_that_job_set_reads(as_read):
    assert as_read(job_set()) == job_set()


@pytest.mark.parametrize(
    "place",
    [
        ["spec", "failurePolicy"],
        ["spec", "failurePolicy", "rules", 0],
        ["spec", "replicatedJobs", 0],
        ["spec", "replicatedJobs", 0, "template", "spec", "podFailurePolicy", "rules", 0],
    ],
    ids=lambda place: str(place[-2] if isinstance(place[-1], int) else place[-1]),
)
def test_a_misspelt_field_of_the_job_set_is_found(place, as_read):
    for name in within(job_set(), place):
        misspelt = copy.deepcopy(job_set())
        fields = within(misspelt, place)
        fields[f"{name}s"] = fields.pop(name)
        try:
            found = as_read(misspelt)
        except ValueError:  # one that must be there is missing
            continue
        assert found != misspelt, name


def within(each: Any, place: list[str | int]) -> Any:
    for step in place:
        each = each[step]
    return each
