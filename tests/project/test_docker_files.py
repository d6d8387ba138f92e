# SPDX-License-Identifier: Apache-2.0
"""Command lines and manifests for clusters: what would break a job that no test can start here."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from deepspeed.launcher.runner import fetch_hostfile
from deepspeed.launcher.runner import parse_args as parse_deepspeed
from torch.distributed.run import parse_args as parse_torchrun

from tests import ROOT
from train import parse_arguments

DOCKER = ROOT / "docker"
IN_IMAGE = "/workspace/"  # the repository's root there
PAGES = (ROOT / "docs" / "clusters.md", DOCKER / "README.md")
COMMANDS = [
    line
    for page in PAGES
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    for line in block.splitlines()
]


@pytest.fixture
def check_job(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Takes a launcher's command line; both it and train.py have to understand their part."""
    monkeypatch.chdir(ROOT)

    def check(words: list[str]) -> Any:
        launcher, rest = words[0], words[1:]
        launched = None
        if launcher == "deepspeed":
            launched = parse_deepspeed(rest)
            script, arguments = launched.user_script, launched.user_args
        elif launcher == "torchrun":
            launched = parse_torchrun(rest)
            script, arguments = launched.training_script, launched.training_script_args
        else:
            start = rest.index("python")
            script, arguments = rest[start + 1], rest[start + 2 :]
        assert script == "examples/pretrain/train.py"
        # A checkpoint to resume from is not there, all else that is named is.
        if "--load" in arguments:
            at = arguments.index("--load")
            arguments = arguments[:at] + arguments[at + 2 :]
        monkeypatch.setattr("sys.argv", [script, *arguments])
        parse_arguments()
        return launched

    return check


@pytest.mark.parametrize("command", [c for c in COMMANDS if "train.py" in c])
def test_commands_of_the_pages_are_understood(check_job: Any, command: str) -> None:
    words = shlex.split(command)
    start = next(i for i, word in enumerate(words) if word in ("deepspeed", "mpirun"))
    check_job(words[start:])


def test_kubernetes_job_holds_together(check_job: Any) -> None:
    claim, service, job = yaml.safe_load_all((DOCKER / "kubernetes.yaml").read_text())
    assert [part["kind"] for part in (claim, service, job)] == [
        "PersistentVolumeClaim",
        "Service",
        "Job",
    ]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert job["spec"]["completionMode"] == "Indexed"
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == volumes.keys()
    assert mounts["runs"] == f"{IN_IMAGE}runs"
    assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    user = f"USER {pod['securityContext']['runAsUser']}:{pod['securityContext']['fsGroup']}\n"
    assert user in (DOCKER / "Dockerfile").read_text()

    assert container["command"] == ["bash", "-c"]
    (script,) = container["args"]
    # Indexed Jobs set this variable in each pod.
    words = shlex.split(script.replace("$JOB_COMPLETION_INDEX", "1"))
    assert words.pop(0) == "exec"
    launched = check_job(words)
    assert int(launched.nnodes) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert int(launched.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert launched.master_addr == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert launched.master_port == service["spec"]["ports"][0]["port"]
    assert launched.node_rank == 1


def test_slurm_script_starts_a_torchrun_a_node(check_job: Any, tmp_path: Path) -> None:
    """With stand-ins for two of Slurm's commands, of which one shows what it was given."""
    script = (DOCKER / "slurm.sh").read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", script, re.MULTILINE))
    assert asked["ntasks-per-node"] == "1"
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho node-7\necho node-8\n")
    (tmp_path / "srun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    for name in ("scontrol", "srun"):
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", str(DOCKER / "slurm.sh")],
        env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_JOB_NODELIST": "node-[7-8]",
            "SLURM_JOB_NUM_NODES": asked["nodes"],
            "SLURM_GPUS_PER_NODE": asked["gpus-per-node"],
            "SLURM_JOB_ID": "5",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    words = done.stdout.splitlines()
    launched = check_job(words[words.index("torchrun") :])
    assert (launched.nnodes, launched.nproc_per_node) == (asked["nodes"], asked["gpus-per-node"])
    assert launched.rdzv_endpoint == "node-7:29500"


def test_compose_nodes_are_those_of_the_hostfile() -> None:
    compose = yaml.safe_load((DOCKER / "docker-compose.yaml").read_text())
    nodes = dict(compose["services"])
    keys = nodes.pop("keys")
    assert list(fetch_hostfile(str(DOCKER / "hostfile"))) == list(nodes)
    assert keys["command"] == ["docker/make_keys.sh"]
    for name, node in nodes.items():
        assert node["hostname"] == name
        assert node["depends_on"] == {"keys": {"condition": "service_completed_successfully"}}
        assert set(keys["volumes"]) < set(node["volumes"])
        assert {volume.split(":")[0] for volume in node["volumes"]} == compose["volumes"].keys()
        assert (ROOT / node["command"][-1]).is_file()
        environment = ROOT / node["environment"]["DS_ENV_FILE"].removeprefix(IN_IMAGE)
        # DeepSpeed splits each line there is at its "=".
        assert all(re.fullmatch(r"\w+=\S+", line) for line in environment.read_text().splitlines())
    dockerfile = (node["build"]["context"], node["build"]["dockerfile"])
    assert (DOCKER / dockerfile[0] / dockerfile[1]).is_file()
    declared = re.findall(r"^ARG (\w+)=", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
    assert set(node["build"]["args"]) <= set(declared)


def test_base_image_is_pinned_by_digest() -> None:
    (base,) = re.findall(r"^ARG BASE=(.*)$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
    assert re.fullmatch(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}", base)
