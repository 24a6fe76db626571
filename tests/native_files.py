"""Files of loggers' own formats, made byte by byte, and what every reader of them promises."""

import struct
import zlib

import numpy as np

from intaglio.history.foreign import History


def is_history(history: History) -> bool:
    """Whether what a reader gave keeps the promises of ``History``."""
    assert history.name
    assert history.axis
    assert all(notice.endswith(".") for notice in history.notices)
    for series in history.given.values():
        assert series.steps.dtype == np.int64
        assert series.values.dtype == np.float64
        assert len(series.steps) == len(series.values) > 0
        assert (np.diff(series.steps) > 0).all()
    return bool(history.given)


def record(data: bytes) -> bytes:
    """One record of a TFRecord file."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    head = struct.pack("<Q", len(data))
    return head + struct.pack("<I", masked_crc32c(head)) + data + struct.pack("<I", masked_crc32c(data))


def events(rows: int) -> tuple[bytes, list[int]]:
    """An event file, and where each of its records begins."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    data, ends = b"", []
    for step in range(rows):
        ends.append(len(data))
        value = Summary.Value(tag="loss", simple_value=1 / (step + 1))
        data += record(Event(step=step, summary=Summary(value=[value])).SerializeToString())
    return data, ends


def framed(records: list[bytes]) -> bytes:
    """A ``.wandb`` file of records."""
    data = bytearray(b":W&B\xe1\xbe\x00")
    for rest in records:
        kind = 1
        while True:
            room = -len(data) % 32768
            if room < 7:
                data += bytes(room)
                room = 32768
            piece, rest = rest[: room - 7], rest[room - 7 :]
            kind = {1: 1, 3: 4}[kind] if not rest else {1: 2, 3: 3}[kind]
            data += struct.pack("<IHB", zlib.crc32(bytes([kind]) + piece), len(piece), kind) + piece
            kind = 3
            if not rest:
                break
    return bytes(data)
