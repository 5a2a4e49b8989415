"""Who may call what over real TLS: the table, its completeness, and those who lie about themselves."""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest

from dtrain.cli.client import Client, closing
from dtrain.coordinator.core.decisions import Directed
from dtrain.coordinator.dispatch import REFUSED, Channels, Dispatcher
from dtrain.protocol import codec
from dtrain.protocol.errors import DtrainError, ErrorCode, Refused
from dtrain.protocol.ids import AgentName, JobName
from dtrain.protocol.job import Intent
from dtrain.protocol.pb import agent_pb2, coordinator_pb2
from dtrain.runtime import grpc_tls
from dtrain.runtime.grpc_errors import ERROR_KEY
from dtrain.runtime.tls import Role, parse_peer
from tests.security.services import KEYS, SPEC, STOP, Machine, Replica
from tests.support.certificates import Authority, authority


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def replica(ca: Authority) -> Iterator[Replica]:
    made = Replica(grpc_tls.Credentials(ca.issue("coordinator", "r1")))
    yield made
    made.close()


@pytest.fixture
def machine(ca: Authority, tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path, grpc_tls.Credentials(ca.issue("agent", "gpu-1")))
    yield made
    made.server.stop()


def to_replica(replica: Replica, ca: Authority, role: str, name: str, **more: Any) -> grpc.Channel:
    credentials = grpc_tls.Credentials(ca.issue(role, name, **more))
    # The name of the right cluster even where the certificate is of another one.
    return grpc_tls.open_channel(replica.server.address, "coordinator.c1.dtrain", credentials, ())


def to_machine(machine: Machine, ca: Authority, role: str, name: str, **more: Any) -> grpc.Channel:
    credentials = grpc_tls.Credentials(ca.issue(role, name, **more))
    return grpc_tls.open_channel(machine.address, "gpu-1.agent.c1.dtrain", credentials, ())


