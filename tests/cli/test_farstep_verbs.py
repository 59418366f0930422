"""The command ``farstep`` against a server whose answers are known: every verb, in text and in JSON."""

from __future__ import annotations

import io
import json
import math
import re
import sys

import pytest

from farstep.cli import _client, main
from farstep_wire.errors import InvalidRequestError, NotFoundError, RemovedError
from farstep_wire.v1 import common_pb2 as pb
from farstep_wire.v1 import inspection_pb2 as ipb
from farstep_wire.values import from_map

from .conftest import description, options, refuse, settings, snapshot, summary

SUMMARY = {
    "name": "resnet50",
    "optimizer": "AdamW",
    "version": 120,
    "live_workers": 1,
    "parameters": 2,
    "elements": 1234567,
    "parameter_bytes": 4938268,
    "policy": {"kind": "sync", "workers": 2, "min_workers": None, "timeout_ms": 1500},
    "ephemeral": False,
    "device": "cuda:0",
    "lineage": "1f3a",
    "incarnation": 2,
}
SNAPSHOT = {
    "name": "resnet50",
    "version": 120,
    "tag": "best",
    "created_unix": 1.7e9 + 120,
    "size_bytes": 3 * 2**20,
    "lineage": "1f3a",
    "incarnation": 2,
}


def parsed(capsys):
    return json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


def rows(capsys) -> dict[str, list[str]]:
    """Return the printed lines' words by their first word."""
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    return {words[0]: words for words in lines if words}


def test_ls(fake, capsys) -> None:
    assert main(["ls", "--json"]) == 0
    assert parsed(capsys) == {"server": fake.address, "optimizers": [SUMMARY]}
    assert main(["ls"]) == 0
    line = " ".join(rows(capsys)["resnet50"])
    assert line == "resnet50 AdamW Sync cuda:0 yes 120 1/2 1,234,567 4.7 MiB"


