"""deploy/kubernetes: every overlay and every component renders, is valid, is locked down, and fits the server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from custom_resources import ENDPOINT_PICKER_CONFIG, SCHEMAS
from manifests import COMPONENTS, FOLDER, OVERLAYS, Object, Rendered, containers, named, render, render_with

from weft.server.api.health import PROBES
from weft.server.api.translation import ADAPTER_METADATA
from weft.server.app import SERVICES
from weft.server.cli import cli
from weft.server.cli.serve import SETTINGS, build_config, read_file
from weft.server.config import ServerConfig

VERSIONS = ("1.33", "1.37")
"""The oldest Kubernetes that has all of it, volumes of images too, and the newest that the schemas are there for."""

MARGIN_S = 15
"""Between the longest drain and the kubelet's SIGKILL."""

OPTIONS = {f"WEFT_{setting.name.upper()}": setting for setting in SETTINGS}

_cache: dict[str, Rendered] = {}


@pytest.fixture(params=[*(f"overlays/{name}" for name in OVERLAYS), *(f"components/{name}" for name in COMPONENTS)])
def rendered(request: pytest.FixtureRequest, tmp_path: Path) -> Rendered:
    """An overlay, or the base with a component."""
    part: str = request.param
    if part not in _cache:
        kind, _, name = part.partition("/")
        _cache[part] = render(FOLDER / part) if kind == "overlays" else render_with(tmp_path, name)
    return _cache[part]


@pytest.fixture
def settings(rendered: Rendered, tmp_path: Path) -> dict[str, Any]:
    """What the server's container sets, as `weft serve` reads it."""
    return settings_of(rendered, tmp_path)


def settings_of(rendered: Rendered, tmp_path: Path) -> dict[str, Any]:
    container = rendered.container()
    command, option, path = container["args"]
    assert (command, option) == ("serve", "--config")
    mount = next(mount for mount in container["volumeMounts"] if path == f"{mount['mountPath']}/weft.toml")
    data = rendered.data(named(rendered.server["volumes"], mount["name"]))
    (tmp_path / "weft.toml").write_text(data["weft.toml"])
    values = read_file(tmp_path / "weft.toml")
    environment = {item["name"]: item["value"] for item in container["env"]}
    return values | {OPTIONS[name].name: value for name, value in environment.items() if name in OPTIONS}


def config_of(settings: dict[str, Any]) -> ServerConfig:
    """The numbers alone: the files and folders are not here."""
    numbers = {
        setting.name: setting.type(settings[setting.name])
        for setting in SETTINGS
        if setting.type in (int, float) and setting.name in settings
    }
    return build_config({**numbers, "model": "/models/base"})


def pod_files(pod: Object, container: Object) -> set[str]:
    """Paths where the container has something mounted."""
    volumes = {volume["name"] for volume in pod.get("volumes", [])}
    mounts = container.get("volumeMounts", [])
    assert {mount["name"] for mount in mounts} <= volumes, f"{container['name']} mounts a volume that is not there"
    return {mount["mountPath"] for mount in mounts}


class TestValidity:
    @pytest.mark.parametrize("version", VERSIONS)
    def test_kubernetes_knows_every_field(self, rendered: Rendered, version: str) -> None:
        for found in rendered.objects:
            if (found["apiVersion"], found["kind"]) not in SCHEMAS:
                kubernetes_validate.validate(found, version, strict=True)

    def test_the_custom_resources_have_the_fields_that_their_makers_document(self, rendered: Rendered) -> None:
        for found in rendered.objects:
            schema = SCHEMAS.get((found["apiVersion"], found["kind"]))
            if schema is not None:
                jsonschema.validate(found, schema)

    def test_a_field_that_nobody_knows_is_seen(self) -> None:
        bad = render(FOLDER / "overlays" / "autoscaling")
        bad.one("Deployment")["spec"]["template"]["spec"]["enableServiceLink"] = False
        bad.one("InferencePool")["spec"]["extensionRef"] = {"name": "weft-endpoint-picker"}
        with pytest.raises(kubernetes_validate.ValidationError, match="enableServiceLink"):
            kubernetes_validate.validate(bad.one("Deployment"), VERSIONS[0], strict=True)
        with pytest.raises(jsonschema.ValidationError, match="extensionRef"):
            jsonschema.validate(bad.one("InferencePool"), SCHEMAS["inference.networking.k8s.io/v1", "InferencePool"])

    def test_the_claims_are_valid_and_those_that_are_mounted(self) -> None:
        claims = list(yaml.safe_load_all((FOLDER / "claims.yaml").read_text()))
        for claim in claims:
            kubernetes_validate.validate(claim, VERSIONS[0], strict=True)
        mounted = {
            volume["persistentVolumeClaim"]["claimName"]
            for overlay in OVERLAYS
            for volume in render(FOLDER / "overlays" / overlay).server["volumes"]
            if "persistentVolumeClaim" in volume
        }
        assert mounted == {claim["metadata"]["name"] for claim in claims}

    def test_everything_lies_in_one_namespace(self, rendered: Rendered) -> None:
        assert {found["metadata"]["namespace"] for found in rendered.objects} == {"weft"}