REQUESTS: dict[str, Any] = {
    "/dtrain.v1.Coordinator/Submit": coordinator_pb2.SubmitRequest(
        spec=json.dumps(SPEC).encode(), dry_run=True
    ),
    "/dtrain.v1.Coordinator/SetIntent": coordinator_pb2.SetIntentRequest(job="none"),
    "/dtrain.v1.Coordinator/Read": coordinator_pb2.ReadRequest(prefix="jobs/"),
    "/dtrain.v1.Coordinator/Changes": coordinator_pb2.ChangesRequest(prefixes=["jobs/"]),
    "/dtrain.v1.Coordinator/List": coordinator_pb2.ListRequest(kind="jobs"),
    "/dtrain.v1.Coordinator/ReadLog": coordinator_pb2.JobLogRequest(job="none"),
    "/dtrain.v1.Coordinator/ListLogs": coordinator_pb2.ListLogsRequest(job="none"),
    "/dtrain.v1.Coordinator/ReadArchive": coordinator_pb2.ReadArchiveRequest(job="none"),
    "/dtrain.v1.Coordinator/Info": coordinator_pb2.InfoRequest(),
    "/dtrain.v1.Coordinator/Consult": coordinator_pb2.ConsultRequest(agent="me"),
    "/dtrain.v1.Coordinator/PinCheckpoint": coordinator_pb2.PinCheckpointRequest(job="none", holder="me"),
    "/dtrain.v1.Coordinator/UnpinCheckpoint": coordinator_pb2.UnpinCheckpointRequest(job="none", holder="me"),
    "/dtrain.v1.Coordinator/DeleteCheckpoint": coordinator_pb2.DeleteCheckpointRequest(job="none", seq=1),
    "/dtrain.v1.Coordinator/ReportDamage": coordinator_pb2.ReportDamageRequest(job="none", seq=1),
    "/dtrain.v1.Coordinator/CollectGarbage": coordinator_pb2.CollectGarbageRequest(job="none"),
    "/dtrain.v1.Coordinator/ImportCheckpoint": coordinator_pb2.ImportCheckpointRequest(job="none", ttl_s=60),
    "/dtrain.v1.Coordinator/ReviewGarbage": coordinator_pb2.ReviewGarbageRequest(job="none"),
    "/dtrain.v1.Coordinator/Cordon": coordinator_pb2.CordonRequest(agent="none"),
    "/dtrain.v1.Coordinator/Uncordon": coordinator_pb2.UncordonRequest(agent="none"),
    "/dtrain.v1.Agent/Execute": agent_pb2.Command(header=agent_pb2.Header(cluster="c1")),
    "/dtrain.v1.Coordinator/Stacks": coordinator_pb2.JobStacksRequest(job="none"),
    "/dtrain.v1.Agent/Stacks": agent_pb2.StacksRequest(job="none", uid="u1"),
    "/dtrain.v1.Agent/Series": agent_pb2.SeriesRequest(job="none", uid="u1"),
    "/dtrain.v1.Coordinator/Series": coordinator_pb2.JobSeriesRequest(job="none"),
    "/dtrain.v1.Agent/ReadLog": agent_pb2.ReadLogRequest(job="none", uid="u1", stream="stdout"),
}
MAY = {
    "/dtrain.v1.Coordinator/Submit": {"operator"},
    "/dtrain.v1.Coordinator/SetIntent": {"operator", "coordinator"},
    "/dtrain.v1.Coordinator/Read": {"operator", "reader", "coordinator", "agent"},
    "/dtrain.v1.Coordinator/Changes": {"operator", "reader", "coordinator", "agent"},
    "/dtrain.v1.Coordinator/List": {"operator", "reader", "coordinator", "agent"},
    "/dtrain.v1.Coordinator/ReadLog": {"operator", "reader", "coordinator", "agent"},
    "/dtrain.v1.Coordinator/ListLogs": {"operator", "reader", "coordinator", "agent"},
    "/dtrain.v1.Coordinator/ReadArchive": {"operator", "reader", "coordinator", "agent"},
    "/dtrain.v1.Coordinator/Info": {"operator", "reader", "coordinator", "agent"},
    "/dtrain.v1.Coordinator/Consult": {"agent"},
    "/dtrain.v1.Coordinator/PinCheckpoint": {"operator"},
    "/dtrain.v1.Coordinator/UnpinCheckpoint": {"operator"},
    "/dtrain.v1.Coordinator/DeleteCheckpoint": {"operator"},
    "/dtrain.v1.Coordinator/ReportDamage": {"operator"},
    "/dtrain.v1.Coordinator/CollectGarbage": {"operator"},
    "/dtrain.v1.Coordinator/ImportCheckpoint": {"operator"},
    "/dtrain.v1.Coordinator/ReviewGarbage": {"operator"},
    "/dtrain.v1.Coordinator/Cordon": {"operator", "coordinator"},
    "/dtrain.v1.Coordinator/Uncordon": {"operator", "coordinator"},
    "/dtrain.v1.Agent/Execute": {"coordinator"},
    "/dtrain.v1.Coordinator/Stacks": {"operator"},
    "/dtrain.v1.Agent/Stacks": {"coordinator"},
    "/dtrain.v1.Agent/Series": {"coordinator"},
    "/dtrain.v1.Coordinator/Series": {"operator", "reader", "coordinator", "agent"},
    "/dtrain.v1.Agent/ReadLog": {"coordinator"},
}