def test_ls_fits_a_narrow_terminal(fake, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    assert main(["ls"]) == 0
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert len(lines) == 3
    assert max(map(len, lines)) <= 80


def test_ls_of_nothing(fake, capsys) -> None:
    fake.answers["List"] = ipb.ListReply()
    assert main(["ls"]) == 0
    assert capsys.readouterr().out == f"nothing is hosted at {fake.address}\n"
    assert main(["ls", "--json"]) == 0
    assert parsed(capsys)["optimizers"] == []


@pytest.mark.parametrize(
    ("policy", "view", "text"),
    [
        (pb.Policy(sync=pb.Sync(workers=3, min_workers=2)), ("sync", 3, 2, None), "Sync(workers=3, min_workers=2)"),
        (pb.Policy(**{"async": pb.Async()}), ("async", None, False), "Async()"),
        (pb.Policy(**{"async": pb.Async(max_staleness=0)}), ("async", 0, False), "Async(max_staleness=0)"),
        (pb.Policy(**{"async": pb.Async(scale_lr=True)}), ("async", None, True), "Async(scale_lr=True)"),
        (
            pb.Policy(**{"async": pb.Async(max_staleness=4, scale_lr=True)}),
            ("async", 4, True),
            "Async(max_staleness=4, scale_lr=True)",
        ),
        (pb.Policy(), None, "-"),
    ],
)
def test_policies(fake, capsys, policy, view, text) -> None:
    line = summary()
    line.policy.CopyFrom(policy)
    fake.answers["List"] = ipb.ListReply(optimizers=[line])
    fake.answers["Describe"] = ipb.Description(summary=line)
    assert main(["ls", "--json"]) == 0
    seen = parsed(capsys)["optimizers"][0]["policy"]
    assert (None if seen is None else tuple(seen.values())) == view
    assert main(["show", "x"]) == 0
    assert f"AdamW  version 120  {text}\n" in capsys.readouterr().out
    assert main(["ls"]) == 0
    short = "Sync" if "Sync" in text else text
    assert f"AdamW {short} cuda:0 " in " ".join(rows(capsys)["resnet50"])


def test_show_json(fake, capsys) -> None:
    assert main(["show", "resnet50", "--json"]) == 0
    moment = {"value": None, "shape": [3, 4], "dtype": "float32", "norm": 0.25}
    assert parsed(capsys) == {
        "summary": SUMMARY,
        "workers": [
            {
                "id": "0",
                "standing": "waiting",
                "version": 120,
                "contributions": 119,
                "abstentions": 0,
                "stale": 0,
                "epoch": 1,
                "lease_seconds": 0.0,
                "round_trip_seconds": 0.00025,
                "staleness": 0,
            },
            {
                "id": "1",
                "standing": "expired",
                "version": 0,
                "contributions": 0,
                "abstentions": 3,
                "stale": 2,
                "epoch": 0,
                "lease_seconds": -4.5,
                "round_trip_seconds": None,
                "staleness": 4,
            },
        ],
        "groups": [
            {"parameters": 1, "options": {"lr": 0.0003, "betas": [0.9, 0.999], "foreach": None}},
            {
                "parameters": 1,
                "options": {
                    "lr": {"tensor": "float32", "shape": [], "value": 0.5},
                    "betas": [0.9, 0.999],
                    "fused": True,
                },
            },
        ],
        "parameters": [
            {
                "key": "conv.weight",
                "group": 0,
                "shape": [3, 4],
                "dtype": "float32",
                "norm": 1.5,
                "gradient_norm": 0.125,
                "state": {
                    "step": {"value": 120.0, "shape": None, "dtype": None, "norm": None},
                    "exp_avg": moment,
                },
            },
            {
                "key": "scale",
                "group": 1,
                "shape": [],
                "dtype": "bfloat16",
                "norm": "nan",
                "gradient_norm": None,
                "state": {},
            },
        ],
        "state_bytes": 2048,
        "arguments": {"lr": 0.001},
        "last_step_seconds": 0.0031,
        "stale_contributions": 2,
        "settings": {
            "clip_grad_norm": 1.0,
            "norm_type": "inf",
            "clip_grad_value": None,
            "non_finite": "skip",
            "ema_decay": 0.99,
        },
        "schedules": [
            {"scheduler": "OneCycleLR", "every": 2, "last_epoch": 60, "ended": "it was given 60 steps", "part": False},
            {"scheduler": "ConstantLR", "every": 1, "last_epoch": 3, "ended": None, "part": True},
        ],
        "averaged": 119,
    }


def test_show(fake, capsys) -> None:
    assert main(["show", "resnet50"]) == 0
    out = capsys.readouterr().out
    for text in ("AdamW  version 120  Sync(workers=2, timeout=1.5)", "kept on cuda:0; lineage 1f3a, incarnation 2"):
        assert text in out
    assert "1,234,567 elements, 4.7 MiB of parameters, 2.0 KiB of state, last step 3.1 ms" in out
    assert "2 stale contributions" in out
    lines = {words[0]: words for line in out.splitlines() if (words := line.split())}
    assert lines["0"] == ["0", "waiting", "120", "119", "0", "0", "0", "1", "0.0", "s", "0.25", "ms"]
    assert lines["1"] == ["1", "expired", "0", "0", "3", "2", "4", "0", "-4.5", "s", "-"]
    assert lines["lr"] == ["lr", "0.0003", "tensor(0.5)"]
    assert lines["betas"] == ["betas", "(0.9,", "0.999)", "(0.9,", "0.999)"]
    assert lines["foreach"] == ["foreach", "None", "-"]
    assert lines["parameter"] == ["parameter", "shape", "dtype", "group", "norm", "grad", "norm", "step", "exp_avg"]
    assert lines["conv.weight"] == ["conv.weight", "3×4", "float32", "0", "1.5", "0.125", "120", "0.25"]
    assert lines["scale"] == ["scale", "()", "bfloat16", "1", "nan", "-", "-", "-"]


def test_show_without_the_table_does_not_ask_for_it(fake, capsys) -> None:
    assert main(["show", "resnet50", "--no-parameters", "--json"]) == 0
    assert parsed(capsys)["parameters"] == []
    assert [request.parameters for request in fake.requests("Describe")] == [False]


def test_many_groups_go_to_several_tables(fake, capsys) -> None:
    groups = [options(lr=pb.Value(real=float(n))) for n in range(8)]
    fake.answers["Describe"] = ipb.Description(summary=summary(), groups=groups, group_sizes=[2] * 8)
    assert main(["show", "x"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [words for words in lines if words[:1] == ["lr"]] == [["lr", *"012345"], ["lr", "6", "7"]]


@pytest.mark.parametrize(
    ("value", "plain", "text"),
    [
        (pb.Value(real=float("-inf")), "-inf", "-inf"),
        (pb.Value(integer=-3), -3, "-3"),
        (pb.Value(text="max"), "max", "max"),
        (pb.Value(complex=pb.Complex(real=1, imaginary=-2)), {"complex": [1, -2]}, "1+-2j"),
        (pb.Value(map=options(a=pb.Value(integer=1))), {"a": 1}, "a=1"),
        (pb.Value(list=pb.ValueList()), [], "()"),
        (
            pb.Value(tensor=pb.Tensor(spec=pb.TensorSpec(dtype="bfloat16", shape=[1]), data=b"\x80\x3f")),
            {"tensor": "bfloat16", "shape": [1], "value": 1.0},
            "tensor(1)",
        ),
        (
            pb.Value(tensor=pb.Tensor(spec=pb.TensorSpec(dtype="int64", shape=[2]), data=bytes(16))),
            {"tensor": "int64", "shape": [2], "value": None},
            "tensor(2,)",
        ),
    ],
)
def test_values(fake, capsys, value, plain, text) -> None:
    fake.answers["Describe"] = ipb.Description(summary=summary(), groups=[options(it=value)], group_sizes=[1])
    assert main(["show", "x", "--json"]) == 0
    assert parsed(capsys)["groups"][0]["options"] == {"it": plain}
    assert main(["show", "x"]) == 0
    assert " ".join(rows(capsys)["it"][1:]) == text


def test_what_the_server_says_cannot_steer_the_terminal(fake, capsys) -> None:
    fake.answers["List"] = ipb.ListReply(optimizers=[summary(name="\x1b[31mred\x1b]0;x\x07 [bold]b[/bold]")])
    assert main(["ls"]) == 0
    out = capsys.readouterr().out
    assert r"\x1b[31mred\x1b]0;x\x07 [bold]b[/bold]" in out
    assert "\x1b" not in out
    fake.answers["List"] = refuse(RemovedError("gone\n\x1b[2J"))
    assert main(["ls"]) == 4
    assert capsys.readouterr().err == "farstep: gone\\n\\x1b[2J\n"


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["show", "a", "--server", "{}#b"], "a"),
        (["show", "--server", "{}#b"], "b"),
        (["--server", "{}#run/0", "show"], "run/0"),
        (["--server", "{}#x", "show", "--server", "{}#y"], "y"),
    ],
)
def test_a_name_in_the_address_stands_for_one_that_is_not_given(fake, monkeypatch, argv, name) -> None:
    monkeypatch.setenv("FARSTEP_REMOTE", "unix:/nowhere#nothing")
    assert main([word.format(fake.address) for word in argv]) == 0
    assert [request.name for request in fake.requests("Describe")] == [name]