class TestSecurity:
    def test_every_pod_is_as_the_restricted_standard_wants_it(self, rendered: Rendered) -> None:
        for pod in rendered.pods:
            context = pod["spec"]["securityContext"]
            assert context["runAsNonRoot"] is True
            assert context["runAsUser"] > 0
            assert context["runAsGroup"] > 0
            assert context["seccompProfile"] == {"type": "RuntimeDefault"}
            assert not {"hostNetwork", "hostPID", "hostIPC"} & pod["spec"].keys()
            for container in containers(pod):
                assert container["securityContext"] == {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                }

    def test_no_token_is_mounted_but_the_endpoint_pickers(self, rendered: Rendered) -> None:
        assert rendered.server["automountServiceAccountToken"] is False
        assert rendered.one("ServiceAccount")["automountServiceAccountToken"] is False
        assert {role["metadata"]["name"] for role in rendered.all("Role")} <= {"weft-endpoint-picker"}

    def test_no_service_sets_an_option(self, rendered: Rendered) -> None:
        assert "WEFT_PORT" in OPTIONS
        assert rendered.one("Service")["metadata"]["name"].upper() == "WEFT"
        assert all(pod["spec"]["enableServiceLinks"] is False for pod in rendered.pods)

    def test_only_clients_and_scrapes_come_in(self, rendered: Rendered) -> None:
        rules = rendered.one("NetworkPolicy")["spec"]["ingress"]
        assert all(rule["from"] for rule in rules), "an empty list would let everybody in"
        assert [[port["port"] for port in rule["ports"]] for rule in rules] == [["grpc"], ["metrics"]]
        assert rules[0]["from"][0] == {"podSelector": {"matchLabels": {"weft-client": "true"}}}

    def test_who_is_nobody_may_ask_only_without_an_access_file(self, settings: dict[str, Any]) -> None:
        assert settings["host"] == "0.0.0.0"  # noqa: S104 - the pod's
        assert settings["allow_anonymous"] == ("false" if "access" in settings else "true")
        assert ("tls_cert" in settings) == ("tls_key" in settings)

    @pytest.mark.parametrize("overlay", OVERLAYS)
    def test_memory_has_a_limit(self, overlay: str) -> None:
        for pod in render(FOLDER / "overlays" / overlay).pods:
            for container in containers(pod):
                assert container["resources"]["limits"]["memory"], container["name"]
                assert container["resources"]["requests"].keys() >= {"cpu", "memory"}, container["name"]


