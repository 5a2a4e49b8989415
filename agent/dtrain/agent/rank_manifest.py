"""A rank's manifest, from the JSON that the rank itself left behind its snapshot.

That JSON is not read here: it has the names and fields of ``RankManifest`` already, and for
thousands of tensors reading and writing it again would cost more than storing their bytes. The
leader reads it before anything is committed, and refuses one that is malformed, repeats a field of
ours, or does not fit its blobs.
"""

import gzip

from dtrain.protocol import codec
from dtrain.protocol.checkpoint import RankManifest
from dtrain.protocol.errors import ErrorCode, Refused

_LEVEL = 4
"""As small as 9 for such text, at a tenth of the time."""


def encode(head: RankManifest, index: bytes) -> bytes:
    """The manifest as the store keeps it: ``head`` with the fields of ``index`` added, gzipped.

    ``head`` has no tensors, no objects and no layout. The same arguments always give the same bytes.

    Raises:
        Refused: BAD_RECORD; ``index`` cannot be a JSON object.
    """
    if index[:1] != b"{" or index[-1:] != b"}" or len(index) < 3:
        raise Refused(ErrorCode.BAD_RECORD, f"the snapshot of rank {head.rank} has no readable index")
    text = codec.canonical(codec.to_json(head))
    # Without a time in it, so that a repeated upload is the same blob.
    return gzip.compress(text[:-1] + b"," + index[1:], compresslevel=_LEVEL, mtime=0)
