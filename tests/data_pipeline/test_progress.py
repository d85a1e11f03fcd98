"""Long work is announced, short work is not."""

import time

from data_pipeline.progress import announced


def test_what_takes_long_is_said_when_it_does_and_when_it_has_ended(capsys):
    with announced("waiting", seconds=0.01):
        while not (said := capsys.readouterr().err):
            time.sleep(0.01)
    assert said == "waiting ...\n"
    assert capsys.readouterr().err.startswith("waiting: ")


def test_what_is_short_is_not_announced(capsys):
    with announced("waiting", seconds=3600):
        pass
    assert capsys.readouterr().err == ""
