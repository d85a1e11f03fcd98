"""What a run says of itself at its beginning."""

from types import SimpleNamespace

import numpy as np
import pytest

from charlstm import config as config_lib
from charlstm.config import Config
from charlstm.run import announce
from data_pipeline.vocabulary import Vocabulary


def said(platform: str, named: str, **settings: object) -> int:
    """How many lines at the beginning of a run on one device name `named`."""
    device = SimpleNamespace(platform=platform, process_index=0, device_kind=platform)
    run = SimpleNamespace(
        config=config_lib.replace(Config(), **settings),
        plan=SimpleNamespace(steps_per_epoch=10, symbols=1000),
        corpus=SimpleNamespace(name="text", sources=SimpleNamespace(bytes=10, files=1), vocabulary=Vocabulary("bytes")),
        mesh=SimpleNamespace(devices=np.array([device]), size=1),
    )
    return sum(named in line for line in announce.beginning(run, 0))


@pytest.mark.parametrize(("platform", "reduction"), [("cpu", "exact"), ("gpu", "exact"), ("gpu", "fast")])
def test_a_run_says_where_equal_bits_were_not_seen(platform, reduction):
    assert said(platform, "equal bits", reduction=reduction) == (platform == "gpu" and reduction == "exact")


@pytest.mark.parametrize("settings", [{}, {"tf32": False}, {"compute_dtype": "bfloat16"}])
def test_a_run_says_where_float32_may_be_tf32(settings):
    assert said("gpu", "TF32", **settings) == (not settings) and not said("cpu", "TF32", **settings)