def test_show_tells_what_the_server_does_around_each_step(fake, capsys) -> None:
    assert main(["show", "resnet50"]) == 0
    out = capsys.readouterr().out
    assert "\nsettings: clip_grad_norm=1, norm_type=inf, non_finite=skip, ema_decay=0.99\n" in out
    assert "\nexponential moving average over 119 steps\n" in out
    schedules = [line.rstrip().split(maxsplit=3) for line in out.splitlines() if "LR" in line]
    assert schedules == [
        ["OneCycleLR", "2", "60", "ended: it was given 60 steps"],
        ["ConstantLR", "1", "3", "part of another"],
    ]


def test_show_leaves_out_what_is_as_ever(fake, capsys) -> None:
    plain = description()
    plain.settings.CopyFrom(settings())
    del plain.schedules[:]
    plain.averaged = 0
    fake.answers["Describe"] = plain
    assert main(["show", "resnet50"]) == 0
    out = capsys.readouterr().out
    assert not any(word in out for word in ("settings", "average", "schedule"))
    plain.settings.CopyFrom(settings(ema_decay=pb.Value(real=0.5)))
    assert main(["show", "resnet50"]) == 0
    assert "\nsettings: ema_decay=0.5\nthe moving average begins with the next step\n" in capsys.readouterr().out


