"""JSON schemas of the custom resources in deploy/kubernetes: the fields that are used there, and no others.

No package holds these CRDs for a validator that is strict about unknown fields. Sources, which say more:
PodMonitor: prometheus-operator, Documentation/api-reference (monitoring.coreos.com/v1).
ScaledObject: keda.sh, ScaledObject specification and Prometheus scaler (keda.sh/v1alpha1).
InferencePool: gateway-api-inference-extension.sigs.k8s.io/reference/spec (inference.networking.k8s.io/v1).
HTTPRoute, GRPCRoute: gateway-api.sigs.k8s.io/reference/spec (gateway.networking.k8s.io/v1).
EndpointPickerConfig, a file rather than a resource: llm-d.ai/docs/api-reference/endpointpickerconfig (v1alpha1).
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def table(required: Schema | None = None, **optional: Schema) -> Schema:
    """An object of these fields alone."""
    properties = {**(required or {}), **optional}
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "required": list(required or {}),
    }


def items(schema: Schema, most: int = 16) -> Schema:
    return {"type": "array", "items": schema, "minItems": 1, "maxItems": most}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


TEXT: Schema = {"type": "string", "minLength": 1}
NAME: Schema = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
COUNT: Schema = {"type": "integer", "minimum": 0}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
DURATION: Schema = {"type": "string", "pattern": r"^([0-9]{1,5}(h|m|s|ms)){1,4}$"}
HOSTNAME: Schema = {
    "type": "string",
    "pattern": r"^(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$",
}
SERVICE: Schema = {"type": "string", "pattern": r"^[A-Za-z_][A-Za-z_0-9]*(\.[A-Za-z_][A-Za-z_0-9]*)*$"}
TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
METADATA = table({"name": NAME}, namespace=NAME, labels=TEXTS, annotations=TEXTS)
LABELS = table({"matchLabels": TEXTS})


def resource(api_version: str, kind: str, spec: Schema) -> Schema:
    return table({"apiVersion": one_of(api_version), "kind": one_of(kind), "metadata": METADATA, "spec": spec})


_POLICIES = items(table({"type": one_of("Pods", "Percent"), "value": COUNT, "periodSeconds": COUNT}))
_SCALING = table(stabilizationWindowSeconds={"type": "integer", "minimum": 0, "maximum": 3600}, policies=_POLICIES)
_AVERAGE = one_of("AverageValue")
_PROMETHEUS = table(
    {"serverAddress": TEXT, "query": TEXT, "threshold": {"type": "string", "pattern": r"^[0-9.]+$"}},
    activationThreshold=TEXT,
    ignoreNullValues=one_of("true", "false"),
)
_BACKEND = table({"name": NAME}, group=TEXT, kind=TEXT, port=PORT, weight=COUNT)
_ROUTE = {"parentRefs": items(table({"name": NAME}, namespace=NAME)), "hostnames": items(HOSTNAME)}
_PATH = table({"type": one_of("Exact", "PathPrefix"), "value": {"type": "string", "pattern": "^/"}})
_PLUGIN = table({"type": NAME}, name=NAME, parameters={"type": "object"})
_REFERENCE = {"pluginRef": NAME}

SCHEMAS: dict[tuple[str, str], Schema] = {
    (schema["properties"]["apiVersion"]["enum"][0], schema["properties"]["kind"]["enum"][0]): schema
    for schema in (
        resource(
            "monitoring.coreos.com/v1",
            "PodMonitor",
            table(
                {"selector": LABELS, "podMetricsEndpoints": items(table({"port": NAME}, interval=DURATION, path=TEXT))}
            ),
        ),
        resource(
            "keda.sh/v1alpha1",
            "ScaledObject",
            table(
                {
                    "scaleTargetRef": table({"name": NAME}),
                    "triggers": items(
                        table(
                            {"type": one_of("prometheus"), "metadata": _PROMETHEUS}, metricType=one_of("AverageValue")
                        )
                    ),
                },
                minReplicaCount=COUNT,
                maxReplicaCount=COUNT,
                pollingInterval=COUNT,
                cooldownPeriod=COUNT,
                fallback=table({"failureThreshold": COUNT, "replicas": COUNT}),
                advanced=table(
                    horizontalPodAutoscalerConfig=table(behavior=table(scaleUp=_SCALING, scaleDown=_SCALING))
                ),
            ),
        ),
        resource(
            "inference.networking.k8s.io/v1",
            "InferencePool",
            table(
                {
                    "selector": LABELS,
                    "targetPorts": items(table({"number": PORT}), 8),
                    "endpointPickerRef": table(
                        {"name": NAME, "port": table({"number": PORT})},
                        group=TEXT,
                        kind=TEXT,
                        failureMode=one_of("FailOpen", "FailClose"),
                    ),
                },
                appProtocol=one_of("http", "kubernetes.io/h2c"),
            ),
        ),
        resource(
            "gateway.networking.k8s.io/v1",
            "HTTPRoute",
            table(
                {
                    **_ROUTE,
                    "rules": items(
                        table(
                            {"matches": items(table({"path": _PATH})), "backendRefs": items(_BACKEND)},
                            timeouts=table(request=DURATION, backendRequest=DURATION),
                        )
                    ),
                }
            ),
        ),
        resource(
            "gateway.networking.k8s.io/v1",
            "GRPCRoute",
            table(
                {
                    **_ROUTE,
                    "rules": items(
                        table(
                            {
                                "matches": items(table({"method": table({"service": SERVICE}, method=TEXT)})),
                                "backendRefs": items(_BACKEND),
                            }
                        )
                    ),
                }
            ),
        ),
    )
}

ENDPOINT_PICKER_CONFIG = table(
    {
        "apiVersion": one_of("llm-d.ai/v1alpha1"),
        "kind": one_of("EndpointPickerConfig"),
        "plugins": items(_PLUGIN, 32),
        "schedulingProfiles": items(table({"name": NAME, "plugins": items(table(_REFERENCE, weight=COUNT), 32)})),
    },
    requestHandler=table({"parsers": items(table(_REFERENCE))}),
)
