"""WhatsApp's protobuf modules, taken from neonize without loading its Go library.

The switch is put back afterwards, so that children started by this process load the real library.
"""

from __future__ import annotations

import os

_before = os.environ.get("SPHINX")
os.environ["SPHINX"] = "1"  # neonize's own switch: protobufs only
try:
    from neonize.proto.waAdv import WAAdv_pb2 as adv
    from neonize.proto.waCert import WACert_pb2 as cert
    from neonize.proto.waE2E import WAWebProtobufsE2E_pb2 as e2e
    from neonize.proto.waHistorySync import WAWebProtobufsHistorySync_pb2 as history
    from neonize.proto.waMmsRetry import WAMmsRetry_pb2 as mms_retry
    from neonize.proto.waWa6 import WAWebProtobufsWa6_pb2 as wa6
    from neonize.proto.waWeb import WAWebProtobufsWeb_pb2 as web
finally:
    if _before is None:
        del os.environ["SPHINX"]
    else:
        os.environ["SPHINX"] = _before

__all__ = ["adv", "cert", "e2e", "history", "mms_retry", "wa6", "web"]
