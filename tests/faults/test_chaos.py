"""Three seeds of chaos.py; `python -m tests.faults.chaos --seeds=100` is the long form."""

import pytest

from tests.faults import chaos
from tests.faults.conftest import Seen


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chaos")
    of_the_run = chaos.flags(folder, num_steps=400)
    return of_the_run, chaos.undisturbed(folder, of_the_run)


@pytest.mark.parametrize("seed", [0, 1])
def test_disturbed_and_made_of_other_devices_at_every_start_a_job_ends_with_the_same_bits(
    seed, straight, table, tmp_path
):
    of_the_run, expected = straight
    ended = chaos.disturbed(tmp_path / "run", of_the_run, seed)
    equal = ended.digest == expected
    table.append(Seen(f"chaos, seed {seed}: {' '.join(ended.starts)}", len(ended.disturbed), "-", str(equal)))
    assert equal, ended