def test_workers(fake, capsys) -> None:
    assert main(["workers", "resnet50", "--json"]) == 0
    view = parsed(capsys)
    assert {"name": view["name"], "version": view["version"]} == {"name": "resnet50", "version": 120}
    assert [worker["round_trip_seconds"] for worker in view["workers"]] == [0.00025, None]
    assert set(view["workers"][0]) == set(map(str, ipb.Worker.DESCRIPTOR.fields_by_name))
    assert main(["workers", "resnet50"]) == 0
    lines = rows(capsys)
    assert " ".join(lines["0"]) == "0 waiting 120 119 0 0 0 1 0.0 s 0.25 ms"
    assert " ".join(lines["1"]) == "1 expired 0 0 3 2 4 0 -4.5 s -"
    assert [request.parameters for request in fake.requests("Describe")] == [False, False]


def test_workers_of_a_name_without_any(fake, capsys) -> None:
    fake.answers["Describe"] = ipb.Description(summary=summary())
    assert main(["workers", "resnet50"]) == 0
    assert capsys.readouterr().out == "resnet50 has had no workers in this life of the server\n"
    assert main(["workers", "resnet50", "--json"]) == 0
    assert parsed(capsys)["workers"] == []


def test_history_json_prints_one_line_per_round(fake, capsys) -> None:
    assert main(["history", "resnet50", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == {
        "number": 1,
        "version": 119,
        "incarnation": 2,
        "kind": "step",
        "outcome": "committed",
        "parts": [
            {
                "worker": "0",
                "sequence": 7,
                "abstained": False,
                "num_samples": 32.0,
                "staleness": 1,
                "ahead": 3,
                "evaluations": 5,
            },
            {
                "worker": "1",
                "sequence": 9,
                "abstained": True,
                "num_samples": None,
                "staleness": 4,
                "ahead": 0,
                "evaluations": 0,
            },
        ],
        "evaluations": 5,
        "seconds": 0.0025,
        "reason": None,
    }
    assert [(line["kind"], line["outcome"], line["reason"]) for line in lines[1:]] == [
        ("step", "rolled_back", "worker 1 left"),
        ("load_state", "committed", None),
    ]


def test_history(fake, capsys) -> None:
    assert main(["history", "resnet50"]) == 0
    lines = rows(capsys)
    assert " ".join(lines["1"]) == "1 119 step committed 4 3 5 2.5 ms 0 (1) -"
    assert " ".join(lines["2"]) == "2 119 step rolled_back 0 0 0 0 ms - worker 1 left"
    assert " ".join(lines["3"]) == "3 120 load_state committed 0 0 0 12 s - -"
    assert main(["history", "resnet50", "--after", "2"]) == 0
    assert set(rows(capsys)) & {"1", "2", "3"} == {"3"}
    assert main(["history", "resnet50", "--after", "3"]) == 0
    assert capsys.readouterr().out == "no rounds of resnet50 after round 3 are remembered\n"


@pytest.mark.parametrize("verb", ["workers", "history"])
def test_what_is_not_there_is_not_found(fake, capsys, verb) -> None:
    fake.answers["Describe"] = fake.answers["History"] = refuse(NotFoundError("there is no 'resnet50'"))
    assert main([verb, "resnet50"]) == 4
    assert capsys.readouterr().err == "farstep: there is no 'resnet50'\n"


def test_set(fake, capsys) -> None:
    words = ["clip_grad_norm=.5", "norm_type=inf", "non_finite=skip", "ema_decay=None"]
    assert main(["set", "resnet50", *words]) == 0
    assert capsys.readouterr().out.startswith("resnet50 from version 120 on:\n")
    request = fake.requests("Configure")[0]
    assert request.name == "resnet50"
    assert from_map(request.settings, "settings") == {
        "clip_grad_norm": 0.5,
        "norm_type": math.inf,
        "non_finite": "skip",
        "ema_decay": None,
    }
    assert main(["set", "resnet50", "clip_grad_norm=0.5"]) == 0
    lines = rows(capsys)
    assert [lines[key][1] for key in ("clip_grad_norm", "norm_type", "non_finite", "ema_decay")] == [
        "0.5",
        "2",
        "allow",
        "None",
    ]
    assert main(["set", "resnet50", "clip_grad_norm=0.5", "--json"]) == 0
    stand = {"clip_grad_norm": 0.5, "norm_type": 2.0, "clip_grad_value": None, "non_finite": "allow", "ema_decay": None}
    assert parsed(capsys) == {"name": "resnet50", "version": 120, "settings": stand}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["clip_grad_norm=-1"], "clip_grad_norm must be None or a positive number, not -1.0"),
        (["clip_grad_norm=nan"], "clip_grad_norm must be None or a positive number, not nan"),
        (["ema_decay=much"], "ema_decay must be None or between 0 and 1, not 'much'"),
        (["non_finite=ignore"], "non_finite must be one of allow, raise, skip, not 'ignore'"),
        (["clip=1"], "there is no setting 'clip'; there are clip_grad_norm, "),
        (["ema_decay=0.9", "skip"], "'skip' is no setting; write SETTING=VALUE"),
        (["ema_decay=0.9", "ema_decay=0.8"], "ema_decay is set twice"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_before_anything_is_sent(fake, capsys, words, says) -> None:
    assert main(["set", "resnet50", *words]) == 2
    assert says in capsys.readouterr().err
    assert fake.requests("Configure") == []


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["set", "ema_decay=0.9", "non_finite=skip"], "here"),
        (["set", "ema_decay=0.9"], "here"),
        (["set", "lr=0.1", "ema_decay=0.9"], "lr=0.1"),
    ],
)
def test_set_knows_a_name_from_a_setting(fake, argv, name) -> None:
    assert main(["--server", f"{fake.address}#here", *argv]) == 0
    assert [request.name for request in fake.requests("Configure")] == [name]


