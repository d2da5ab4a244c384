"""What TensorBoard shows of a folder of event files."""

import struct

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c


def records(path):
    """The events of a file, whose lengths and checksums have to be right.

    Like TensorBoard, it ends at one that is cut off because its process was killed.
    """
    data = path.read_bytes()
    while len(data) >= 12:
        (length,) = struct.unpack("<Q", data[:8])
        body, rest = data[12 : 12 + length], data[12 + length :]
        if len(rest) < 4:
            return
        assert struct.unpack("<I", data[8:12]) == (masked_crc32c(data[:8]),)
        assert struct.unpack("<I", rest[:4]) == (masked_crc32c(body),)
        yield Event.FromString(body)
        data = rest[4:]


def shown(folder):
    """The step, name and value of each scalar: a start drops what is at its step and later.

    Files are read in the order of their names.
    """
    found = []
    for path in sorted(folder.iterdir()):
        for number, event in enumerate(records(path)):
            assert number or event.file_version == "brain.Event:2"
            if event.session_log.status == SessionLog.START:
                found = [own for own in found if own[0] < event.step]
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    return found