def test_every_rpc_has_a_row_in_the_table_and_every_row_an_rpc() -> None:
    declared = {
        f"/{service.full_name}/{method.name}"
        for file in (agent_pb2, coordinator_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert set(grpc_tls.RULES) == declared
    assert {name: {role.value for role in rule.roles} for name, rule in grpc_tls.RULES.items()} == MAY


def code_of(channel: grpc.Channel, method: str, request: Any = None) -> tuple[grpc.StatusCode, str]:
    call = channel.unary_unary(method, request_serializer=lambda message: message.SerializeToString())
    try:
        call(request if request is not None else REQUESTS[method], timeout=30)
    except grpc.RpcError as error:
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


@pytest.mark.parametrize("role", [role.value for role in Role])
def test_each_role_may_do_what_the_table_says_and_nothing_else(
    role: str, replica: Replica, machine: Machine, ca: Authority
) -> None:
    with (
        to_replica(replica, ca, role, "me") as coordinator,
        to_machine(machine, ca, role, "me") as agent,
    ):
        for method, allowed in MAY.items():
            code, why = code_of(coordinator if "Coordinator" in method else agent, method)
            permitted = code is not grpc.StatusCode.PERMISSION_DENIED
            assert permitted == (role in allowed), f"{role} {method}: {code} {why}"
            if not permitted:
                assert f"{role} me may not call {method.rpartition('/')[2]}" in why
    assert machine.taken == []


def test_a_new_rpc_without_a_row_is_refused_with_and_without_tls(ca: Authority) -> None:
    handler = grpc.unary_unary_rpc_method_handler(lambda request, context: b"done")
    services = grpc.method_handlers_generic_handler("dtrain.v1.Agent", {"Shutdown": handler})
    credentials = grpc_tls.Credentials(ca.issue("coordinator", "r1"))
    from dtrain.agent.link import abort

    for tls in (None, credentials):
        server = grpc.server(futures.ThreadPoolExecutor(2), interceptors=[grpc_tls.Gate(tls, abort)])
        server.add_generic_rpc_handlers((services,))
        port = grpc_tls.bind(server, "127.0.0.1:0", tls)
        server.start()
        with grpc_tls.open_channel(f"127.0.0.1:{port}", "coordinator.c1.dtrain", tls, ()) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary("/dtrain.v1.Agent/Shutdown")(b"", timeout=30)
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        server.stop(0).wait()


def test_a_caller_without_a_certificate_gets_no_connection(
    replica: Replica, machine: Machine, ca: Authority
) -> None:
    anonymous = grpc.ssl_channel_credentials(ca.file.read_bytes())
    for address, name, method in (
        (replica.server.address, "coordinator.c1.dtrain", "/dtrain.v1.Coordinator/Info"),
        (machine.address, "gpu-1.agent.c1.dtrain", "/dtrain.v1.Agent/Execute"),
    ):
        options = (("grpc.ssl_target_name_override", name),)
        with grpc.secure_channel(address, anonymous, options) as channel:
            assert code_of(channel, method)[0] is grpc.StatusCode.UNAVAILABLE
        with grpc.insecure_channel(address) as channel:
            assert code_of(channel, method)[0] is grpc.StatusCode.UNAVAILABLE
    assert machine.taken == []


def test_a_certificate_of_another_authority_opens_nothing(
    replica: Replica, ca: Authority, tmp_path: Path
) -> None:
    stranger = authority(tmp_path / "other")
    files = stranger.issue("operator", "mallory")
    credentials = grpc.ssl_channel_credentials(
        ca.file.read_bytes(), Path(files.key).read_bytes(), Path(files.cert).read_bytes()
    )
    options = (("grpc.ssl_target_name_override", "coordinator.c1.dtrain"),)
    with grpc.secure_channel(replica.server.address, credentials, options) as channel:
        assert code_of(channel, "/dtrain.v1.Coordinator/Info")[0] is grpc.StatusCode.UNAVAILABLE


def test_an_expired_certificate_opens_nothing(replica: Replica, ca: Authority) -> None:
    with to_replica(replica, ca, "operator", "late", valid_s=-5.0) as channel:
        assert code_of(channel, "/dtrain.v1.Coordinator/Info")[0] is grpc.StatusCode.UNAVAILABLE


def test_a_coordinator_of_another_cluster_commands_nobody_here(
    machine: Machine, replica: Replica, ca: Authority
) -> None:
    with to_machine(machine, ca, "coordinator", "r1", cluster="c2", file="foreign") as channel:
        code, why = code_of(channel, "/dtrain.v1.Agent/Execute")
        assert (code, "is of cluster c2" in why) == (grpc.StatusCode.PERMISSION_DENIED, True)
    with to_replica(replica, ca, "operator", "ann", cluster="c2", file="foreign-ann") as channel:
        assert code_of(channel, "/dtrain.v1.Coordinator/Read")[0] is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize(
    "uris",
    [
        ("https://example.org/coordinator",),
        ("dtrain://c1/coordinator/r1", "dtrain://c1/operator/ann"),
        ("dtrain://c1/root/ann",),
        ("dtrain://c1/coordinator/r1/x",),
        ("dtrain://c1/coordinator/..",),
        ("DTRAIN://c1/coordinator/r1",),
    ],
)
def test_a_certificate_that_names_nobody_or_two_may_do_nothing(
    uris: tuple[str, ...], machine: Machine, ca: Authority
) -> None:
    files = ca.issue("coordinator", "r1", uris=uris, file="odd")
    credentials = grpc.ssl_channel_credentials(
        ca.file.read_bytes(), Path(files.key).read_bytes(), Path(files.cert).read_bytes()
    )
    options = (("grpc.ssl_target_name_override", "gpu-1.agent.c1.dtrain"),)
    with grpc.secure_channel(machine.address, credentials, options) as channel:
        assert code_of(channel, "/dtrain.v1.Agent/Execute")[0] is grpc.StatusCode.PERMISSION_DENIED
    with pytest.raises(DtrainError):
        grpc_tls.Credentials(files)


def test_a_name_in_the_dns_part_is_no_role(machine: Machine, ca: Authority) -> None:
    files = ca.issue("operator", "ann", dns=("dtrain.c1.coordinator.r1", "coordinator.c1.dtrain"))
    with grpc_tls.open_channel(
        machine.address, "gpu-1.agent.c1.dtrain", grpc_tls.Credentials(files), ()
    ) as channel:
        assert code_of(channel, "/dtrain.v1.Agent/Execute")[0] is grpc.StatusCode.PERMISSION_DENIED


def test_an_agent_may_consult_as_itself_only(replica: Replica, ca: Authority) -> None:
    with to_replica(replica, ca, "agent", "gpu-1") as channel:
        method = "/dtrain.v1.Coordinator/Consult"
        code, why = code_of(channel, method, coordinator_pb2.ConsultRequest(agent="gpu-2"))
        assert (code, why) == (
            grpc.StatusCode.PERMISSION_DENIED,
            "agent gpu-1 may call Consult for itself only",
        )
        code, _ = code_of(channel, method, coordinator_pb2.ConsultRequest(agent="gpu-1"))
        assert code is not grpc.StatusCode.PERMISSION_DENIED


def command(credentials: grpc_tls.Credentials, agent: str, address: str) -> tuple[bool, str]:
    """Send STOP as the leader does, and return what the dispatcher made of it."""
    answers: list[tuple[bool, str]] = []
    got = threading.Event()

    def on_done(_directed: Directed, ok: bool, problem: str) -> None:
        answers.append((ok, problem))
        got.set()

    channels = Channels(credentials)
    dispatcher = Dispatcher(channels, on_done, deadline_s=30.0)
    try:
        dispatcher.send(Directed(AgentName(agent), address, STOP))
        assert got.wait(60)
    finally:
        dispatcher.close()
        channels.close()
    return answers[0]


def test_the_leader_commands_the_agent_it_means(machine: Machine, ca: Authority) -> None:
    leader = grpc_tls.Credentials(ca.issue("coordinator", "r1"))
    assert command(leader, "gpu-1", machine.address) == (True, "")
    assert machine.taken == [STOP]


def test_an_agent_that_advertises_anothers_address_gets_none_of_its_commands(
    machine: Machine, ca: Authority
) -> None:
    """gpu-2's record says where gpu-1 listens, or gpu-1 poses as gpu-2: nothing is sent to the wrong one."""
    leader = grpc_tls.Credentials(ca.issue("coordinator", "r1"))
    assert command(leader, "gpu-2", machine.address) == (False, REFUSED)
    assert machine.taken == []


@pytest.mark.parametrize("role", ["operator", "reader", "coordinator"])
def test_what_is_no_agent_cannot_pose_as_one(role: str, ca: Authority, tmp_path: Path) -> None:
    poser = Machine(tmp_path, grpc_tls.Credentials(ca.issue(role, "gpu-1", file=f"poser-{role}")))
    try:
        leader = grpc_tls.Credentials(ca.issue("coordinator", "r1"))
        assert command(leader, "gpu-1", poser.address) == (False, REFUSED)
        assert poser.taken == []
    finally:
        poser.server.stop()


def test_clients_do_not_talk_to_an_agent_that_poses_as_a_coordinator(ca: Authority) -> None:
    poser = Replica(grpc_tls.Credentials(ca.issue("agent", "gpu-1")))
    try:
        with closing(
            Client([poser.server.address], timeout_s=1.0, tls=ca.issue("operator", "ann"))
        ) as client:
            with pytest.raises(DtrainError) as caught:
                client.submit(json.dumps(SPEC).encode(), "q1")
            assert caught.value.code is ErrorCode.COORDINATOR_UNAVAILABLE
            assert "--tls-cacert" in caught.value.fix
        assert poser.etcd.range(KEYS.spec(JobName("train"))).items == ()
    finally:
        poser.close()


def test_the_record_of_who_wanted_it_comes_from_the_certificate(replica: Replica, ca: Authority) -> None:
    with closing(Client([replica.server.address], timeout_s=30.0, tls=ca.issue("operator", "ann"))) as client:
        client.submit(json.dumps({**SPEC, "name": "by"}).encode(), "q1")
        client.set_intent("by", wanted="cancel", by="root@headquarters")
    stored = codec.decode(Intent, replica.etcd.range(KEYS.intent(JobName("by"))).items[0].value)
    assert stored.by == "ann"


def test_the_command_line_learns_that_its_role_is_too_small(replica: Replica, ca: Authority) -> None:
    with closing(Client([replica.server.address], timeout_s=30.0, tls=ca.issue("reader", "bob"))) as client:
        assert client.info().cluster == "c1"
        with pytest.raises(Refused) as caught:
            client.submit(json.dumps(SPEC).encode(), "q1")
    error = caught.value
    assert error.code is ErrorCode.NOT_PERMITTED
    assert error.message == "reader bob may not call Submit: it is for operators"
    assert "docs/security.md" in error.fix


def test_a_client_without_tls_learns_what_is_missing(replica: Replica) -> None:
    with (
        closing(Client([replica.server.address], timeout_s=1.0)) as client,
        pytest.raises(DtrainError) as caught,
    ):
        client.info()
    assert "--tls-cert" in caught.value.fix


def test_a_daemon_refuses_a_certificate_of_somebody_else(ca: Authority) -> None:
    files = ca.issue("agent", "gpu-1")
    assert grpc_tls.load(files, "c1", Role.AGENT, "gpu-1") is not None
    wrong: list[Callable[[], Any]] = [
        lambda: grpc_tls.load(files, "c1", Role.AGENT, "gpu-2"),
        lambda: grpc_tls.load(files, "c2", Role.AGENT, "gpu-1"),
        lambda: grpc_tls.load(files, "c1", Role.COORDINATOR, "gpu-1"),
    ]
    for load in wrong:
        with pytest.raises(Refused) as caught:
            load()
        assert "dtrain://c1/agent/gpu-1" in caught.value.message


@pytest.mark.parametrize("text", ["", "dtrain://", "dtrain://c1/agent/", "dtrain://c1/reader/a b", "x"])
def test_a_uri_that_is_none_of_ours_names_nobody(text: str) -> None:
    with pytest.raises(Refused):
        parse_peer(text)


def test_an_error_of_the_gate_travels_as_all_others_do(replica: Replica, ca: Authority) -> None:
    with to_replica(replica, ca, "reader", "bob") as channel:
        call = channel.unary_unary("/dtrain.v1.Coordinator/Submit")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=30)
        told = json.loads(dict(caught.value.trailing_metadata())[ERROR_KEY])
        assert told["code"] == "DT-4008"
