"""A machine's ranks restoring as they do in a job: each asks for what it needs, reads it, verifies it."""

from collections.abc import Callable, Sequence

from dtrain.agent.transfer_fetch import Fetcher
from dtrain.agent.transferring import Demand, Fetch, Fetched, FetchFailed, Supplied, TransferReport
from dtrain.protocol.ids import Rank
from dtrain.protocol.ranklink import ChunkSpan, Have, Need, RestorePlan
from dtrain.trainer.checkpoint.source import DemandSource
from tests.corruption import making
from tests.corruption.making import Uploads


class Bad(Exception):
    """The transfer process says that the checkpoint is damaged; the attempt would end."""

    def __init__(self, report: FetchFailed) -> None:
        super().__init__(report.message)
        self.report = report


class Desk:
    """The agent between one rank and the transfer process.

    ``between`` runs after the rank was told where to look.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        fetch_id: str,
        rank: int,
        reports: list[TransferReport],
        between: Callable[[], None],
    ) -> None:
        self._fetcher = fetcher
        self._id = fetch_id
        self._rank = rank
        self._reports = reports
        self._between = between
        self._number = 0

    def ask(
        self,
        token: str,
        chunks: Sequence[ChunkSpan],
        *,
        whole: bool = False,
        again: bool = False,
        unverified: bool = False,
    ) -> Have | None:
        self._number += 1
        need = Need(token, self._number, tuple(chunks), whole, again, unverified)
        self._reports.clear()
        self._fetcher.demand(Demand(self._id, Rank(self._rank), need))
        for report in list(self._reports):
            if isinstance(report, FetchFailed):
                raise Bad(report)
            if isinstance(report, Supplied):
                if not again:
                    self._between()
                return report.have
        return None

    def await_other_plan(self, token: str, at_most_s: float) -> RestorePlan | None:
        return None


def restored(
    fetcher: Fetcher,
    reports: list[TransferReport],
    order: Fetch,
    uploads: Uploads,
    *,
    between: Callable[[], None] = lambda: None,
) -> FetchFailed | list[int]:
    """Restore every rank; those that hold something else than they saved, or what was said to be damaged.

    ``reports`` is where ``fetcher`` puts its own.
    """
    fetcher.run(order)
    first = next(report for report in reports if isinstance(report, Fetched | FetchFailed))
    if isinstance(first, FetchFailed):
        return first
    wrong = []
    try:
        for rank in range(uploads.world):
            desk = Desk(fetcher, order.id, rank, reports, between)
            try:
                if not making.restores_right(DemandSource(first.plan, desk), uploads, rank):
                    wrong.append(rank)
            except Exception as error:
                found = _cause(error)
                if found is None:
                    raise
                return found.report
    finally:
        fetcher.release(order.id)()
    return wrong


def _cause(error: BaseException | None) -> Bad | None:
    while error is not None and not isinstance(error, Bad):
        error = error.__cause__ or error.__context__
    return error
