{{/* Rules of gatewayObjects.filter, and what follows from its kind. */}}

{{/* "true" or "false". */}}
{{- define "llm-extproc.failsOpen" -}}
{{- $values := .Values.gatewayObjects.filter }}
{{- if kindIs "invalid" $values.failOpen }}
{{- not (include "llm-extproc.needsDecisions" .) }}
{{- else }}{{ $values.failOpen }}
{{- end }}
{{- end }}

{{/* "true" if a worker that is not chosen may be a wrong one, else nothing. */}}
{{- define "llm-extproc.needsDecisions" -}}
{{- if or (gt (len .Values.config.models) 1) (include "llm-extproc.disaggregated" .) }}true{{ end }}
{{- end }}

{{/* "true" if `config` has prefill and decode workers, else nothing. Engines may report them, too. */}}
{{- define "llm-extproc.disaggregated" -}}
{{- $section := default dict (get .Values.config.discovery .Values.config.discovery.backend) }}
{{- $found := or (get $section "prefill_selector") (get $section "prefill_urls") (get $section "decode_urls") }}
{{- range .Values.config.models }}{{ if .pd }}{{ $found = true }}{{ end }}{{ end }}
{{- if $found }}true{{ end }}
{{- end }}

{{/* The value by which the chart makes the objects of a gateway that exists, else nothing. */}}
{{- define "llm-extproc.gatewayValue" -}}
{{- $objects := .Values.gatewayObjects }}
{{- if ne $objects.filter.kind "none" }}gatewayObjects.filter
{{- else if $objects.inferencePool.enabled }}gatewayObjects.inferencePool
{{- else if $objects.httpRoute.enabled }}gatewayObjects.httpRoute
{{- end }}
{{- end }}

{{/* Defaults of `config` that fit the gateway, as YAML. */}}
{{- define "llm-extproc.gatewayDefaults" -}}
{{- $values := .Values.gatewayObjects.filter }}
{{- if include "llm-extproc.gatewayValue" . }}
proxy:
  retry_busy: false
pd:
  decode: inline
{{- if eq $values.kind "none" }}
envoy:
  destination: single
{{- end }}
{{- if and (eq $values.kind "envoy-gateway") (not $values.patch) }}
load:
  release: estimate
{{- end }}
{{- end }}
{{- end }}

{{- define "llm-extproc.gatewayRules" -}}
{{- $values := .Values.gatewayObjects.filter }}
{{- with include "llm-extproc.gatewayValue" . }}
{{- if eq (include "llm-extproc.defaultOf" (list $ "proxy" "retry_busy" false)) "true" }}
{{- fail (printf "config.proxy.retry_busy: must be false with %s, where the gateway's clusters of workers lack the filter that reports busy answers" .) }}
{{- end }}
{{- $decode := include "llm-extproc.defaultOf" (list $ "pd" "decode" "inline") | trimAll "\"" }}
{{- if ne $decode "inline" }}
{{- fail (printf "config.pd.decode: must be inline with %s, since the gateway has no listener for the second pass and would choose the decode worker itself" .) }}
{{- end }}
{{- end }}
{{- if ne $values.kind "none" }}
{{- if eq .Values.mode "gateway" }}
{{- fail "gatewayObjects.filter.kind: not with mode: gateway, where Envoy is in the pod" }}
{{- end }}
{{- if not $values.hostnames }}
{{- fail "gatewayObjects.filter.hostnames: needed, the hosts of the route" }}
{{- end }}
{{- if not $values.gateway.name }}
{{- fail "gatewayObjects.filter.gateway.name: needed, the Gateway that the route belongs to" }}
{{- end }}
{{- if not $values.workers.service }}
{{- fail "gatewayObjects.filter.workers.service: needed, the Service of the workers" }}
{{- end }}
{{- if .Values.gatewayObjects.httpRoute.enabled }}
{{- fail "gatewayObjects.filter.kind: not beside gatewayObjects.httpRoute.enabled, a route has one way to ask" }}
{{- end }}
{{- if and (eq $values.kind "istio") (gt (len $values.hostnames) 1) }}
{{- fail "gatewayObjects.filter.hostnames: only one with kind: istio, since an EnvoyFilter is for one virtual host" }}
{{- end }}
{{- if and $values.patch (ne $values.kind "envoy-gateway") }}
{{- fail "gatewayObjects.filter.patch: only with kind: envoy-gateway" }}
{{- end }}
{{- if and (eq (include "llm-extproc.failsOpen" .) "true") (include "llm-extproc.needsDecisions" .) }}
{{- fail "gatewayObjects.filter.failOpen: not true with several models, or with prefill and decode workers: without a decision a request would reach a wrong worker" }}
{{- end }}
{{- $release := include "llm-extproc.defaultOf" (list . "load" "release" "") | trimAll "\"" }}
{{- if and (eq $values.kind "envoy-gateway") (not $values.patch) (eq $release "stream_end") }}
{{- fail "config.load.release: must be estimate with gatewayObjects.filter.kind: envoy-gateway, unless gatewayObjects.filter.patch is true" }}
{{- end }}
{{- end }}
{{- end }}
