"""The state of a text in the hands of a client: base64 that only the same model takes back.

    digest of the model [16 bytes]   symbols drawn so far, uint32   number of the text, uint32
    bytes pending, uint8 + 3 bytes   last symbols, int32 [K]        h and c of every layer, float32
    CRC-32 of all before, uint32     all little-endian

It is data: nothing of it is executed, and its size is known before it is read.
"""

import base64
import binascii
import struct
import zlib
from typing import NamedTuple

import jax
import numpy as np

from charlstm.inference.generate import Beginning
from charlstm.model import language_model
from charlstm.serving.texts import Loaded
from data_pipeline.batch import looks_back

MOST_DRAWN = 1 << 30  # symbols of a text: noise is counted in int32
JOINT = struct.Struct("<IIB3s")


class Joint(NamedTuple):
    """The place at which a text was interrupted.

    Attributes:
      drawn: symbols so far, by which its noise goes on.
      number: by which its noise is told from that of the other texts with its seed.
      pending: the beginning of a UTF-8 sequence, of which nothing was shown yet.
    """

    drawn: int = 0
    number: int = 0
    pending: bytes = b""


def pack(model: Loaded, beginning: Beginning, joint: Joint) -> str:
    """Returns the state as base64."""
    leaves = [np.asarray(leaf, "<f4").tobytes() for leaf in jax.tree.leaves(beginning.state)]
    packed = JOINT.pack(joint.drawn, joint.number, len(joint.pending), joint.pending)
    content = model.digest + packed + np.asarray(beginning.last_K, "<i4").tobytes() + b"".join(leaves)
    return base64.b64encode(content + struct.pack("<I", zlib.crc32(content))).decode()


def unpack(model: Loaded, text: str) -> tuple[Beginning, Joint]:
    """Returns what a text goes on from, and where it was interrupted.

    Raises:
      ValueError: it is not a state, is damaged, or is of another model.
    """
    like = jax.eval_shape(lambda: language_model.zero_state(model.config, 1))
    leaves, tree = jax.tree.flatten(like)
    K, digest = looks_back(model.separator) + 1, len(model.digest)
    size = digest + JOINT.size + 4 * K + sum(4 * leaf.size for leaf in leaves) + 4
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("state is not base64: give it as the answer had it") from None
    if content[:digest] != model.digest:
        raise ValueError("state is of another model or checkpoint: begin the text anew")
    if len(content) != size:
        raise ValueError(f"state has {len(content)} bytes, and {size} are those of this model: give it whole")
    if struct.unpack("<I", content[-4:])[0] != zlib.crc32(content[:-4]):
        raise ValueError("state is damaged: its CRC differs")
    drawn, number, pending, three = JOINT.unpack_from(content, digest)
    joint = Joint(drawn, number, three[:pending])
    last_K = np.frombuffer(content, "<i4", K, digest + JOINT.size).astype(np.int32)
    arrays, place = [], digest + JOINT.size + 4 * K
    for leaf in leaves:
        arrays.append(np.frombuffer(content, "<f4", leaf.size, place).reshape(leaf.shape).astype(np.float32))
        place += 4 * leaf.size
    in_range = (last_K >= -1).all() and (last_K < model.vocabulary.size).all() and last_K[-1] >= 0
    in_range = in_range and drawn <= MOST_DRAWN and number < MOST_DRAWN and _is_pending(model, joint.pending)
    if not (in_range and all(np.isfinite(array).all() for array in arrays)):
        raise ValueError("state has values that no text leads to")
    return Beginning(jax.tree.unflatten(tree, arrays), last_K), joint


def _is_pending(model: Loaded, pending: bytes) -> bool:
    """Returns whether bytes are the beginning of one UTF-8 sequence, or none."""
    if not pending:
        return True
    decoder = model.vocabulary.decoder()
    is_possible = model.vocabulary.kind == "bytes"
    return is_possible and not decoder.feed(np.frombuffer(pending, np.uint8)) and decoder.pending == pending