class TestFit:
    def test_every_option_is_one_of_the_servers(self, rendered: Rendered) -> None:
        environment = [item["name"] for item in rendered.container()["env"]]
        assert [name for name in environment if name not in OPTIONS] == ["HOME"]
        assert len(environment) == len(set(environment))

    def test_every_option_of_the_sidecar_is_one_of_its_command(
        self, rendered: Rendered, settings: dict[str, Any]
    ) -> None:
        for container in rendered.server["containers"]:
            if container["name"] != "sync":
                continue
            command, *arguments = container["args"]
            context = cli.commands[command].make_context(command, list(arguments))  # raises what is wrong with them
            assert context.params["for_good"]
            assert context.params["tls"] == ("tls_cert" in settings)
            assert (context.params["api_key_file"] is not None) == ("access" in settings)
            assert [item["name"] for item in container["env"]] == ["WEFT_ADDRESS"]
            made = context.params["ready_file"]
            assert container["readinessProbe"]["exec"]["command"] == ["test", "-f", str(made)]

    def test_files_lie_where_something_is_mounted(self, rendered: Rendered, settings: dict[str, Any]) -> None:
        pod = rendered.one("Deployment")["spec"]["template"]["spec"]
        mounts = pod_files(pod, rendered.container())
        paths = [str(value) for value in settings.values() if str(value).startswith("/")]
        assert len(paths) >= 3
        for path in paths:
            assert any(path == mount or path.startswith(f"{mount}/") for mount in mounts), path
        for found in rendered.pods:
            for container in containers(found):
                pod_files(found["spec"], container)

    def test_what_is_written_lies_on_a_volume_that_can_be(self, rendered: Rendered, settings: dict[str, Any]) -> None:
        home = named(rendered.container()["env"], "HOME")["value"]
        for path in (settings["state"], settings["cache"], home, "/tmp"):  # noqa: S108 - the pod's
            mounts = rendered.container()["volumeMounts"]
            around = [mount for mount in mounts if f"{path}/".startswith(f"{mount['mountPath']}/")]
            mount = max(around, key=lambda mount: len(mount["mountPath"]))
            assert not mount.get("readOnly"), path
            volume = named(rendered.server["volumes"], mount["name"])
            assert volume["emptyDir"]["sizeLimit"], path

    def test_ports_are_those_that_the_server_listens_on(self, rendered: Rendered, settings: dict[str, Any]) -> None:
        config = config_of(settings)
        ports = {port["name"]: port["containerPort"] for port in rendered.container()["ports"]}
        assert ports == {"grpc": config.port, "metrics": config.metrics_port, "health": config.health_port}
        for service in rendered.all("Service"):
            if service["metadata"]["name"].startswith("weft-endpoint"):
                continue
            (port,) = service["spec"]["ports"]
            assert (port["port"], port["targetPort"]) == (config.port, "grpc")
            assert ("appProtocol" in port) == ("tls_cert" not in settings)

    def test_probes_ask_for_health_that_the_server_has(self, rendered: Rendered, settings: dict[str, Any]) -> None:
        container = rendered.container()
        probes = {kind: container[f"{kind}Probe"] for kind in ("liveness", "readiness", "startup")}
        for kind, probe in probes.items():
            assert kind in PROBES
            assert probe["grpc"] == {"port": config_of(settings).health_port, "service": kind}
        startup = probes["startup"]
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 1200, "a large model takes long to load"
        assert rendered.one("Deployment")["spec"]["progressDeadlineSeconds"] > 1200

    def test_selectors_meet_the_pods(self, rendered: Rendered) -> None:
        labels = [pod["metadata"]["labels"] for pod in rendered.pods]
        for selector in selectors(rendered):
            assert sum(selector.items() <= pod.items() for pod in labels) == 1, selector

    def test_every_config_map_and_account_that_is_named_is_there(self, rendered: Rendered) -> None:
        accounts = {account["metadata"]["name"] for account in rendered.all("ServiceAccount")}
        maps = {found["metadata"]["name"] for found in rendered.all("ConfigMap")}
        for pod in rendered.pods:
            assert pod["spec"]["serviceAccountName"] in accounts
            used = {volume["configMap"]["name"] for volume in pod["spec"]["volumes"] if "configMap" in volume}
            assert used <= maps


