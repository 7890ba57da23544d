{{/* The configuration of the service, and what follows from it. */}}

{{- define "llm-extproc.defaultOf" -}}
{{/* A key of `config`, or its default: context, section, key, default. */}}
{{- $section := default dict (get (index . 0).Values.config (index . 1)) }}
{{- if hasKey $section (index . 2) }}{{ get $section (index . 2) | toJson }}{{ else }}{{ index . 3 | toJson }}{{ end }}
{{- end }}

{{- define "llm-extproc.grpcPort" -}}
{{ include "llm-extproc.defaultOf" (list . "server" "port" 9002) }}
{{- end }}

{{- define "llm-extproc.adminPort" -}}
{{ include "llm-extproc.defaultOf" (list . "server" "admin_port" 9090) }}
{{- end }}

{{- define "llm-extproc.envoyPort" -}}
{{ include "llm-extproc.defaultOf" (list . "envoy" "port" 8080) }}
{{- end }}

{{- define "llm-extproc.envoyAdminPort" -}}
{{ include "llm-extproc.defaultOf" (list . "envoy" "admin_port" 9901) }}
{{- end }}

{{/* "true" if discovery reads the API server, else nothing. */}}
{{- define "llm-extproc.followsCluster" -}}
{{- if not (has .Values.config.discovery.backend (list "static_urls" "dns")) }}true{{ end }}
{{- end }}

{{/* "true" if Envoy, without the service, would have workers only from before, else nothing. */}}
{{- define "llm-extproc.knowsNoHost" -}}
{{- $config := fromYaml (include "llm-extproc.config" .) }}
{{- $envoy := default dict $config.envoy }}
{{- $isOff := eq (toString (get $envoy "fail_open")) "false" }}
{{- $alike := not (include "llm-extproc.needsDecisions" .) }}
{{- $byAds := eq (toString (get $envoy "endpoints")) "ads" }}
{{- if and (include "llm-extproc.followsCluster" .) $byAds $alike (not $isOff) (not $envoy.fail_open_host) }}true{{ end }}
{{- end }}

{{/* The namespace whose objects discovery follows; nothing for all. */}}
{{- define "llm-extproc.followedNamespace" -}}
{{- $section := default dict (get .Values.config.discovery .Values.config.discovery.backend) }}
{{- if hasKey $section "namespace" }}{{ get $section "namespace" }}{{ else }}{{ .Release.Namespace }}{{ end }}
{{- end }}

{{/* The namespace in fail_open_host if discovery follows another one, else nothing. */}}
{{- define "llm-extproc.failsOpenElsewhere" -}}
{{- $host := index (splitList ":" (toString (default "" (get (default dict .Values.config.envoy) "fail_open_host")))) 0 }}
{{- $parts := splitList "." $host }}
{{- $followed := include "llm-extproc.followedNamespace" . }}
{{- if and (include "llm-extproc.followsCluster" .) $followed (ge (len $parts) 3) }}
{{- if and (eq (index $parts 2) "svc") (ne (index $parts 1) $followed) }}{{ index $parts 1 }}{{ end }}
{{- end }}
{{- end }}

{{- define "llm-extproc.tokenModels" -}}
{{- $count := 0 }}
{{- range .Values.config.models }}
{{- if .tokenizer_path }}{{ $count = add1 $count }}{{ end }}
{{- end }}
{{- $count }}
{{- end }}

