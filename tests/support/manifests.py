"""deploy/kubernetes as kubectl renders it, and what is in it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
OVERLAYS = tuple(sorted(path.name for path in (FOLDER / "overlays").iterdir()))
COMPONENTS = tuple(sorted(path.name for path in (FOLDER / "components").iterdir()))

Object = dict[str, Any]


@dataclass(frozen=True)
class Rendered:
    """Every object of one kustomization."""

    objects: list[Object]

    def all(self, kind: str) -> list[Object]:
        return [found for found in self.objects if found["kind"] == kind]

    def one(self, kind: str, name: str = "weft") -> Object:
        (found,) = (found for found in self.all(kind) if found["metadata"]["name"] == name)
        return found

    @property
    def pods(self) -> list[Object]:
        """The pod template of each workload."""
        return [found["spec"]["template"] for found in self.objects if "template" in found.get("spec", {})]

    @property
    def server(self) -> Object:
        """The pod's spec that the server runs in."""
        spec: Object = self.one("Deployment")["spec"]["template"]["spec"]
        return spec

    def container(self, name: str = "weft") -> Object:
        return named(self.server["containers"], name)

    def data(self, volume: Object) -> dict[str, str]:
        """What the ConfigMap of a volume holds."""
        data: dict[str, str] = self.one("ConfigMap", volume["configMap"]["name"])["data"]
        return data


def named(items: list[Object], name: str) -> Object:
    (found,) = (item for item in items if item["name"] == name)
    return found


def containers(pod: Object) -> Iterator[Object]:
    yield from pod["spec"].get("initContainers", [])
    yield from pod["spec"]["containers"]


def render(folder: Path) -> Rendered:
    """Skips the test, and says so, where there is no kubectl."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed: the manifests of deploy/kubernetes were NOT checked")
    ran = subprocess.run([kubectl, "kustomize", str(folder)], check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert not ran.stderr, "a deprecation, for one"
    return Rendered(list(yaml.safe_load_all(ran.stdout)))


def render_with(folder: Path, component: str) -> Rendered:
    """The base with one component, in a kustomization made in `folder`."""
    here = os.path.relpath(FOLDER, folder.resolve())
    kustomization = {
        "namespace": "weft",
        "resources": [f"{here}/base"],
        "components": [f"{here}/components/{component}"],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return render(folder)