def test_set_says_what_the_server_refuses(fake, capsys) -> None:
    fake.answers["Configure"] = refuse(InvalidRequestError("there is no setting 'ema_decay'; there are none"))
    assert main(["set", "resnet50", "ema_decay=0.9"]) == 1
    assert capsys.readouterr().err == "farstep: there is no setting 'ema_decay'; there are none\n"


def test_watch_json_prints_one_line_per_description(fake, capsys) -> None:
    assert main(["watch", "resnet50", "--json", "--count", "2", "--interval", "0.25"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["summary"]["version"] for line in lines] == [120, 121]
    assert set(lines[0]) == {*map(str, ipb.Description.DESCRIPTOR.fields_by_name)} - {"group_sizes"}
    assert [request.interval_ms for request in fake.requests("Watch")] == [250]


def test_watch_without_a_terminal_prints_a_line_each(fake, capsys) -> None:
    assert main(["watch", "resnet50", "--count", "3"]) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == "resnet50  version 120  workers 1/2  last step 3.1 ms"
    assert second.startswith("resnet50  version 121  workers 1/2  last step 3.1 ms  ")
    assert third.endswith(" steps/s")
    assert not any(request.parameters for request in fake.requests("Watch"))


def test_watch_on_a_terminal_draws_tables(fake, capsys, monkeypatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("LINES", "60")
    assert main(["watch", "resnet50", "--count", "3"]) == 0
    out = capsys.readouterr().out
    for text in ("version 120", "version 122", "conv.weight", "steps/s", "waiting"):
        assert text in out
    assert all(request.parameters for request in fake.requests("Watch"))


def test_an_idle_watch_goes_on_past_its_calls_deadline(fake, capsys, monkeypatch) -> None:
    monkeypatch.setattr(_client, "_SEGMENT_SECONDS", 0.3)

    def one_then_silence(request, context):
        yield description(120)
        fake.hang()

    fake.answers["Watch"] = one_then_silence
    assert main(["watch", "resnet50", "--count", "2", "--interval", "0.01"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert len(fake.requests("Watch")) == 2


def test_a_watch_ends_with_its_optimizer(fake, capsys) -> None:
    def one_then_gone(request, context):
        yield description(120)
        refuse(RemovedError("'resnet50' was removed"))(request, context)

    fake.answers["Watch"] = one_then_gone
    assert main(["watch", "resnet50"]) == 4
    assert capsys.readouterr().err == "farstep: 'resnet50' was removed\n"


def test_a_watch_that_the_server_ends_is_said_to_have_ended(fake, capsys) -> None:
    assert main(["watch", "resnet50"]) == 3
    assert "ended the watch" in capsys.readouterr().err


def test_rm_yes(fake, capsys) -> None:
    assert main(["rm", "resnet50", "--yes", "--snapshots"]) == 0
    assert capsys.readouterr().out == "removed resnet50 at version 120, and 3 snapshots\n"
    assert fake.requests("Remove") == [ipb.RemoveRequest(name="resnet50", snapshots=True)]
    assert main(["rm", "resnet50", "--yes", "--json"]) == 0
    assert parsed(capsys) == {"name": "resnet50", "version": 120, "snapshots": 3}
    assert fake.requests("Remove")[1] == ipb.RemoveRequest(name="resnet50")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("said", "code", "removed"), [("y\n", 0, 1), ("YES\n", 0, 1), ("n\n", 130, 0), ("", 130, 0)])
def test_rm_asks(fake, capsys, monkeypatch, said, code, removed) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(said))
    assert main(["rm", "resnet50"]) == code
    assert "Remove resnet50 (AdamW, version 120, 1 live workers)? [y/N]" in capsys.readouterr().err
    assert len(fake.requests("Remove")) == removed


def test_rm_without_a_terminal_wants_yes(fake, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert main(["rm", "resnet50"]) == 2
    assert "--yes" in capsys.readouterr().err
    assert fake.requests("Remove") == []


def test_checkpoint_save(fake, capsys) -> None:
    assert main(["checkpoint", "save", "resnet50", "--tag", "best", "--json"]) == 0
    assert parsed(capsys) == SNAPSHOT
    assert main(["checkpoint", "save", "resnet50"]) == 0
    assert capsys.readouterr().out == "saved resnet50 at version 120, 3.0 MiB\n"
    assert [request.tag for request in fake.requests("Save")] == ["best", ""]


def test_checkpoint_list(fake, capsys) -> None:
    assert main(["checkpoint", "list", "resnet50", "--json"]) == 0
    listed = parsed(capsys)
    assert listed["name"] == "resnet50"
    assert listed["snapshots"] == [{**SNAPSHOT, "version": 100, "tag": None, "created_unix": 1.7e9 + 100}, SNAPSHOT]
    assert main(["checkpoint", "list", "resnet50"]) == 0
    assert rows(capsys)["best"][3:] == ["120", "3.0", "MiB", "2"]
    assert main(["checkpoint", "list", "resnet50", "--version", "100"]) == 0
    assert "best" not in capsys.readouterr().out
    assert main(["checkpoint", "list", "resnet50", "--tag", "none"]) == 0
    assert capsys.readouterr().out == "no snapshots of resnet50\n"


def test_checkpoint_restore(fake, capsys) -> None:
    assert main(["checkpoint", "restore", "resnet50", "--version", "0", "--json"]) == 0
    assert parsed(capsys)["version"] == 0
    assert main(["checkpoint", "restore", "resnet50", "--tag", "best"]) == 0
    assert capsys.readouterr().out == "restored resnet50 to version 120 (tag best); incarnation 2 began\n"
    assert main(["checkpoint", "restore", "resnet50"]) == 0
    asked = [(request.tag, request.HasField("version")) for request in fake.requests("Restore")]
    assert asked == [("", True), ("best", False), ("", False)]


def test_a_snapshot_without_a_tag_says_so(fake, capsys) -> None:
    fake.answers["Save"] = snapshot()
    assert main(["checkpoint", "save", "resnet50", "--json"]) == 0
    assert parsed(capsys) == {**SNAPSHOT, "tag": None}
