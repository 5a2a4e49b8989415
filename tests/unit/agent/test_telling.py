"""What an agent logs of its changes leads to their causes."""

from dtrain.agent import telling
from dtrain.agent.core.state import AgentState
from dtrain.protocol.ids import JobName

from .core_builder import Table


def told(before: AgentState, after: AgentState) -> dict[str, dict[str, object]]:
    return dict(telling.changes(before, after, 1.0))


def test_a_change_of_phase_names_the_command_and_the_term_that_caused_it() -> None:
    table = Table()
    before = table.state
    prepare = table.prepare()
    table.command(prepare)
    fields = told(before, table.state)["phase"]
    head = prepare.header
    assert (fields["job"], fields["attempt"], fields["term"]) == (head.job, head.attempt, head.term)
    assert fields["cause"] == head.id
    assert not told(table.state, table.state)


def test_a_released_job_is_told_of_once() -> None:
    table = Table()
    table.command(table.prepare())
    gone = AgentState(table.state.machine, table.state.incarnation, table.state.term)
    assert told(table.state, gone)["job released"]["job"] == JobName(table.prepare().header.job)
