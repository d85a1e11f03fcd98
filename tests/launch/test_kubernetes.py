"""The recipes for Kubernetes, held to its published schemas, unknown fields refused."""

from pathlib import Path
from typing import Any

import pytest

validation = pytest.importorskip("kubernetes_validate", reason="Kubernetes' schemas are not installed (extra dev)")
yaml = pytest.importorskip("yaml", reason="PyYAML is not installed (extra dev)")

RECIPES = sorted((Path(__file__).resolve().parents[2] / "launch/kubernetes").glob("*.yaml"))


def objects(path: Path) -> list[dict[str, Any]]:
    """The objects of a recipe; a JobSet, whose schema is not Kubernetes' own, as the Jobs that it makes."""
    found = []
    for read in yaml.safe_load_all(path.read_text("utf-8")):
        if read["kind"] == "JobSet":
            templates = [job["template"] for job in read["spec"]["replicatedJobs"]]
            found += [{"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "one"}} | t for t in templates]
        else:
            found.append(read)
    return found


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_what_kubernetes_reads(path):
    for each in objects(path):
        validation.validate(each, validation.latest_version(), strict=True)


def test_a_field_that_kubernetes_does_not_know_is_found():
    job = next(each for each in objects(RECIPES[0]) if each["kind"] == "Job")
    job["spec"]["template"]["spec"]["containers"][0]["resource"] = {}
    with pytest.raises(validation.ValidationError):
        validation.validate(job, validation.latest_version(), strict=True)
