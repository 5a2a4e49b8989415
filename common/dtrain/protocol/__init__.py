"""The contract between dtrain's processes: values, keys, codec and errors.

Pure data on the standard library. Nothing here opens a socket or a file,
reads a clock or imports another dtrain package, so that the training SDK can
import it inside a user's process. ``wire`` alone touches protobuf.

Read ``job.py`` first, then ``snapshot.py`` (what comes up from an agent),
``commands.py`` (what goes down to it) and ``keys.py`` (where records live).
"""
