{{/* Rules of networkPolicy: a policy that keeps out what the release needs is refused. */}}

{{/* Where the pods of the gateway run, if that is surely or usually another namespace, else nothing. */}}
{{- define "llm-extproc.gatewayElsewhere" -}}
{{- $filter := .Values.gatewayObjects.filter }}
{{- $route := .Values.gatewayObjects.httpRoute }}
{{- $own := .Release.Namespace }}
{{- if eq $filter.kind "envoy-gateway" }}envoy-gateway-system, unless Envoy Gateway is told otherwise
{{- else if and (eq $filter.kind "istio") (ne (default $own $filter.gateway.namespace) $own) }}{{ $filter.gateway.namespace }}
{{- else if $route.enabled }}
{{- $found := "" }}
{{- range $route.parentRefs }}{{ if ne (default $own .namespace) $own }}{{ $found = .namespace }}{{ end }}{{ end }}
{{- $found }}
{{- end }}
{{- end }}

{{- define "llm-extproc.policyRules" -}}
{{- $policy := .Values.networkPolicy }}
{{- if $policy.enabled }}
{{- $elsewhere := include "llm-extproc.gatewayElsewhere" . }}
{{- if and $elsewhere (not $policy.gateways) }}
{{- fail (printf "networkPolicy.gateways: needed, the peers of the gateway's pods, or the policy lets in only pods of %s. The gateway's pods are in another namespace: %s" .Release.Namespace $elsewhere) }}
{{- end }}
{{- $reaches := false }}
{{- range $policy.workers }}{{ if or (hasKey . "namespaceSelector") (hasKey . "ipBlock") }}{{ $reaches = true }}{{ end }}{{ end }}
{{- if and (include "llm-extproc.followsCluster" .) (not $reaches) }}
{{- $followed := include "llm-extproc.followedNamespace" . }}
{{- if ne $followed .Release.Namespace }}
{{- fail (printf "networkPolicy.workers: a peer with namespaceSelector or ipBlock is needed. The workers are in %s (config.discovery), and the policy lets the service out only to pods of %s" (default "all namespaces" $followed) .Release.Namespace) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
