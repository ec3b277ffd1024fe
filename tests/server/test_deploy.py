"""What lies in server/deploy agrees with the server: flags, paths, probes, and the names of metrics."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from quire.server import cli
from tests.server.conftest import Server

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "server" / "deploy"
PROMTOOL = shutil.which("promtool")
OVERLAYS = sorted(path.name for path in (DEPLOY / "kubernetes" / "overlays").iterdir())


def manifests() -> dict[Path, dict]:
    """Every YAML file of the Kubernetes folder, one document each."""
    return {path: yaml.safe_load(path.read_text()) for path in (DEPLOY / "kubernetes").rglob("*.yaml")}


def deployments() -> list[dict]:
    return [found for found in manifests().values() if found.get("kind") == "Deployment"]


def container_of(deployment: dict) -> dict:
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    return container


def known_flags(capsys: pytest.CaptureFixture[str]) -> set[str]:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    return set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))


def test_flags_of_images_and_manifests_exist(capsys: pytest.CaptureFixture[str]) -> None:
    given = {arg for found in deployments() for arg in container_of(found)["args"] if arg.startswith("--")}
    for path in (DEPLOY / "docker").glob("*.Dockerfile"):
        (entry,) = re.findall(r"^ENTRYPOINT (\[.*\])$", path.read_text(), re.MULTILINE)
        arguments = json.loads(entry)
        assert arguments[:2] == ["quire", "serve"]
        given |= {arg for arg in arguments if arg.startswith("--")}
    assert given <= known_flags(capsys)
    assert "--drain-timeout" in given


@pytest.mark.parametrize("name", ["cpu", "tpu", "neuron"])
def test_image_runs_as_a_user_from_a_pinned_base(name: str) -> None:
    text = (DEPLOY / "docker" / f"{name}.Dockerfile").read_text()
    (base,) = re.findall(r"^FROM (\S+)$", text, re.MULTILINE)
    assert re.fullmatch(r"python:3\.\d+-slim-\w+", base)
    assert re.search(r"^USER quire$", text, re.MULTILINE)
    extras = re.findall(r"/opt/quire\[(\w+)\]", text)
    project = (ROOT / "pyproject.toml").read_text()
    assert all(f"\n{extra} = [" in project for extra in extras)
    assert (DEPLOY / "docker" / f"{name}.Dockerfile.dockerignore").is_file()


def test_probes_and_grace_fit_the_server() -> None:
    base = yaml.safe_load((DEPLOY / "kubernetes" / "base" / "deployment.yaml").read_text())
    container = container_of(base)
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"
    (port,) = container["ports"]
    assert port["containerPort"] == 8000
    assert {container[probe]["httpGet"]["port"] for probe in ("readinessProbe", "livenessProbe", "startupProbe")} == {
        port["name"]
    }
    sleep = int(container["lifecycle"]["preStop"]["exec"]["command"][-1])
    for found in deployments():
        arguments = container_of(found)["args"]
        drain = float(arguments[arguments.index("--drain-timeout") + 1])
        assert base["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > drain + sleep


def test_selectors_find_the_pods_and_files_exist() -> None:
    found = manifests()
    base = DEPLOY / "kubernetes" / "base"
    labels = found[base / "deployment.yaml"]["spec"]["template"]["metadata"]["labels"]
    assert found[base / "deployment.yaml"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert found[base / "service.yaml"]["spec"]["selector"].items() <= labels.items()
    assert found[base / "disruption.yaml"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    for path, document in found.items():
        if path.name == "kustomization.yaml":
            named = [*document["resources"], *(patch["path"] for patch in document.get("patches", ()))]
            assert all((path.parent / name).exists() for name in named)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay_patches_the_base_by_name(overlay: str) -> None:
    folder = DEPLOY / "kubernetes" / "overlays" / overlay
    base = yaml.safe_load((DEPLOY / "kubernetes" / "base" / "deployment.yaml").read_text())
    patches = yaml.safe_load((folder / "kustomization.yaml").read_text()).get("patches", ())
    for patch in patches:
        document = yaml.safe_load((folder / patch["path"]).read_text())
        assert document["metadata"]["name"] == base["metadata"]["name"]
        assert container_of(document)["name"] == container_of(base)["name"]
    assert bool(patches) == (overlay != "cpu")


@pytest.mark.skipif(PROMTOOL is None, reason="needs promtool, as `make system` installs it")
@pytest.mark.parametrize("command", [("check", "alerts.yaml"), ("test", "alerts_test.yaml")])
def test_alert_rules_hold_in_promtool(command: tuple[str, str]) -> None:
    verb, name = command
    done = subprocess.run(
        [PROMTOOL, verb, "rules", name], cwd=DEPLOY / "prometheus", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def expressions() -> list[str]:
    rules = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text())
    dashboard = json.loads((DEPLOY / "grafana" / "quire.json").read_text())
    found = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    found += [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    found += [item["query"]["query"] for item in dashboard["templating"]["list"] if item["type"] == "query"]
    return found


def test_every_metric_of_rules_and_dashboard_is_exported(server: Server) -> None:
    text = server.get("/metrics")[1]
    exported = set(re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE)) | set(
        re.findall(r"^(vllm:\w+)", text, re.MULTILINE)
    )
    named = {name for expression in expressions() for name in re.findall(r"vllm:\w+", expression)}
    assert len(named) > 20
    # A labelled counter has no sample before its first event; its family is announced.
    assert {name for name in named if name not in exported and name.removesuffix("_total") not in exported} == set()
