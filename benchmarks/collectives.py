"""What the compiled training step communicates: `python -m benchmarks.collectives SHAPE DEVICES`, in json."""

import json
import re
import sys
from typing import Any

import numpy as np

from benchmarks.peers.ours import config_of
from benchmarks.shapes import Shape
from charlstm import config as config_lib
from charlstm import distributed
from charlstm.training import step as step_lib
from charlstm.training import train_state
from data_pipeline.batch import Batch

NAMES = ("all-reduce", "all-to-all", "all-gather", "reduce-scatter", "collective-permute")
BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u8": 1, "pred": 1}


def in_program(text: str) -> dict[str, Any]:
    """The collectives of a compiled program: how many, in loops of it, and the bytes of what they result in."""
    found = re.findall(rf" = (.*?) ({'|'.join(NAMES)})(?:-start)?\(", text)
    in_entry = re.findall(rf" = .*? (?:{'|'.join(NAMES)})(?:-start)?\(", text[text.index("\nENTRY ") :])
    arrays = [array for shape, _ in found for array in re.findall(r"(\w+)\[([\d,]*)\]", shape)]
    return {
        "collectives": {name: count for name in NAMES if (count := sum(name == n for _, n in found))},
        "collectives_in_loops": len(found) - len(in_entry),
        "bytes": sum(BYTES[kind] * int(np.prod([int(n) for n in sizes.split(",") if n])) for kind, sizes in arrays),
    }


def of_step(shape: Shape, devices: int, reduction: str) -> dict[str, Any]:
    """Those of an update on the first `devices` devices."""
    mesh = distributed.make(list(distributed.make().devices.flat[:devices]))
    config = config_lib.fill_automatic(config_of(shape, reduction=reduction), devices)
    ids = np.zeros((shape.B, shape.T), np.uint8)
    batch = distributed.abstract(mesh, distributed.BY_STREAM, Batch(ids, ids, ids.astype(bool)))
    lowered = step_lib.make(config, shape.V, mesh, 1000).lower(train_state.abstract(config, shape.V, mesh), batch)
    program = lowered.compile().as_text()
    assert program is not None
    return in_program(program)


if __name__ == "__main__":
    own, counts = Shape(**json.loads(sys.argv[1])), json.loads(sys.argv[2])
    print(json.dumps({f"{n} {how}": of_step(own, n, how) for n in counts for how in ("exact", "fast")}))
