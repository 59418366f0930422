"""What can be said of the images and the compose file without an engine to build and run them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.packaging.dockerfile import Stage, read_instructions, read_stages

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
STAGES = {stage.name: stage for stage in read_stages(DOCKERFILE)}
IMAGES = ("server", "worker")
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def runs() -> list[str]:
    return [command for stage in STAGES.values() for command in stage.of("RUN")]


def test_the_server_is_the_default_target() -> None:
    assert list(STAGES)[-1] == "server"


def test_every_stage_stands_on_the_one_base_image_or_on_an_earlier_stage() -> None:
    earlier: set[str] = set()
    for stage in STAGES.values():
        assert stage.base == "${PYTHON_IMAGE}" or stage.base in earlier
        earlier.add(stage.name)
    [image] = [each.value for each in read_instructions(DOCKERFILE) if each.value.startswith("PYTHON_IMAGE=")]
    assert image.partition(":")[2] not in ("", "latest")


@pytest.mark.parametrize("name", IMAGES)
def test_images_run_as_a_numbered_user_who_is_not_root(name: str) -> None:
    keywords = [each.keyword for each in STAGES[name].instructions]
    [user] = STAGES[name].of("USER")
    assert all(int(part) >= 1000 for part in user.split(":"))
    assert "RUN" not in keywords[keywords.index("USER") :]


@pytest.mark.parametrize("name", IMAGES)
def test_images_take_the_install_whole_and_no_build_tools(name: str) -> None:
    assert not any("pip" in command for command in STAGES[name].of("RUN"))
    assert any(copy.startswith("--from=") and copy.endswith("/venv /venv") for copy in STAGES[name].of("COPY"))


def test_the_server_starts_without_a_shell_and_listens_where_the_server_does_by_default() -> None:
    server = STAGES["server"]
    assert json.loads(server.of("ENTRYPOINT")[0]) == ["farstep-server"]
    assert server.of("CMD") == []
    assert not any("LISTEN" in value or "INSECURE" in value for value in server.of("ENV"))


def test_the_server_has_a_health_check_and_a_volume_that_its_user_owns() -> None:
    server = STAGES["server"]
    check = json.loads(server.of("HEALTHCHECK")[0].partition("CMD ")[2])
    assert check[:2] == ["farstep", "doctor"]
    [volume] = server.of("VOLUME")
    assert any(f"install -d -o farstep -g farstep -m 0700 {volume}" in command for command in server.of("RUN"))


def test_nothing_is_fetched_but_by_pip() -> None:
    assert not any(stage.of("ADD") for stage in STAGES.values())
    assert not any(tool in command for command in runs() for tool in ("curl", "wget", "git ", "apt"))
    assert "://" not in DOCKERFILE


def test_what_is_copied_is_in_the_tree_and_let_through_to_the_build() -> None:
    let_through = [
        line[1:] for line in (ROOT / "docker/Dockerfile.dockerignore").read_text().splitlines() if "!" in line
    ]
    copies = [value for stage in STAGES.values() for value in stage.of("COPY") if not value.startswith("--from=")]
    sources = {source for value in copies for source in value.split()[:-1]}
    assert sources == set(let_through)
    assert [source for source in sources if not (ROOT / source).exists()] == []


@pytest.mark.parametrize("command", runs())
def test_run_instructions_are_valid_shell(command: str) -> None:
    subprocess.run(["sh", "-n"], input=command, text=True, check=True)


class TestFlavour:
    """The step that installs torch, run with a pip, a python and a uname that only write down how they were called."""

    @pytest.fixture
    def install(self, tmp_path: Path) -> Any:
        [command] = [command for command in STAGES["install"].of("RUN") if "TORCH_FLAVOUR" in command]
        calls = tmp_path / "calls"
        for tool in ("pip", "python"):
            self.write(tmp_path / tool, f'#!/bin/sh\necho "{tool} $*" >>"{calls}"\n')

        def run(machine: str, **arguments: str) -> tuple[int, str, str]:
            self.write(tmp_path / "uname", f"#!/bin/sh\necho {machine}\n")
            environ = {"PATH": f"{tmp_path}{os.pathsep}{os.defpath}", "TORCH_INDEX_URL": "", **arguments}
            done = subprocess.run(["sh", "-c", command], env=environ, capture_output=True, text=True, check=False)
            return done.returncode, done.stderr, calls.read_text() if calls.exists() else ""

        return run

    @staticmethod
    def write(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def test_cuda_takes_the_default_index(self, install: Any) -> None:
        code, _, calls = install("x86_64", TORCH_FLAVOUR="cuda")
        assert code == 0
        assert calls.splitlines()[0] == "pip install -c constraints.txt torch"

    def test_cpu_takes_the_index_it_is_given(self, install: Any) -> None:
        code, _, calls = install("x86_64", TORCH_FLAVOUR="cpu", TORCH_INDEX_URL="https://index.example/cpu")
        assert code == 0
        assert calls.splitlines()[0].endswith("--extra-index-url https://index.example/cpu torch")

    def test_cpu_without_an_index_stops_before_it_installs_cuda_libraries(self, install: Any) -> None:
        code, said, calls = install("x86_64", TORCH_FLAVOUR="cpu")
        assert (code, calls) == (1, "")
        assert "TORCH_INDEX_URL" in said

    def test_cpu_needs_no_index_where_the_default_one_has_it(self, install: Any) -> None:
        code, _, calls = install("aarch64", TORCH_FLAVOUR="cpu")
        assert code == 0
        assert calls.splitlines()[0] == "pip install -c constraints.txt torch"

    def test_another_flavour_is_an_error_that_names_it(self, install: Any) -> None:
        code, said, calls = install("x86_64", TORCH_FLAVOUR="rocm")
        assert (code, calls) == (1, "")
        assert "'rocm'" in said


def stage_of(service: dict[str, Any]) -> Stage:
    assert (ROOT / "docker" / service["build"]["context"]).resolve() == ROOT
    assert (ROOT / service["build"]["dockerfile"]).is_file()
    return STAGES[service["build"]["target"]]


def test_compose_has_one_server_and_two_workers() -> None:
    assert [stage_of(service).name for service in SERVICES.values()] == ["server", "worker", "worker"]


@pytest.mark.parametrize("name", SERVICES)
def test_compose_gives_no_service_more_than_it_needs(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.keys() & {"cap_add", "devices", "network_mode", "pid", "ports", "privileged", "user"}
    assert service["networks"] == ["training"]


def test_compose_serves_in_plain_text_only_inside_its_own_network() -> None:
    assert "--insecure" in SERVICES["server"]["command"]
    assert COMPOSE["networks"]["training"]["internal"] is True


def test_compose_keeps_the_server_s_data() -> None:
    [mount] = SERVICES["server"]["volumes"]
    volume, path = mount.split(":")
    assert volume in COMPOSE["volumes"]
    assert stage_of(SERVICES["server"]).of("VOLUME") == [path]


def test_compose_workers_are_ranks_of_one_run() -> None:
    environments = [service["environment"] for service in SERVICES.values() if "environment" in service]
    assert [each["RANK"] for each in environments] == ["0", "1"]
    assert {each["WORLD_SIZE"] for each in environments} == {"2"}
    [remote] = {each["FARSTEP_REMOTE"] for each in environments}
    assert remote.startswith("server:50051/")


def test_compose_workers_wait_for_a_server_that_can_say_it_is_healthy() -> None:
    for name in ("worker-0", "worker-1"):
        assert SERVICES[name]["depends_on"] == {"server": {"condition": "service_healthy"}}
    assert stage_of(SERVICES["server"]).of("HEALTHCHECK")


def test_the_server_has_every_flag_and_variable_that_is_set_for_it() -> None:
    command = [sys.executable, "-m", "farstep_server", "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    flags = [argument for argument in SERVICES["server"]["command"] if argument.startswith("--")]
    variables = re.findall(r"FARSTEP_\w+", " ".join(STAGES["server"].of("ENV")))
    assert (flags, variables) == (["--listen", "--insecure"], ["FARSTEP_DATA_DIR"])
    assert [name for name in flags + variables if name not in said] == []


def compose_is_here() -> bool:
    """Whether there is a docker command and it has the compose plugin."""
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not compose_is_here(), reason="needs docker compose, which alone knows all of its schema")
def test_compose_accepts_the_file() -> None:
    command = ["docker", "compose", "-f", str(ROOT / "docker/compose.yaml"), "config", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
