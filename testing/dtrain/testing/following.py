"""The auditor attached to a running cluster: the code of ``dtrain audit``, in a thread."""

import threading
from collections.abc import Sequence

from dtrain.cli.auditing import RETRY_S, Replay
from dtrain.protocol.audit import Auditor, Violation
from dtrain.protocol.errors import DtrainError
from dtrain.protocol.ids import ClusterName
from dtrain.storage.etcd.transport import GatewayEtcd


class Following:
    """Audits a cluster from now until ``close``, through every loss of etcd.

    It sees each revision when it happens: what is compacted later was judged.
    """

    def __init__(
        self, endpoints: Sequence[str], cluster: ClusterName, etcd: GatewayEtcd | None = None
    ) -> None:
        self.auditor = Auditor(cluster)
        self._etcd = etcd or GatewayEtcd(endpoints)
        self._replay = Replay(self._etcd, cluster, self.auditor)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._died: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="auditor", daemon=True)
        self._thread.start()

    def violations(self) -> list[Violation]:
        """What has been found so far.

        Raises:
            AssertionError: the auditor itself has failed.
        """
        if self._died is not None:
            raise AssertionError("the auditor died") from self._died
        return list(self.auditor.violations)

    def catch_up(self, limit_s: float = 30.0) -> None:
        """Return once everything that is in etcd now has been judged.

        Raises:
            TimedOut, Refused, Unavailable: etcd cannot be read.
        """
        with self._lock:
            self._replay.catch_up(limit_s)

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join(30.0)
        self._replay.close()
        self._etcd.close()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                try:
                    with self._lock:
                        self._replay.step(0.1)
                except DtrainError:
                    # etcd is away, or a test takes permissions, or its identity, from whoever asks.
                    self._stop.wait(RETRY_S)
                # Whoever wants to catch up gets the lock in between.
                self._stop.wait(0.01)
        except BaseException as error:  # noqa: BLE001 - told by the next look
            self._died = error
