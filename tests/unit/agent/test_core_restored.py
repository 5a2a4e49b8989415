"""An etcd that was restored from a backup, as an agent sees it: lower terms, numbers that come again."""

import dataclasses

from dtrain.agent.core.decisions import PublishHealth
from dtrain.agent.core.events import CommandArrived, EtcdWentBack
from dtrain.protocol.commands import Command
from dtrain.protocol.ids import Term
from dtrain.protocol.ranklink import Begin

from .core_builder import Table


def of_term(command: Command, term: int, name: str = "") -> Command:
    header = dataclasses.replace(command.header, term=Term(term), id=name or command.header.id)
    return dataclasses.replace(command, header=header)


def test_a_checkpoint_number_is_over_for_good_once_its_outcome_is_known_or_its_attempt_ended() -> None:
    table = Table().training()
    table.command(table.begin(1))
    table.command(table.confirm(1))
    assert table.snapshot.seq_over == 1
    table.command(table.begin(2))
    assert table.snapshot.seq_over == 1
    table.command(table.prepare(2))
    assert table.snapshot.seq_over == 2


def test_a_number_that_etcd_gives_out_again_is_not_taken_on() -> None:
    table = Table().training()
    table.command(table.begin(3))
    table.command(table.abort(3))
    table.command(dataclasses.replace(table.begin(2), nonce="another"))
    assert not table.messages(Begin)
    assert table.snapshot.saving == ()
    assert table.snapshot.seq_over == 3


def test_an_agent_says_so_when_etcds_leader_has_a_lower_term_than_it_has_obeyed() -> None:
    table = Table().training()
    table.command(of_term(table.begin(1), 9))
    decision = table.feed(EtcdWentBack(Term(4), Term(9)))
    [told] = [action for action in decision.actions if isinstance(action, PublishHealth)]
    assert "obeys nobody" in told.problem
    assert "4" in told.problem
    decision = table.feed(CommandArrived(of_term(table.begin(2), 4), False))
    assert decision.answer is not None
    assert not decision.answer.accepted
    # Terms that were raised above all that were obeyed need no word of anybody.
    decision = table.feed(CommandArrived(of_term(table.begin(2), 1_000_000_004), True))
    assert PublishHealth("") in decision.actions
    assert decision.answer is not None
    assert decision.answer.accepted


def test_news_of_a_lower_term_that_a_newer_one_has_overtaken_is_no_news() -> None:
    table = Table().training()
    table.command(of_term(table.begin(1), 9))
    table.feed(EtcdWentBack(Term(1), Term(4)))
    assert not table.state.refused_term


def test_prepare_with_a_number_of_another_attempt_is_refused() -> None:
    table = Table().training(2)
    pids = [rank.pid for rank in table.snapshot.ranks]
    prepare = table.prepare(2)
    decision = table.command(prepare)
    assert decision.answer is not None
    assert decision.answer.accepted, "asked again by another leader"
    other = dataclasses.replace(prepare, world_size=prepare.world_size + 2, nnodes=prepare.nnodes + 1)
    decision = table.command(other)
    assert decision.answer is not None
    assert not decision.answer.accepted
    assert [rank.pid for rank in table.snapshot.ranks] == pids