class TestDrain:
    def test_the_longest_request_ends_before_the_pod_is_killed(
        self, rendered: Rendered, settings: dict[str, Any]
    ) -> None:
        config = config_of(settings)
        sleep_s = rendered.container()["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert config.drain_grace_s >= config.max_request_s, "else a drain cuts requests off"
        least_s = sleep_s + config.drain_grace_s + MARGIN_S
        assert rendered.server["terminationGracePeriodSeconds"] >= least_s

    def test_nothing_is_sent_any_more_when_the_drain_begins(self, rendered: Rendered) -> None:
        readiness = rendered.container()["readinessProbe"]
        sleep_s = rendered.container()["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert sleep_s >= readiness["periodSeconds"]

    def test_a_rollout_takes_no_pod_before_another_is_ready(self, rendered: Rendered) -> None:
        strategy = rendered.one("Deployment")["spec"]["strategy"]["rollingUpdate"]
        assert strategy["maxUnavailable"] == 0
        assert strategy["maxSurge"] >= 1
        assert rendered.one("PodDisruptionBudget")["spec"]["maxUnavailable"] == 1

    def test_the_gateway_waits_longer_than_the_server(self) -> None:
        rendered = render(FOLDER / "overlays" / "autoscaling")
        (rule,) = rendered.one("HTTPRoute")["spec"]["rules"]
        request_s = int(rule["timeouts"]["request"].removesuffix("s"))
        toml = next(map_["data"]["weft.toml"] for map_ in rendered.all("ConfigMap") if "weft.toml" in map_["data"])
        assert f"max-request-seconds = {request_s - 10}" in toml
        picker = rendered.one("Deployment", "weft-endpoint-picker")["spec"]["template"]["spec"]
        assert picker["terminationGracePeriodSeconds"] >= rendered.server["terminationGracePeriodSeconds"]


class TestScaling:
    def test_it_scales_by_a_metric_that_the_server_exports(self) -> None:
        rendered = render(FOLDER / "overlays" / "autoscaling")
        scaled = rendered.one("ScaledObject")["spec"]
        assert "replicas" not in rendered.one("Deployment")["spec"], "an apply would undo what was scaled"
        (trigger,) = scaled["triggers"]
        (metric,) = re.findall(r"weft_\w+", trigger["metadata"]["query"])
        source = (FOLDER.parents[1] / "server" / "metrics.py").read_text()
        assert f'"{metric}"' in source
        assert scaled["minReplicaCount"] >= 2
        assert scaled["fallback"]["replicas"] >= scaled["minReplicaCount"]


class TestRouting:
    @pytest.fixture
    def routing(self) -> Rendered:
        return render(FOLDER / "overlays" / "autoscaling")

    def test_the_pool_holds_the_servers_at_their_port(self, routing: Rendered) -> None:
        pool = routing.one("InferencePool")["spec"]
        ports = {port["name"]: port["containerPort"] for port in routing.container()["ports"]}
        assert pool["targetPorts"] == [{"number": ports["grpc"]}]
        picker = routing.one("Service", pool["endpointPickerRef"]["name"])["spec"]["ports"]
        assert [port["port"] for port in picker] == [pool["endpointPickerRef"]["port"]["number"]]
        arguments = named(picker_pod(routing)["containers"], "endpoint-picker")["args"]
        assert f"--model-server-metrics-port={ports['metrics']}" in arguments

    def test_the_route_leads_to_the_pool_for_methods_that_there_are(self, routing: Rendered) -> None:
        (rule,) = routing.one("HTTPRoute")["spec"]["rules"]
        (backend,) = rule["backendRefs"]
        assert (backend["kind"], backend["name"]) == ("InferencePool", "weft")
        for match in rule["matches"]:
            assert match["path"]["value"].removeprefix("/") in SERVICES

    def test_the_picker_goes_by_the_adapter(self, routing: Rendered) -> None:
        pod = picker_pod(routing)
        text = routing.data(named(pod["volumes"], "config"))["endpoint-picker-config.yaml"]
        config = yaml.safe_load(text)
        jsonschema.validate(config, ENDPOINT_PICKER_CONFIG)
        declared = [plugin["type"] for plugin in config["plugins"]]
        (profile,) = config["schedulingProfiles"]
        used = [item["pluginRef"] for item in (*profile["plugins"], *config["requestHandler"]["parsers"])]
        assert sorted(used) == sorted(declared)
        assert "lora-affinity-scorer" in declared
        assert ADAPTER_METADATA[0] in text, "the metadata that the picker and the server both read"

    def test_a_route_without_a_picker_leads_to_services_that_there_are(self, tmp_path: Path) -> None:
        rendered = render_with(tmp_path, "gateway")
        (rule,) = rendered.one("GRPCRoute")["spec"]["rules"]
        assert {match["method"]["service"] for match in rule["matches"]} <= set(SERVICES)
        (backend,) = rule["backendRefs"]
        assert rendered.one("Service", backend["name"])["spec"]["ports"][0]["port"] == backend["port"]


def picker_pod(rendered: Rendered) -> Object:
    spec: Object = rendered.one("Deployment", "weft-endpoint-picker")["spec"]["template"]["spec"]
    return spec


def selectors(rendered: Rendered) -> Iterator[dict[str, str]]:
    """Every selector that must meet exactly one workload's pods."""
    for found in rendered.all("Service"):
        yield found["spec"]["selector"]
    for kind in ("PodMonitor", "PodDisruptionBudget", "InferencePool"):
        yield from (found["spec"]["selector"]["matchLabels"] for found in rendered.all(kind))
    for found in rendered.all("NetworkPolicy"):
        yield found["spec"]["podSelector"]["matchLabels"]
    for pod in rendered.pods:
        spread = pod["spec"].get("topologySpreadConstraints", [])
        yield from (constraint["labelSelector"]["matchLabels"] for constraint in spread)
