"""``farstep bench``: figures of a link that fit together, nothing left behind, and what is said where it cannot measure."""

from __future__ import annotations

import json
from typing import Any

import grpc
import pytest

from farstep.cli import _bench, main
from farstep_wire.limits import CHUNK_BYTES, LOAD_BYTES
from farstep_wire.v1 import link_pb2 as pb
from tests.support.servers import ServerProcess, Servers

QUICK = ("--seconds", "0.01", "--count", "5")


def bench(server: ServerProcess, *words: str) -> int:
    return main(["--server", server.address, "bench", *QUICK, *words])


def hosted(server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main(["--server", server.address, "ls", "--json"]) == 0
    return [own["name"] for own in json.loads(capsys.readouterr().out)["optimizers"]]


@pytest.fixture
def figures(server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> Any:
    assert bench(server, "--sizes", "10KB,5MB", "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_the_figures_fit_together(server: ServerProcess, figures: Any) -> None:
    assert (figures["address"], figures["transport"], figures["left_out"]) == (server.address, None, [])
    trips = figures["round_trip_ms"]
    assert trips["count"] == 5
    assert 0 < trips["min"] <= trips["p50"] <= trips["p99"]
    assert [(own["bytes"], own["tensors"]) for own in figures["sizes"]] == [(10_000, 1), (5_000_000, 5)]
    for own in figures["sizes"]:
        assert own["rounds"] >= 3
        assert own["push_bytes_per_second"] == pytest.approx(own["bytes"] / own["push_seconds"])
        assert own["pull_bytes_per_second"] == pytest.approx(own["bytes"] / own["pull_seconds"])
        assert own["ratio"] == pytest.approx(own["step_seconds"] / (own["exchange_seconds"] + own["local_seconds"]))


def test_the_keys_are_those_that_help_lists(figures: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    listed = set(capsys.readouterr().out.replace(",", " ").replace(":", " ").split())
    assert {*figures, *figures["server"], *figures["round_trip_ms"], *figures["sizes"][0]} - listed == set()


def test_the_table(server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    before = hosted(server, capsys)
    assert bench(server, "--sizes", "1 MiB") == 0
    about, trip, _, columns, _, row = capsys.readouterr().out.splitlines()
    assert about.startswith(f"{server.address}: farstep ")
    assert trip.startswith("round trip: p50 ")
    assert columns.split()[:6] == ["model", "push", "pull", "exchange", "step", "local"]
    assert row.split()[:2] == ["1.05", "MB"]
    assert row.split()[3].endswith("B/s")
    assert hosted(server, capsys) == before


def test_gradients_made_smaller(server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(server, "--sizes", "4MB", "--wire-dtype", "int8", "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["wire_dtype"] == "int8"
    (own,) = figures["sizes"]
    assert own["step_sent_bytes"] == pytest.approx(4e6 * 17 / 64, rel=0.01)
    assert own["step_received_bytes"] == pytest.approx(4e6, rel=0.01)


def test_sizes_that_the_link_is_too_slow_for(server, capsys, monkeypatch) -> None:
    monkeypatch.setattr(_bench, "_PATIENCE", 0.0)
    assert bench(server) == 0
    assert "left out, for the link is slow: 1 MB, 10 MB, 100 MB; --sizes has" in capsys.readouterr().out
    assert bench(server, "--sizes", "8B,16B", "--json") == 0
    assert json.loads(capsys.readouterr().out)["left_out"] == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--sizes", "10XB"], "--sizes: '10XB' is not a size such as 10KB, 100MB or 1GiB"),
        (["--sizes", "1MB,"], "--sizes: '' is not a size"),
        (["--sizes", "3"], "--sizes: '3' is not between 4 bytes and 16 GB"),
        (["--sizes", "17GB"], "--sizes: '17GB' is not between 4 bytes and 16 GB"),
        (["--transport", "pigeon"], "'pigeon'"),
        (["--wire-dtype", "int4"], "'int4' is none of bfloat16, float16, int8, topk"),
        (["--wire-dtype", "int8", "--transport", "shm"], "'int8' with transport='shm'"),
    ],
)
def test_what_cannot_be_meant(server: ServerProcess, capsys, words: list[str], says: str) -> None:
    assert bench(server, *words) == 2
    assert says in capsys.readouterr().err


def test_a_server_without_room(servers: Servers, capsys: pytest.CaptureFixture[str]) -> None:
    server = servers("--memory-limit", "1MiB")
    assert bench(server, "--sizes", "1KB,4MB") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("farstep: ")
    assert "4000000" in err
    assert hosted(server, capsys) == []


def test_a_server_that_has_no_such_service(fake, capsys) -> None:
    assert main(["bench", *QUICK]) == 1
    err = capsys.readouterr().err
    assert f"farstep: the server at {fake.address} does not know this call" in err


def test_a_server_that_dies(servers: Servers, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    server = servers()
    turns = _bench._turns

    def dies_between_turns(acts: dict[str, Any], seconds: float) -> Any:
        server.kill()
        return turns(acts, seconds)

    monkeypatch.setattr(_bench, "_turns", dies_between_turns)
    assert bench(server, "--sizes", "1KB") == 3
    assert f"no farstep server answers at {server.address}: the unix socket" in capsys.readouterr().err


# The service.


@pytest.fixture
def exchange(server: ServerProcess) -> Any:
    with grpc.insecure_channel(server.address) as channel:
        yield channel.stream_stream("/farstep.v1.LinkService/Exchange", None, None)


def test_any_protobuf_client_can_use_it(server: ServerProcess, exchange: Any) -> None:
    wanted = 2 * CHUNK_BYTES + 7
    asked = [pb.Load(payload=b"x" * 100_000), pb.Load(wanted_bytes=wanted, payload=b"y"), pb.Load(wanted_bytes=1)]
    answers = exchange(iter([message.SerializeToString() for message in asked]), timeout=30)
    sizes = [len(pb.Load.FromString(answer).payload) for answer in answers]
    assert sizes == [CHUNK_BYTES, CHUNK_BYTES, 7, 1]


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (b"\xff\xff\xff", "a message of 3 bytes is not a Load"),
        (pb.Load(wanted_bytes=LOAD_BYTES + 1).SerializeToString(), f"{LOAD_BYTES + 1} bytes are wanted at a time"),
    ],
)
def test_what_is_refused(server: ServerProcess, exchange: Any, message: bytes, says: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(exchange(iter([message]), timeout=30))
    failed: Any = caught.value
    assert failed.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert says in failed.details()


def test_a_client_that_goes_in_the_middle_is_no_defect(server: ServerProcess, exchange: Any) -> None:
    call = exchange(iter([pb.Load(wanted_bytes=LOAD_BYTES).SerializeToString()]), timeout=30)
    next(call)
    call.cancel()
    assert main(["--server", server.address, "doctor", "--count", "1", "--json"]) == 0
    assert server.defects() == []
