"""The QMP client, against a scripted QEMU."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from xen_symbols.targets.qmp import Qmp, QmpError, absolute

Answer = Callable[[dict[str, Any]], list[Any]]
Serve = Callable[..., Path]
GREETING = {"QMP": {"version": {}, "capabilities": []}}


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start a server that says what it begins with, by default its greeting, and answers each request with what the
    function returns (bytes as they are)."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    def run(answer: Answer, begins: Sequence[object]) -> None:
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as requests:
            connection.sendall(b"".join(json.dumps(each).encode() + b"\r\n" for each in begins))
            for line in requests:
                request = json.loads(line)
                if request["execute"] == "qmp_capabilities":
                    replies: list[Any] = [{"return": {}, "id": request["id"]}]
                else:
                    replies = answer(request)
                for reply in replies:
                    connection.sendall(reply if isinstance(reply, bytes) else json.dumps(reply).encode() + b"\r\n")
                if not replies:
                    return

    def start(answer: Answer, *begins: object) -> Path:
        path = tmp_path / "qmp"
        listener.bind(str(path))
        listener.listen(1)
        threading.Thread(target=run, args=(answer, begins or (GREETING,)), daemon=True).start()
        return path

    yield start
    listener.close()


def test_answers_and_arguments(serve: Serve) -> None:
    def answer(request: dict[str, Any]) -> list[Any]:
        return [{"return": request.get("arguments"), "id": request["id"]}]

    with Qmp(serve(answer)) as client:
        assert client.execute("human-monitor-command", command_line="info", cpu_index=1) == {
            "command-line": "info",
            "cpu-index": 1,
        }
        assert client.execute("query-status") is None


def test_events_are_kept_in_order(serve: Serve) -> None:
    def answer(request: dict[str, Any]) -> list[Any]:
        return [{"event": "STOP"}, {"event": "RESUME"}, {"return": {}, "id": request["id"]}]

    with Qmp(serve(answer)) as client:
        client.execute("xen-save-devices-state", filename="f", live=False)
        assert [event["event"] for event in client.events] == ["STOP", "RESUME"]


def test_a_refusal_is_an_error_and_the_next_command_works(serve: Serve) -> None:
    def answer(request: dict[str, Any]) -> list[Any]:
        if request["execute"] == "bad":
            return [{"error": {"class": "GenericError", "desc": "no such thing"}, "id": request["id"]}]
        return [{"return": 7, "id": request["id"]}]

    with Qmp(serve(answer)) as client:
        with pytest.raises(QmpError, match="QEMU refused bad: no such thing"):
            client.execute("bad")
        assert client.execute("good") == 7


def test_a_late_answer_is_not_taken_for_the_next_commands(serve: Serve) -> None:
    late: list[Any] = []

    def answer(request: dict[str, Any]) -> list[Any]:
        if request["execute"] == "slow":
            late.append({"return": "slow's", "id": request["id"]})
            return [b" "]
        return [*late, {"return": "quick's", "id": request["id"]}]

    with Qmp(serve(answer)) as client:
        with pytest.raises(QmpError, match=r"timed out at .* waiting for the answer to slow"):
            client.execute_for(0.2, "slow")
        assert client.execute("quick") == "quick's"


def test_an_answer_in_pieces(serve: Serve) -> None:
    def answer(request: dict[str, Any]) -> list[Any]:
        return [b'{"return": {"a"', b': 1}, "id": %d}' % request["id"], b"\r\n"]

    with Qmp(serve(answer)) as client:
        assert client.execute("query") == {"a": 1}


def test_qemu_going_away_is_an_error_at_once(serve: Serve) -> None:
    with Qmp(serve(lambda request: [])) as client:
        with pytest.raises(QmpError, match=r"QEMU closed .* before the answer to quit"):
            client.execute("quit")
        with pytest.raises(QmpError, match="QEMU"):
            client.execute("query-status")


def test_something_else_at_the_socket(serve: Serve, tmp_path: Path) -> None:
    with Qmp(serve(lambda request: [b"+$T05#b9\n"])) as client, pytest.raises(QmpError, match="does not speak QMP"):
        client.execute("query-status")


def test_an_event_before_the_greeting_is_kept(serve: Serve) -> None:
    with Qmp(serve(lambda request: [], {"event": "RESUME"}, GREETING)) as client:
        assert client.events == [{"event": "RESUME"}]


def test_what_begins_with_neither_greeting_nor_event_is_not_qmp(serve: Serve) -> None:
    with pytest.raises(QmpError, match="does not speak QMP: it began with"):
        Qmp(serve(lambda request: [], {"return": {}}, GREETING))


def test_nothing_listens_at_the_socket(tmp_path: Path) -> None:
    with pytest.raises(QmpError, match=r"cannot connect to QMP at .*/nothing: No such file"):
        Qmp(tmp_path / "nothing")


def test_a_second_client_learns_why_it_waits(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "busy"))
        listener.listen(1)
        with pytest.raises(QmpError, match="another client may be connected"):
            Qmp(tmp_path / "busy", timeout=0.2)


def test_qmp_over_tcp() -> None:
    with socket.create_server(("localhost", 0)) as listener:
        port = listener.getsockname()[1]

        def greet() -> None:
            connection, _ = listener.accept()
            with connection, connection.makefile("rb") as requests:
                connection.sendall(json.dumps(GREETING).encode() + b"\r\n")
                for line in requests:
                    connection.sendall(json.dumps({"return": {}, "id": json.loads(line)["id"]}).encode() + b"\r\n")

        threading.Thread(target=greet, daemon=True).start()
        with Qmp(f"localhost:{port}") as client:
            assert client.execute("query-status") == {}


def test_what_cannot_be_connected_to_is_named(tmp_path: Path) -> None:
    with pytest.raises(QmpError, match=r"cannot connect to QMP at nowhere\.invalid:4444: unknown host nowhere"):
        Qmp("nowhere.invalid:4444")
    with socket.create_server(("localhost", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(QmpError, match=rf"cannot connect to QMP at localhost:{port}: Connection refused; QEMU's"):
        Qmp(f"localhost:{port}")
    with pytest.raises(QmpError, match=r"/none:4444: No such file or directory; QEMU's option -qmp says where it is"):
        Qmp(f"{tmp_path}/none:4444")
    with pytest.raises(QmpError, match=r"cannot connect to QMP at localhost:99999999: "):
        Qmp("localhost:99999999")


def test_an_address_for_another_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("localhost:4444") == "localhost:4444"
    assert absolute(":4444") == "localhost:4444"
    assert absolute("qmp.sock") == f"{tmp_path}/qmp.sock"
    (tmp_path / "a:1").touch()
    assert absolute("a:1") == f"{tmp_path}/a:1"
