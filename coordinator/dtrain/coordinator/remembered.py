"""Forms of checkpoints that this replica remembers: in memory only, bounded, and never needed.

A replica that has just become leader knows none, and comes to the same verdicts a little slower.
"""

import threading
from collections import OrderedDict

from dtrain.coordinator.core.forms import Form

FORMS_BYTES_MAX = 64 * 1024 * 1024
"""Of all jobs together; the one that saved longest ago is forgotten first."""

_Key = tuple[str, str, str]
_NOTHING = Form()


class Forms:
    """The form of the last checkpoint of each job. Safe for several threads."""

    def __init__(self, bytes_max: int = FORMS_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._lock = threading.Lock()
        self._forms: OrderedDict[_Key, Form] = OrderedDict()
        self._bytes = 0

    def get(self, job: _Key) -> Form:
        """Return what is remembered of ``job``: an empty form, perhaps."""
        with self._lock:
            return self._forms.get(job, _NOTHING)

    def put(self, job: _Key, form: Form) -> None:
        """Remember ``form`` instead of what was remembered of ``job``; nothing if it is too large."""
        with self._lock:
            before = self._forms.pop(job, None)
            if before is not None:
                self._bytes -= before.size_bytes
            if form.size_bytes > self._bytes_max:
                return
            self._forms[job] = form
            self._bytes += form.size_bytes
            while self._bytes > self._bytes_max:
                _, oldest = self._forms.popitem(last=False)
                self._bytes -= oldest.size_bytes
