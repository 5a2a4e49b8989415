"""Reads a cluster's whole history out of etcd and replays it through the auditor."""

import itertools

from dtrain.protocol.audit import Auditor, Change
from dtrain.protocol.ids import ClusterName
from dtrain.protocol.keys import Keys
from dtrain.storage.etcd.port import Etcd, prefix_end


def audit(etcd: Etcd, cluster: ClusterName) -> Auditor:
    """Replay everything since revision 1; etcd must not have been compacted."""
    auditor = Auditor(cluster)
    keys = Keys(cluster)
    end = etcd.range(keys.root, prefix_end(keys.root), limit=1).revision
    stream = etcd.watch(keys.root, prefix_end(keys.root), 1)
    try:
        reached = 0
        while reached < end:
            batch = stream.next(10.0)
            assert batch is not None, f"the history ends at {reached}, before {end}"
            for revision, events in itertools.groupby(batch.events, key=lambda event: event.kv.mod_revision):
                changes = [
                    Change(e.kv.key, None if e.kind == "delete" else e.kv.value, e.kv.create_revision)
                    for e in events
                ]
                auditor.feed(revision, changes)
            reached = max(reached, batch.revision)
    finally:
        stream.close()
    return auditor
