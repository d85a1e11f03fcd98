"""What a run says of itself at its beginning."""

from types import SimpleNamespace

import numpy as np
import pytest

from charlstm.config import Config
from charlstm.run import announce
from data_pipeline.vocabulary import Vocabulary


@pytest.mark.parametrize(("platform", "reduction"), [("cpu", "exact"), ("gpu", "exact"), ("gpu", "fast")])
def test_a_run_says_where_equal_bits_were_not_seen(platform, reduction):
    device = SimpleNamespace(platform=platform, process_index=0, device_kind=platform)
    run = SimpleNamespace(
        config=Config(reduction=reduction),
        plan=SimpleNamespace(steps_per_epoch=10, symbols=1000),
        corpus=SimpleNamespace(name="text", sources=SimpleNamespace(bytes=10, files=1), vocabulary=Vocabulary("bytes")),
        mesh=SimpleNamespace(devices=np.array([device]), size=1),
    )
    said = [line for line in announce.beginning(run, 0) if "equal bits" in line]
    assert len(said) == (platform == "gpu" and reduction == "exact")