{{/* The file, as YAML: the defaults of the chart, then `config`, then what the chart owns. */}}
{{- define "llm-extproc.config" -}}
{{- $listen := .Values.listenHost }}
{{- $server := dict "host" $listen "admin_host" $listen "watch_secs" (ternary 1 0 .Values.reload) }}
{{- $envoy := dict }}
{{- $workers := dict }}
{{- if eq .Values.mode "gateway" }}
{{- $_ := set $server "host" "127.0.0.1" }}
{{- $_ := set $server "unix_socket" "/run/llm-extproc/extproc.sock" }}
{{- $envoy = dict "host" $listen }}
{{- end }}
{{- with .Values.tls }}
{{- $tls := dict "cert_file" "/etc/extproc-tls/tls.crt" "key_file" "/etc/extproc-tls/tls.key" }}
{{- $extproc := dict "ca_file" "/etc/extproc-tls/ca.crt" }}
{{- if .clientCa }}
{{- $_ := set $tls "client_ca_file" "/etc/extproc-tls/ca.crt" }}
{{- $extproc = merge $extproc (dict "cert_file" "/etc/extproc-tls/tls.crt" "key_file" "/etc/extproc-tls/tls.key") }}
{{- end }}
{{- $_ := set $server "tls" $tls }}
{{- $_ := set $envoy "extproc" $extproc }}
{{- end }}
{{- if .Values.adminToken }}
{{- $_ := set $server "admin_token_env" "EXTPROC_ADMIN_TOKEN" }}
{{- end }}
{{- if .Values.workerApiKey }}
{{- $workers = dict "api_key_file" "/etc/extproc-worker-key/key" }}
{{- end }}
{{- $owned := dict "server" $server "envoy" $envoy "workers" $workers }}
{{- if include "llm-extproc.followsCluster" . }}
{{- $section := dict "namespace" (include "llm-extproc.followedNamespace" .) }}
{{- $_ := set $owned "discovery" (dict .Values.config.discovery.backend $section) }}
{{- end }}
{{- $defaults := dict "observability" (dict "log_format" "json") }}
{{- if eq .Values.mode "gateway" }}
{{- $_ := set $defaults "envoy" (dict "endpoints" "ads" "max_heap_mb" (div (int64 .Values.gateway.memoryMib) 2)) }}
{{- end }}
{{- if gt (int (include "llm-extproc.tokenModels" .)) 0 }}
{{- $_ := set $defaults "kv" (dict "max_pages" (int64 (include "llm-extproc.maxPages" .))) }}
{{- end }}
{{- $defaults = merge $defaults (fromYaml (include "llm-extproc.gatewayDefaults" .)) }}
{{- $config := mergeOverwrite $defaults (deepCopy .Values.config) $owned }}
{{- range $key := list "envoy" "workers" }}
{{- if not (get $config $key) }}{{ $_ := unset $config $key }}{{ end }}
{{- end }}
{{- toYaml $config }}
{{- end }}

{{/* What a running service cannot apply: if it changes, the pods are replaced. */}}
{{- define "llm-extproc.restartPart" -}}
{{- $config := fromYaml (include "llm-extproc.config" .) }}
{{- $keys := fromYaml (.Files.Get "files/restart-keys.yaml") }}
{{- $part := dict }}
{{- range $keys.values }}
{{- $path := . }}
{{- if hasPrefix "models[]." $path }}
{{- range $model := $config.models }}
{{- with include "llm-extproc.at" (list . (trimPrefix "models[]." $path)) }}
{{- $_ := set $part (printf "%s %s" $model.id $path) . }}
{{- end }}
{{- end }}
{{- else }}
{{- $_ := set $part $path (include "llm-extproc.at" (list $config $path)) }}
{{- end }}
{{- end }}
{{- range $keys.presence }}
{{- $_ := set $part . (ternary "unset" "set" (empty (include "llm-extproc.at" (list $config .)))) }}
{{- end }}
{{- toJson $part }}
{{- end }}

{{/* The value at a dotted path as JSON; nothing if it is not set. */}}
{{- define "llm-extproc.at" -}}
{{- $node := index . 0 }}
{{- range splitList "." (index . 1) }}
{{- if kindIs "map" $node }}{{ $node = get $node . }}{{ else }}{{ $node = "" }}{{ end }}
{{- end }}
{{- if not (kindIs "string" $node) }}{{ toJson $node }}{{ else }}{{ $node }}{{ end }}
{{- end }}
